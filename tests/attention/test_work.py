"""Work of a step, counted: unique tokens, kernel calls per layer and score pairs. A guard against slowness without a clock.

The example has the paper's shape: a base instruction of 60 tokens, 7 constraints of 20, an answer of 300; contexts are the
full instruction, each constraint alone and the bare request. Plain SFT processes 500 tokens of it, one row per context 3,520,
separate contexts 1,120, shared prefixes 620.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.models import tiny_model
from trl_miso.attention import register_miso_attention
from trl_miso.attention.kernels import KERNELS, Cpu, KernelOptions
from trl_miso.attention.mixture import miso_attention
from trl_miso.attention.support import prepare_model
from trl_miso.data.collator import MISODataCollator
from trl_miso.segments import encode, parallel, successive
from trl_miso.segments.packed import PackedSegments

BASE, CONSTRAINT, ANSWER, N = 60, 20, 300, 9
CONSTRAINTS = [[60 + i] * CONSTRAINT for i in range(N - 2)]
BARE = list(range(3, 3 + BASE))
CONTEXTS = [BARE + sum(CONSTRAINTS, []), *(BARE + c for c in CONSTRAINTS), BARE]


def row(tokens, example, answer=ANSWER):
    labels = [-100] * (len(tokens) + 1) + [5] * (answer - 1)
    return {"input_ids": list(tokens) + [5] * answer, "labels": labels, "miso_layout": encode(example)}


def para():
    return row(*parallel(CONTEXTS, ANSWER, [1 / N] * N, "successive"))


def plain():
    return {"input_ids": CONTEXTS[0] + [5] * ANSWER, "labels": [-100] * (BASE + 7 * CONSTRAINT) + [5] * ANSWER}


def succ(length, chunks):
    return row([9] * length, successive([length // chunks] * chunks, ANSWER))


def causal(queries, before=0):
    """Score pairs of a run of queries that see each other causally, and all keys before them."""
    return queries * before + queries * (queries + 1) // 2


# Score pairs of one example: segments of the tree (base, first constraint, rest of the full context, 6 other constraints), output.
FIRST, REST = causal(CONSTRAINT, BASE), causal(6 * CONSTRAINT, BASE + CONSTRAINT)
PARA = causal(BASE) + FIRST + REST + 6 * FIRST + causal(ANSWER) + ANSWER * sum(map(len, CONTEXTS))
SEPARATE = sum(causal(len(context)) for context in CONTEXTS) + causal(ANSWER) + ANSWER * sum(map(len, CONTEXTS))
CASES = {
    "plain": ([plain()] * 2, {}, 500, causal(500), 1),
    "para": ([para()] * 2, {}, 620, PARA, 2),
    "para unshared": ([para()] * 2, {"share_prefixes": False}, 1120, SEPARATE, 2),
    "succ": ([succ(1200, 4)] * 2, {}, 1500, 4 * causal(300) + ANSWER * 1200 + causal(ANSWER), 2),
    "mixed with plain": ([para(), plain()], {}, 560, (PARA + causal(500)) // 2, 2),
}


@pytest.fixture
def counted(monkeypatch):
    """Counts of kernel calls and their score pairs, forward and backward."""
    counts = Counter()

    def count(name):
        original = getattr(Cpu, name)

        def counting(self, *args):
            *_, call, options = args
            counts[name] += 1
            counts[f"{name} pairs"] += call.score_pairs(options.causal)
            return original(self, *args)

        monkeypatch.setattr(Cpu, name, counting)

    count("forward")
    count("backward")
    return counts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_tokens_calls_and_score_pairs(case, recomputed, counted):
    rows, options, tokens, pairs, calls = CASES[case]
    model = tiny_model("llama")
    prepare_model(model, register_miso_attention("sdpa", "cpu"), None)
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    counted.clear()
    batch = MISODataCollator(0, **options)(rows)
    assert batch["input_ids"].shape == (1, 2 * tokens)
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
    layers = model.config.num_hidden_layers
    forwards = layers * (2 if recomputed else 1)
    assert counted == {
        "forward": calls * forwards,
        "forward pairs": 2 * pairs * forwards,
        "backward": calls * layers,
        "backward pairs": 2 * pairs * layers,
    }


def test_n_contexts_cost_little_more_than_one():
    """Figures of the design: tokens, and the compute of attention in score pairs."""
    example = parallel(CONTEXTS, ANSWER, [1 / N] * N, "successive")[1]
    assert (example.num_tokens, example.num_unshared_tokens) == (620, 1120)
    assert sum(len(context) + ANSWER for context in CONTEXTS) == 3520
    assert PARA / causal(500) < 2.6 and sum(causal(len(context) + ANSWER) for context in CONTEXTS) / 2 > PARA


def test_gathers_only_where_prefixes_are_shared():
    for rows, share in (([succ(1200, 4), succ(900, 3)], True), ([para(), para()], False), ([plain()], True)):
        batch = MISODataCollator(0, share_prefixes=share)(rows)
        assert not [name for name in batch if name.endswith(("kv_index", "kv_offset"))]


class _Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("weighting", ["uniform", "fid", "vanilla"])
def test_no_mask_no_scores_no_copies_of_the_output(weighting):
    """The largest tensors of the operator, forward and backward, are the output's rows once per branch."""
    heads, groups, dim = 4, 2, 16
    batch = MISODataCollator(0, weighting, share_prefixes=True)([para()] * 3)
    packed = PackedSegments.from_batch(batch)
    assert packed.branch_cu_seqlens_k[-1] == 3 * sum(map(len, CONTEXTS)), "no output among the keys of contexts"
    leaves = [torch.randn(batch["input_ids"].shape[1], h, dim, requires_grad=True) for h in (heads, groups, groups)]
    with _Largest() as largest:
        out = miso_attention(
            *leaves, packed, KERNELS["cpu"], KernelOptions(dim**-0.5), lambda x, offset, limit, inverse=False: x + 0
        )
        out.sum().backward()
    assert largest.elements == 3 * N * ANSWER * heads * dim
    assert largest.elements < (3 * 620) ** 2 / 4, "the test could not see a mask otherwise"
