"""Shares of attention equal those of the definition, in every weighting and form, and are logged in training."""

import pytest
import torch

from tests.support.models import rotation, tiny_model
from trl_miso import MISOSFTTrainer
from trl_miso.attention.kernels import KERNELS, KernelOptions
from trl_miso.attention.mixture import miso_attention
from trl_miso.attention.reference import reference_attention
from trl_miso.attention.shares import Shares
from trl_miso.segments import parallel, single
from trl_miso.segments.packed import WEIGHTINGS, pack

H, G, D, SCALE = 4, 2, 8, 0.9
TURN = rotation(D)
NAMES = ["output_share", "context_share", "min_context_share"]


def example(contexts, output, first=0):
    """An example whose contexts share no token, so that each token belongs to one context."""
    ids = [[first + 10 * i + j for j in range(length)] for i, length in enumerate(contexts)]
    weights = torch.arange(1, len(ids) + 1, dtype=torch.float64)
    return parallel(ids, output, (weights / weights.sum()).tolist(), "successive")[1]


BATCH = [example([5, 2, 7], 4), single(6), example([3, 9], 2), example([4], 5)]


def layer(seed, dtype=torch.float64):
    """q and k at random; v is the one-hot segment of each token, so that the output of attention is its mass on each segment."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(one.num_tokens for one in BATCH)
    q, k = (torch.randn(total, heads, D, generator=generator, dtype=torch.float64) for heads in (H, G))
    at = [i for one in BATCH for i, segment in enumerate(one.segments) for _ in range(segment.length)]
    v = torch.nn.functional.one_hot(torch.tensor(at), D).double()[:, None].expand(-1, G, -1)
    return [x.to(dtype) for x in (q, k, v)]


def by_definition(weighting, window, layers):
    """The logged means, by the dense oracle."""
    contexts, outputs, start = [], [], 0
    for one in BATCH:
        rows = slice(start, start := start + one.num_tokens)
        if not one.branches:
            continue
        mass = [
            reference_attention(*(x[rows] for x in leaves), one, weighting, SCALE, TURN, window)[
                -one.segments[-1].length :
            ]
            for leaves in layers
        ]
        token = torch.stack(mass).mean((0, 2))
        n = len(one.branches)
        contexts += token[:, :n].mean(0).tolist()
        outputs.append(token[:, n].mean().item())
    return [sum(outputs) / len(outputs), sum(contexts) / len(contexts), min(contexts)]


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_shares_are_those_of_the_definition(weighting, window, kernel):
    if weighting == "vanilla" and window:
        pytest.skip("one softmax has no windows")
    layers = [layer(seed) for seed in (0, 1, 2)]
    order, _, packed = pack(BATCH, weighting, window=1)
    shares = Shares(packed)
    for leaves in layers:
        q, k, v = (x[torch.from_numpy(order)] for x in leaves)
        miso_attention(q, k, v, packed, KERNELS[kernel], KernelOptions(SCALE, window=window), TURN, shares)
    means = shares.means()
    assert list(means) == NAMES
    assert list(means.values()) == pytest.approx(by_definition(weighting, window, layers), abs=1e-6)


def test_a_batch_that_mixes_nothing_has_no_shares():
    assert Shares(pack([single(3)], "uniform")[2]).means() == {}


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"share_prefixes": False}])
def test_training_logs_shares(para_dataset, tokenizer, make_config, options):
    """Shares of rows with five contexts each sum to 1, and are the same however the step is computed."""
    rows = para_dataset.filter(lambda row: len(row["constraints"]) == 3)
    logged = []
    for extra in ({}, options):
        config = make_config(eval_contexts="miso", **extra)
        arguments = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
        trainer = MISOSFTTrainer(tiny_model("llama"), config, **arguments)
        trainer.train()
        trainer.evaluate()
        logged.append([entry[name] for entry in trainer.state.log_history for name in NAMES if name in entry])
        evaluated = trainer.state.log_history[-1]
        assert (
            0 < evaluated["eval_min_context_share"] < evaluated["eval_context_share"] < evaluated["eval_output_share"]
        )
        assert evaluated["eval_output_share"] + 5 * evaluated["eval_context_share"] == pytest.approx(1, abs=1e-5)
    assert len(logged[0]) == 6
    assert logged[1] == pytest.approx(logged[0], abs=1e-5)


@pytest.mark.parametrize("options", [{"log_shares": False}, {"context_mode": "single"}])
def test_shares_are_not_logged(para_dataset, tokenizer, make_config, options):
    trainer = MISOSFTTrainer(
        tiny_model("llama"), make_config(**options), train_dataset=para_dataset, processing_class=tokenizer
    )
    trainer.train()
    assert not any(name in entry for entry in trainer.state.log_history for name in NAMES)
