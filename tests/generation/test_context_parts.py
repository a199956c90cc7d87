"""Attention of outputs to the parts of their contexts, against plain dense attention: any trees, ragged parts, all weightings."""

import random

import numpy as np
import pytest
import torch

from trl_miso.attention.kernels import KERNELS, KernelOptions
from trl_miso.attention.rotation import no_rotation, set_rotation
from trl_miso.generation.context_parts import Parts
from trl_miso.generation.decoding import ContextCache
from trl_miso.segments import parallel, unshare
from trl_miso.segments.packed import WEIGHTINGS

H, G, D = 4, 2, 8
SCALE = D**-0.5
# Rounding errors of a long sum of values near 1.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def draw(rng, shared=(0, 0, 3, 40), suffix=(1, 2, 30, 70), n=8, alike=False):
    """Contexts with nested common prefixes; `alike`: all of one length."""
    trunk = [rng.randrange(100) for _ in range(rng.choice(shared))]
    contexts = []
    for i in range(rng.randint(1, n)):
        before = rng.choice(contexts) if contexts and rng.random() < 0.5 else trunk
        kept = before[: max(len(trunk), rng.randint(0, len(before)))]
        contexts.append([*kept, 1000 + i, *(rng.randrange(100) for _ in range(rng.choice(suffix)))])
    if rng.random() < 0.2:
        contexts.append(rng.choice(contexts))  # one context twice
    longest = max(map(len, contexts))
    return [context + [7] * (longest - len(context)) for context in contexts] if alike else contexts


def make(rng, requests=1, where="successive", **options):
    examples = []
    for _ in range(requests):
        contexts = draw(rng, **options)
        weights = np.array([rng.uniform(0.1, 1) for _ in contexts])
        tokens, example = parallel(contexts, 1, (weights / weights.sum()).tolist(), where)
        examples.append(example if rng.random() < 0.8 else unshare(example, [[*tokens, 0]])[0])
    return examples


def rows_of(examples):
    """Packed rows of the segments of each request."""
    at, rows = 0, []
    for example in examples:
        ends = np.cumsum([at, *(segment.length for segment in example.segments[:-1])])
        rows.append([np.arange(a, b) for a, b in zip(ends, ends[1:], strict=False)])
        at = int(ends[-1])
    return rows, at


def dense(q, k, v, causal=False):
    """Attention in float64, (T, H, D), and its log-sum-exp (H, T)."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    if causal:  # the last query sees the last key
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(k) - len(q))
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def drawn(rng, examples, dtype):
    """Keys and values of the packed rows, and of an output."""
    _, total = rows_of(examples)
    packed = [5 * torch.randn(total, G, D).to(dtype), torch.randn(total, G, D).to(dtype)]
    seen = rng.randint(1, 9)
    return packed, [torch.randn(seen, G, D).to(dtype) for _ in range(2)]


def one_token(examples, q_BHD, packed, output, weighting):
    """(B, H, D) attention of one new token per output; all have the keys and values `output`. Offsets turn nothing here."""
    module = torch.nn.Module()
    set_rotation(module, no_rotation)
    cache = ContextCache(examples, weighting, before=0, layers=2, windows=False)
    contexts = torch.zeros(len(packed[0]), H, D, dtype=q_BHD.dtype)
    assert cache.read(module, contexts, *packed, KERNELS["cpu"], KernelOptions(SCALE)) is None
    key, value = (x.transpose(0, 1).expand(len(q_BHD), -1, -1, -1) for x in output)
    return cache.attend(module, q_BHD[:, :, None], key, value)[:, 0].double()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("where", ["successive", "after_longest"])
def test_parts_make_up_branches(weighting, dtype, where):
    """The keys of a branch are those of its path; merged attention to parts is the weighted sum over branches (eqs. 3, 4, 7)."""
    rng = random.Random(f"{weighting}{dtype}{where}")
    for _ in range(40):
        (example,) = examples = make(rng, 1, where)
        parts, q = Parts(examples), torch.randn(rng.choice([1, 3]), H, D).to(dtype)
        packed, output = drawn(rng, examples, dtype)
        got = one_token(examples, q, packed, output, weighting)
        ((*rows,),), keys = rows_of(examples)[0], []
        for branch, view in enumerate(example.branches):
            keys.append(np.concatenate([rows[i] for i in example.path(view.segment)]))
            assert parts.rows[parts.last_keys(10**6)[_span(parts, branch)]].tolist() == keys[-1].tolist()
        expected = _mixture(q, *packed, *output, keys, [b.weight for b in example.branches], weighting)
        torch.testing.assert_close(got, expected, rtol=0, atol=4 * ROUNDING[dtype])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_queries_meet_the_parts_of_their_request(weighting):
    rng = random.Random(7)
    for _ in range(40):
        examples, copies = make(rng, rng.choice([2, 3])), rng.choice([1, 2])
        packed, output = drawn(rng, examples, torch.float64)
        q = torch.randn(len(examples) * copies, H, D, dtype=torch.float64)
        got = one_token(examples, q, packed, output, weighting)
        for request, (example, rows) in enumerate(zip(examples, rows_of(examples)[0], strict=True)):
            outputs = slice(request * copies, (request + 1) * copies)
            keys = [np.concatenate([rows[i] for i in example.path(b.segment)]) for b in example.branches]
            expected = _mixture(q[outputs], *packed, *output, keys, [b.weight for b in example.branches], weighting)
            torch.testing.assert_close(got[outputs], expected, rtol=0, atol=1e-11)


def _span(parts, branch):
    ends = parts.branch_lengths.cumsum()
    return slice(ends[branch] - parts.branch_lengths[branch], ends[branch])


def _mixture(q, k, v, k_out, v_out, keys, weights, weighting):
    if weighting == "vanilla":
        rows = np.concatenate(keys)
        return dense(q, torch.cat([k[rows], k_out]), torch.cat([v[rows], v_out]))[0]
    branches = [dense(q, torch.cat([k[rows], k_out]), torch.cat([v[rows], v_out])) for rows in keys]
    outs, lses = torch.stack([out for out, _ in branches]), torch.stack([lse.T for _, lse in branches])
    shares = (
        lses.softmax(0)
        if weighting == "fid"
        else torch.tensor(weights, dtype=torch.float64)[:, None, None].expand_as(lses)
    )
    return (shares[..., None] * outs).sum(0)


def test_far_apart_scores_neither_overflow_nor_vanish():
    """A context whose scores are hundreds below another context's keeps its weight beside an output with scores as low."""
    _, example = parallel([[1, 2, 3], [1, 4, 5]], 1, [0.5, 0.5], "successive")
    q = torch.ones(1, H, D)
    k = torch.tensor([0.0, 300.0, 300.0, -300.0, -300.0])[:, None, None].expand(5, G, D).contiguous()
    k[0] = -400.0
    v, k_out, v_out = torch.randn(5, G, D), torch.full((2, G, D), -300.0), torch.randn(2, G, D)
    for weighting in WEIGHTINGS:
        got = one_token([example], q, (k, v), (k_out, v_out), weighting)
        expected = _mixture(q, k, v, k_out, v_out, [np.array([0, 1, 2]), np.array([0, 3, 4])], [0.5, 0.5], weighting)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("where", "alike"), [("successive", True), ("after_longest", False), ("successive", False)])
def test_a_common_prefix_is_one_part_where_contexts_end_alike(where, alike):
    rng = random.Random(0)
    for _ in range(30):
        contexts = draw(rng, alike=alike)
        tokens, example = parallel(contexts, 1, [1 / len(contexts)] * len(contexts), where)
        parts = Parts([example])
        if where == "after_longest" or alike:
            assert parts.lengths.sum() == len(tokens) and not parts.offset.any()
        else:
            assert len(tokens) <= parts.lengths.sum() <= sum(map(len, contexts))
            assert parts.lengths.sum() == len({(r, o) for r, o in zip(parts.rows, parts.offset, strict=True)})
        holders = [tuple(parts.branch[parts.part == part]) for part in range(len(parts.lengths))]
        assert len(set(holders)) == len(holders)  # segments that the same branches hold are one part
