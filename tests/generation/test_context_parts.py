"""Attention of outputs to the parts of their contexts, against plain dense attention: any trees, ragged parts, all weightings."""

import random

import numpy as np
import pytest
import torch

from trl_miso.attention.kernels import attend_on_cpu
from trl_miso.generation.context_parts import Parts
from trl_miso.generation.cpu_paths import DenseParts, Reading, padded_batches
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


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("long", [False, True])
def test_reading_is_causal_attention_of_every_segment_to_its_path(dtype, long):
    rng = random.Random(f"{dtype}{long}")
    sizes = {"shared": (0, 255, 257, 700, 1100), "suffix": (1, 200, 300), "n": 4} if long else {}
    for _ in range(10 if long else 60):
        examples = make(rng, rng.choice([1, 1, 2, 3]), **sizes)
        rows, total = rows_of(examples)
        generator = torch.Generator().manual_seed(total)
        q, k, v = (torch.randn(total, heads, D, generator=generator).to(dtype) for heads in (H, G, G))
        out = Reading(examples).attend(q, k, v, SCALE)
        assert out.dtype == dtype
        for example, segments in zip(examples, rows, strict=True):
            for segment, segment_rows in enumerate(segments):
                path = np.concatenate([segments[i] for i in example.path(segment)])
                expected, _ = dense(q[segment_rows], k[path], v[path], causal=True)
                torch.testing.assert_close(out[segment_rows].double(), expected, rtol=0, atol=ROUNDING[dtype])


def drawn(rng, examples, dtype):
    """The parts; keys and values of the packed rows, of all parts, and of an output."""
    _, total = rows_of(examples)
    packed = [5 * torch.randn(total, G, D).to(dtype), torch.randn(total, G, D).to(dtype)]
    parts, seen = Parts(examples), rng.randint(1, 9)
    output = [torch.randn(seen, G, D).to(dtype) for _ in range(2)]
    return parts, packed, [x[torch.from_numpy(parts.rows)] for x in packed], output


def one_token(dense_parts, q, kept, output, weighting):
    """Attention of the outputs of one request, (C, H, D)."""
    grouped = q.unflatten(1, (G, -1)).transpose(0, 1).flatten(1, 2)
    o_out, l_out = attend_on_cpu(grouped[None], *(x.transpose(0, 1)[None] for x in output), SCALE)
    mixed = dense_parts.mix(*dense_parts.attend(grouped[None], kept, SCALE), o_out[0], l_out[0], weighting)
    return mixed.unflatten(1, (len(q), -1)).transpose(0, 1).flatten(1, 2).double()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("where", ["successive", "after_longest"])
def test_parts_make_up_branches(weighting, dtype, where):
    """The keys of a branch are those of its path; merged attention to parts is the weighted sum over branches (eqs. 3, 4, 7)."""
    rng = random.Random(f"{weighting}{dtype}{where}")
    for _ in range(40):
        (example,) = examples = make(rng, 1, where)
        parts, packed, of_parts, output = drawn(rng, examples, dtype)
        dense_parts, q = DenseParts(parts, dtype), torch.randn(rng.choice([1, 3]), H, D).to(dtype)
        got = one_token(dense_parts, q, dense_parts.keep(*of_parts), output, weighting)
        ((*rows,),), keys = rows_of(examples)[0], []
        for branch, view in enumerate(example.branches):
            keys.append(np.concatenate([rows[i] for i in example.path(view.segment)]))
            assert parts.rows[parts.last_keys(10**6)[_span(parts, branch)]].tolist() == keys[-1].tolist()
        expected = _mixture(q, *packed, *output, keys, [b.weight for b in example.branches], weighting)
        torch.testing.assert_close(got, expected, rtol=0, atol=4 * ROUNDING[dtype])


def test_queries_meet_the_parts_of_their_request():
    rng = random.Random(7)
    for _ in range(40):
        examples = make(rng, rng.choice([2, 3]))
        parts, _, (k, v), _ = drawn(rng, examples, torch.float64)
        dense_parts, q = DenseParts(parts, torch.float64), torch.randn(len(examples), 2, H, D, dtype=torch.float64)
        grouped = q.unflatten(2, (G, -1)).transpose(1, 2).flatten(2, 3)
        o, lse = dense_parts.attend(grouped, dense_parts.keep(k, v), SCALE)
        for part, (out, l_part) in enumerate(zip(o[dense_parts.place], lse[dense_parts.place], strict=True)):
            keys = slice(parts.starts[part], parts.starts[part] + parts.lengths[part])
            expected, l_expected = dense(q[parts.request[part]], k[keys], v[keys])
            torch.testing.assert_close(out.unflatten(1, (2, -1)).transpose(0, 1).flatten(1, 2), expected)
            torch.testing.assert_close(l_part.unflatten(1, (2, -1)).transpose(0, 1).flatten(1, 2), l_expected.T)


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
    parts, q = Parts([example]), torch.ones(1, H, D)
    k = torch.tensor([0.0, 300.0, 300.0, -300.0, -300.0])[:, None, None].expand(5, G, D).contiguous()
    k[0] = -400.0
    v, k_out, v_out = torch.randn(5, G, D), torch.full((2, G, D), -300.0), torch.randn(2, G, D)
    dense_parts = DenseParts(parts, torch.float32)
    kept = dense_parts.keep(*(x[torch.from_numpy(parts.rows)] for x in (k, v)))
    for weighting in WEIGHTINGS:
        got = one_token(dense_parts, q, kept, (k_out, v_out), weighting)
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


def test_batches_have_little_padding():
    for lengths in ([180] + [5] * 64, [190] + [1] * 63, [1000, 501, 499, 3, 2], [7] * 30, list(range(300, 0, -1))):
        batches = padded_batches([np.arange(n) for n in lengths])
        assert [n for _, batch_lengths in batches for (n,) in batch_lengths] == lengths
        for index, batch_lengths in batches:
            padding = index.size - batch_lengths.sum()
            assert padding <= 192 or 2 * batch_lengths.min() > index.shape[1]
