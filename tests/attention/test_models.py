"""A transformers model under MISO attention equals one-row-per-context execution: loss and every parameter's gradient."""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from tests.support.models import architectures, tiny_model
from tests.support.rows_oracle import rows_loss
from trl_miso.attention import register_miso_attention
from trl_miso.attention.support import prepare_model
from trl_miso.data.collator import MISODataCollator
from trl_miso.segments import encode, parallel, successive

CONTEXTS = [
    [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8], [5, 6, 20, 21, 22], [5, 6]],
    [[30, 31, 32], [30, 40, 41, 42, 43, 44]],
    [[50, 51, 52, 53]],
]
OUTPUTS = [[2, 60, 61, 62], [2, 63, 64, 65, 66], [2, 67, 68]]
WEIGHTS = [[0.4, 0.3, 0.2, 0.1], [0.5, 0.5], [1.0]]
REQUIRED = ["llama", "mistral", "qwen3", "gemma3", "phi3"]
OTHERS = [
    "llama3_rope",
    "yarn",
    "mixtral",
    "qwen2",
    "gemma2",
    "phi",
    "glm4",
    "cohere2",
    "smollm3",
    "olmo2",
    "olmo3",
    "gemma4",
    "granite",
    "starcoder2",
    "arcee",
    "cohere",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gpt_neox",
    "granitemoe",
    "olmo",
    "qwen2_moe",
    "qwen3_moe",
    "seed_oss",
]
LATENT = ["deepseek_v2", "deepseek_v3", "axk1", "minicpm3", "youtu", "glm4_moe_lite"]


def _row(contexts, output, weights, output_positions="successive"):
    labels = [-100, *output[1:]]
    if len(contexts) == 1:
        return {"input_ids": contexts[0] + output, "labels": [-100] * len(contexts[0]) + labels}
    tokens, example = parallel(contexts, len(output), weights, output_positions)
    return {"input_ids": tokens + output, "labels": [-100] * len(tokens) + labels, "miso_layout": encode(example)}


def _loss(model, rows, kernel="cpu", weighting="uniform", share=True, window=0):
    """Summed loss of a packed batch under MISO attention."""
    support = prepare_model(model, register_miso_attention("sdpa", kernel), None)
    collator = MISODataCollator(0, weighting, share and support.shares, window or support.window)
    batch = collator(rows)
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1].double(), labels[0, 1:], ignore_index=-100, reduction="sum")


def _gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(model, got, expected, tolerance=1e-5):
    """Loss and gradients agree to `tolerance`; a gradient relative to its largest entry."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    expected_gradients = _gradients(model, expected)
    got_gradients = _gradients(model, got)
    assert got_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(
            got_gradients[name] / scale,
            gradient / scale,
            rtol=0,
            atol=tolerance,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def _oracle(model, weighting="uniform"):
    return sum(
        rows_loss(model, contexts, output, [-100, *output[1:]], weights, weighting)
        for contexts, output, weights in zip(CONTEXTS, OUTPUTS, WEIGHTS, strict=True)
    )


def _rows(**kwargs):
    return [_row(*parts, **kwargs) for parts in zip(CONTEXTS, OUTPUTS, WEIGHTS, strict=True)]


@pytest.mark.parametrize("name", REQUIRED + OTHERS + LATENT)
def test_equals_one_row_per_context(name):
    model = tiny_model(name)
    kernel = "reference" if name == "gemma2" else "cpu"  # softcap
    tolerance = 1e-5 if name in REQUIRED else 5e-5  # sums in another order, in deeper or scaled models
    _assert_same(model, _loss(model, _rows(), kernel), _oracle(model), tolerance)


@pytest.mark.parametrize("weighting", ["fid", "vanilla"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_other_weightings_equal_one_row_per_context(name, weighting):
    model = tiny_model(name)
    _assert_same(model, _loss(model, _rows(), weighting=weighting), _oracle(model, weighting))


@pytest.mark.parametrize(
    ("nope", "rope", "value"), [(16, 8, 12), (16, 8, 24), (8, 8, 32)], ids=["smaller", "equal", "larger"]
)
@pytest.mark.parametrize("weighting", ["uniform", "fid", "vanilla"])
@pytest.mark.parametrize("share", [True, False])
def test_latent_attention_with_values_of_any_size(nope, rope, value, weighting, share):
    model = tiny_model("deepseek_v3", qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value)
    got = _loss(model, _rows(), weighting=weighting, share=share)
    _assert_same(model, got, _oracle(model, weighting), 5e-5)


@pytest.mark.parametrize("rope_interleave", [True, False])
def test_latent_attention_with_both_layouts_of_rotation(rope_interleave):
    model = tiny_model("deepseek_v3", rope_interleave=rope_interleave)
    _assert_same(model, _loss(model, _rows()), _oracle(model), 5e-5)
    assert prepare_model(model, register_miso_attention("sdpa", "cpu"), 512).shares


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("weighting", ["uniform", "fid"])
def test_sharing_on_equals_sharing_off(name, weighting):
    model = tiny_model(name)
    _assert_same(
        model, _loss(model, _rows(), weighting=weighting, share=False), _loss(model, _rows(), weighting=weighting)
    )


@pytest.mark.parametrize("name", REQUIRED)
def test_packed_equals_one_at_a_time(name):
    model = tiny_model(name)
    _assert_same(model, _loss(model, _rows()), sum(_loss(model, [row]) for row in _rows()))


@pytest.mark.parametrize("weighting", ["uniform", "fid"])
@pytest.mark.parametrize("share", [True, False])
def test_binding_window_equals_one_row_per_context(weighting, share):
    model = tiny_model("mistral", sliding_window=4)
    got = _loss(model, _rows(), weighting=weighting, share=share)
    _assert_same(model, got, _oracle(model, weighting))
    assert abs(got - _loss(tiny_model("mistral"), _rows(), weighting=weighting)) > 1e-3, "the window must matter"


@pytest.mark.parametrize("share", [True, False])
def test_output_after_longest_context(share):
    """The layout of PCW: every context starts at position 0, and the output follows the longest."""
    model = tiny_model("llama")
    expected = torch.zeros(())
    for contexts, output, weights in zip(CONTEXTS, OUTPUTS, WEIGHTS, strict=True):
        longest = max(map(len, contexts))
        positions = [[*range(len(c)), *range(longest, longest + len(output))] for c in contexts]
        expected = expected + rows_loss(model, contexts, output, [-100, *output[1:]], weights, positions=positions)
    _assert_same(model, _loss(model, _rows(output_positions="after_longest"), share=share), expected)


def test_successive_chunks_keep_their_positions():
    model = tiny_model("llama")
    tokens, output, lengths = list(range(10, 21)), [2, 60, 61], [4, 4, 3]
    row = {
        "input_ids": tokens + output,
        "labels": [-100] * len(tokens) + [-100, 60, 61],
        "miso_layout": encode(successive(lengths, len(output))),
    }
    starts = [0, 4, 8]
    chunks = [tokens[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    positions = [[*range(s, s + n), *range(11, 14)] for s, n in zip(starts, lengths, strict=True)]
    expected = rows_loss(model, chunks, output, [-100, 60, 61], [1 / 3] * 3, positions=positions)
    _assert_same(model, _loss(model, [row]), expected)


def test_successive_positions_follow_every_context():
    """The loss differs from that of an output placed after the longest context for all contexts, so the rotation has an effect."""
    model = tiny_model("llama")
    difference = _loss(model, _rows()) - _loss(model, _rows(output_positions="after_longest"))
    assert difference.abs() > 1e-2


def _hidden_states(model, rows):
    prepare_model(model, register_miso_attention("sdpa", "cpu"), None)
    batch = MISODataCollator(0)(rows)
    batch.pop("labels")
    return model(**batch, use_cache=False, output_hidden_states=True).hidden_states, batch


def test_perturbing_one_context_changes_no_other():
    model = tiny_model("llama")
    changed = [[*c] for c in CONTEXTS[0]]
    changed[2][-1] = 99  # the end of the third context, a segment of its own
    before, batch = _hidden_states(model, _rows())
    after, changed_batch = _hidden_states(model, [_row(changed, OUTPUTS[0], WEIGHTS[0]), *_rows()[1:]])
    moved = (batch["input_ids"] != changed_batch["input_ids"])[0].nonzero().flatten().tolist()
    assert len(moved) == 1
    start, end = batch["miso_output_start"], batch["miso_output_start"] + len(OUTPUTS[0])
    for x, y in zip(before[1:], after[1:], strict=True):
        differs = (x != y)[0].any(-1).nonzero().flatten().tolist()
        assert set(differs) <= {*moved, *range(start, end)}, (
            "only the context's last token and its own output may change"
        )
    assert (before[-1] != after[-1])[0, start:end].any(-1).all(), "every token of the output sees the context"


def test_permuting_contexts_changes_nothing():
    model = tiny_model("llama")
    order = [2, 0, 3, 1]
    permuted = _row([CONTEXTS[0][i] for i in order], OUTPUTS[0], [WEIGHTS[0][i] for i in order])
    _assert_same(model, _loss(model, [permuted]), _loss(model, [_row(CONTEXTS[0], OUTPUTS[0], WEIGHTS[0])]))


def test_one_context_is_ordinary_attention():
    """A batch without mixing equals the base implementation, one row at a time."""
    model = tiny_model("llama")
    rows = [_row([[5, 6, 7]], [2, 60, 61], [1.0]), _row([[9, 8]], [2, 62], [1.0])]
    got = _loss(model, rows)
    model.set_attn_implementation("sdpa")
    expected = torch.zeros(())
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(ids, use_cache=False).logits[0]
        expected = expected + torch.nn.functional.cross_entropy(
            logits[:-1].double(), labels[1:], ignore_index=-100, reduction="sum"
        )
    _assert_same(model, got, expected)


@pytest.mark.parametrize("name", REQUIRED + OTHERS + LATENT)
def test_every_listed_model_shares_prefixes(name):
    """The models of these tests share prefixes, and do not fall back to a copy per context."""
    support = prepare_model(tiny_model(name), register_miso_attention("sdpa", "auto"), 512)
    assert support.shares and support.relative and not support.reason


def test_the_table_of_models_has_every_architecture():
    """All that this version of transformers has, and nothing else beside what later versions add."""
    table = (Path(__file__).parents[2] / "benchmarks" / "results" / "MODELS.md").read_text()
    assert "`python -m benchmarks.supported_models`" in table
    installed, listed = Version(transformers.__version__), []
    for line in table.splitlines():
        if line.startswith("| ") and not line.startswith(("| model type", "| ---")):
            _, name, since, *_ = (cell.strip() for cell in line.split("|"))
            if Version(since) <= installed:
                listed.append(name)
    assert sorted(listed) == architectures()
