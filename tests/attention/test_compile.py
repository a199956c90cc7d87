"""torch.compile: a layer stays in one graph, batches of other sizes fit it, and it computes what the eager layer does."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch._dynamo.utils import counters

from tests.support.models import tiny_model
from trl_miso.attention import register_miso_attention
from trl_miso.attention.merge import sum_by_row
from trl_miso.attention.shares import Shares
from trl_miso.attention.support import prepare_model
from trl_miso.data.collator import MISODataCollator
from trl_miso.segments import encode, parallel, successive
from trl_miso.segments.packed import PackedSegments


def row(tokens, example, output):
    labels = [-100] * (len(tokens) + 1) + [5] * (output - 1)
    return {"input_ids": list(tokens) + [5] * output, "labels": labels, "miso_layout": encode(example)}


def para(n, prefix, output):
    contexts = [list(range(3, 3 + prefix)) + [60 + i] * (2 + i) for i in range(n)]
    return row(*parallel(contexts, output, [1 / n] * n, "successive"), output)


def succ(chunks, output):
    return row([9] * sum(chunks), successive(chunks, output), output)


def plain(length):
    return {"input_ids": list(range(3, 3 + length)), "labels": list(range(3, 3 + length))}


# Per case: model, weighting, checkpointing, and batches that differ in every size. Batches of one case share a graph.
CASES = {
    "para": (
        "llama",
        "uniform",
        False,
        [[para(3, 6, 9), para(4, 5, 7)], [para(5, 7, 11), para(2, 4, 5), para(3, 3, 4)]],
    ),
    "para, recomputed": ("llama", "uniform", True, [[para(3, 6, 9)], [para(5, 7, 11), para(2, 4, 5)]]),
    "succ, fid, recomputed": ("llama", "fid", True, [[succ([6, 5], 9), plain(7)], [succ([3, 4, 8], 5), plain(5)]]),
    "para, window": ("gemma2", "fid", False, [[para(3, 6, 9)], [para(5, 7, 11), para(2, 4, 5)]]),
    "single": ("llama", "uniform", False, [[plain(7), plain(4)], [plain(5), plain(9), plain(3)]]),
}


def results(model, module, batch):
    """Loss, the gradient of every parameter, and the shares; `module` is `model` or the model compiled."""
    batch = dict(batch)
    labels = batch.pop("labels")
    shares = Shares(PackedSegments.from_batch(batch))
    if "miso_branch_q_index" in batch:
        batch["miso_shares"] = shares
    logits = module(**batch, use_cache=False).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))], shares.means()


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_model_is_one_graph_and_equals_the_eager_one(case):
    """No break, one graph for the first batch and one for all other sizes; losses, gradients and shares are equal."""
    name, weighting, recomputed, batches = CASES[case]
    torch.compiler.reset()
    counters.clear()
    options = {"sliding_window": 8, "layer_types": ["sliding_attention"]} if name == "gemma2" else {}
    model = tiny_model(name, num_hidden_layers=1, **options)
    support = prepare_model(model, register_miso_attention(), None)
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager")
    collator = MISODataCollator(0, weighting, window=support.window)
    for rows in batches:
        batch = collator(rows)
        (got, got_shares), (expected, shares) = results(model, compiled, batch), results(model, model, batch)
        for a, b in zip(got, expected, strict=True):
            # Sums in another order: float32 has 24 bits, and the sums of a tiny model some hundred terms.
            assert (a - b).norm() <= 2**-24 * 100 * b.norm()
        assert got_shares == pytest.approx(shares, abs=1e-6)
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    assert counters["frames"]["ok"] == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_operators_keep_the_contract_of_operators(dtype):
    """Schemas, fake results and tracing with changing sizes, by torch's own checks."""
    starts, key_starts = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    q, k, v = torch.randn(5, 4, 8, dtype=dtype), torch.randn(9, 2, 8, dtype=dtype), torch.randn(9, 2, 8, dtype=dtype)
    call = (starts, key_starts, 3, 5, "cpu", 0.3, True, 0, 0.0)
    torch.library.opcheck(torch.ops.trl_miso.attend.default, (q, k, v, *call))
    out, lse = torch.ops.trl_miso.attend(q, k, v, *call)
    torch.library.opcheck(torch.ops.trl_miso.attend_backward.default, (torch.randn_like(out), q, k, v, out, lse, *call))


@pytest.mark.parametrize("heads", [2, 8, 16])
def test_sums_over_rows_compiled_by_inductor(heads):
    """In a process of its own: Inductor's own code for the sum of 8 heads writes beyond its end, which may abort the process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(compare_sums_over_rows, heads).result()


def compare_sums_over_rows(heads):
    """As a layer computes and logs shares, on two threads."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    row_N = torch.randint(0, 43, (95,), generator=generator)
    tensors = [torch.randn(*sizes, generator=generator) for sizes in ((heads, 95), (heads, 90), (95, heads, 16))]

    def merge(lse_HN, lse_HT, out_NHD, row_N):
        share_NH = torch.sigmoid(lse_HN.T - lse_HT.T[47:][row_N])
        return 1 - sum_by_row(share_NH, row_N, 43), share_NH.mean(1), share_NH[..., None] * out_NHD

    got = torch.compile(merge, backend="inductor")(*tensors, row_N)
    torch.testing.assert_close(got, merge(*tensors, row_N), rtol=1e-5, atol=1e-5)
