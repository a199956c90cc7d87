"""Packing: bins of whole examples, and the metadata of a packed row against the tree's definition, by brute force."""

import random
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.answers import answers
from trl_miso.data.bins import plan_bins
from trl_miso.segments import (
    ROOT,
    Branch,
    Example,
    Output,
    Segment,
    bits_float,
    float_bits,
    lay_out,
    parallel,
    single,
    successive,
    unshare,
)
from trl_miso.segments.packed import PREFIX, WEIGHTINGS, PackedSegments, Varlen, pack

bounded = settings(max_examples=100, deadline=None, database=None, derandomize=True)

CONTEXTS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=2, max_size=5)
SIZES = st.lists(st.integers(1, 20), max_size=25)


def naive_best_fit_decreasing(sizes, capacity):
    bins = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = [b for b in bins if sum(sizes[i] for i in b) + sizes[index] <= capacity]
        if not fitting:
            bins.append([index])
        else:
            max(fitting, key=lambda b: sum(sizes[i] for i in b)).append(index)  # the first of the fullest
    return bins


def first_fit(sizes, capacity):
    loads = []
    for size in sizes:
        at = next((i for i, load in enumerate(loads) if load + size <= capacity), None)
        if at is None:
            loads.append(size)
        else:
            loads[at] += size
    return len(loads)


def test_bins_literal():
    assert plan_bins([3, 9, 5, 4, 7, 12, 2], 10) == [[5], [1], [4, 0], [2, 3], [6]]
    assert plan_bins([], 10) == []
    assert plan_bins([10, 10], 10) == [[0], [1]]
    assert plan_bins([6, 5, 3], 10) == [[0, 2], [1]], "the bin that 3 fills best, not the emptiest"
    assert plan_bins([2, 2, 2, 2], 4) == [[0, 1], [2, 3]]


@bounded
@given(SIZES, st.integers(10, 30))
def test_bins_hold_every_example_once_within_capacity(sizes, capacity):
    bins = plan_bins(sizes, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    for members in bins:
        assert members
        assert sum(sizes[i] for i in members) <= capacity or len(members) == 1


@bounded
@given(SIZES, st.integers(10, 30))
def test_bins_are_best_fit_decreasing(sizes, capacity):
    bins = plan_bins(sizes, capacity)
    assert bins == naive_best_fit_decreasing(sizes, capacity)
    loads = sorted(sum(sizes[i] for i in members) for members in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity, "no two bins could be one"


@pytest.mark.parametrize("seed", range(5))
def test_fewer_bins_than_first_fit(seed):
    """On random lengths; not a theorem (4 3 3 4 3 3 in bins of 10 needs 3 bins in decreasing order, not 2)."""
    lengths = random.Random(seed)
    sizes = [min(1 + int(lengths.lognormvariate(5.5, 0.8)), 2048) for _ in range(500)]
    bins = len(plan_bins(sizes, 2048))
    assert -(-sum(sizes) // 2048) <= bins <= first_fit(sizes, 2048)


@st.composite
def examples(draw, kinds=("single", "parallel", "successive", "unshared", "answers")):
    kind = draw(st.sampled_from(kinds))
    if kind == "answers":
        return lay_out(draw(answers(most=3)))[2]
    output = draw(st.integers(1, 4))
    if kind == "single":
        return single(output)
    if kind == "successive":
        return successive(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)), output)
    contexts = draw(CONTEXTS)
    weights = [(i + 1) / sum(range(len(contexts) + 1)) for i in range(len(contexts))]
    _, example = parallel(contexts, output, weights, draw(st.sampled_from(["successive", "after_longest"])))
    return unshare(example, [])[0] if kind == "unshared" else example


BATCHES = st.lists(examples(), min_size=1, max_size=4)
MIXED_BATCHES = st.lists(examples(), max_size=3).flatmap(
    lambda rest: examples(("parallel", "successive", "unshared")).flatmap(lambda one: st.permutations([one, *rest]))
)


def concatenation(batch):
    """Tokens of the input of `pack`: (example, segment, position) of each, in order."""
    return [
        (e, s, segment.start + i)
        for e, example in enumerate(batch)
        for s, segment in enumerate(example.segments)
        for i in range(segment.length)
    ]


def tokens_of(batch, e, segments):
    """Indices in the concatenation of the tokens of these segments, segment by segment."""
    tokens = concatenation(batch)
    return [t for s in segments for t in range(len(tokens)) if tokens[t][:2] == (e, s)]


def ancestors(example, s):
    path = [s]
    while example.segments[path[0]].parent != ROOT:
        path.insert(0, example.segments[path[0]].parent)
    return path


def branches(batch):
    """(example, branch, tokens of the path, tokens of the output) of every branch, in order."""
    return [
        (
            e,
            branch,
            tokens_of(batch, e, ancestors(example, branch.segment)),
            tokens_of(batch, e, [output.segment]),
        )
        for e, example in enumerate(batch)
        for output in example.outputs
        for branch in output.branches
    ]


def sequences(call: Varlen):
    """(query slots, key rows) of every sequence of a call. Without a gather, key slot j is row j."""
    q, k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    rows = list(range(k[-1])) if call.kv_index is None else call.kv_index.tolist()
    assert q[0] == k[0] == 0 and len(q) == len(k) and len(rows) == k[-1]
    assert call.max_seqlen_q == max(b - a for a, b in zip(q, q[1:], strict=False))
    assert call.max_seqlen_k == max(b - a for a, b in zip(k, k[1:], strict=False))
    assert call.cu_seqlens_q.dtype == call.cu_seqlens_k.dtype == torch.int32
    spans = zip(zip(q, q[1:], strict=False), zip(k, k[1:], strict=False), strict=True)
    return [(range(*span_q), rows[slice(*span_k)]) for span_q, span_k in spans]


def causal(queries, keys):
    """Keys that each query of a causal call sees, the last query aligned with the last key."""
    return [keys[: len(keys) - len(queries) + 1 + i] for i in range(len(queries))]


@bounded
@given(BATCHES)
def test_order_is_a_permutation_with_the_positions_of_its_tokens(batch):
    order, position_ids, packed = pack(batch, "uniform")
    tokens = concatenation(batch)
    assert sorted(order.tolist()) == list(range(len(tokens)))
    assert position_ids.tolist() == [tokens[t][2] for t in order]
    assert order.dtype == position_ids.dtype == np.int64
    assert packed.num_examples == len(batch)
    assert packed.num_mixed == sum(len(example.branches) > 0 for example in batch)
    assert packed.num_outputs == sum(len(example.outputs) for example in batch)


@bounded
@given(BATCHES)
def test_rows_are_contexts_then_outputs_then_other_segments(batch):
    order, _, packed = pack(batch, "uniform")
    tokens = concatenation(batch)

    def part(t):
        e, s, _ = tokens[t]
        if any(s in ancestors(batch[e], branch.segment) for branch in batch[e].branches):
            return 0
        return 1 if s in [output.segment for output in batch[e].outputs] else 2

    parts = [part(t) for t in order]
    assert parts == sorted(parts)
    for which in range(3):
        assert [t for t in order if part(t) == which] == [t for t in range(len(tokens)) if part(t) == which]
    outputs = [row for row, which in enumerate(parts) if which == 1]
    assert list(range(packed.output_start, packed.output_end)) == outputs


@bounded
@given(BATCHES)
def test_self_call_sees_ancestors_and_itself_causally(batch):
    order, _, packed = pack(batch, "uniform")
    tokens = concatenation(batch)
    seen = {}
    for queries, keys in sequences(packed.self_call):
        for query, visible in zip(queries, causal(queries, keys), strict=True):
            assert len(set(visible)) == len(visible)
            seen[order[query]] = {order[key] for key in visible}
    expected = {}
    for t, (e, s, _) in enumerate(tokens):
        above = ancestors(batch[e], s)[:-1]
        expected[t] = {u for u, (f, r, _) in enumerate(tokens) if f == e and (r in above or (r == s and u <= t))}
    assert seen == expected


@bounded
@given(BATCHES)
def test_self_call_has_one_sequence_a_segment_and_gathers_only_shared_prefixes(batch):
    order, _, packed = pack(batch, "uniform")
    tokens = concatenation(batch)
    for queries, _ in sequences(packed.self_call):
        (owner,) = {tokens[order[query]][:2] for query in queries}
        assert len(queries) == batch[owner[0]].segments[owner[1]].length
    shared = any(segment.parent != ROOT for example in batch for segment in example.segments)
    assert (packed.kv_index is not None) == shared


@bounded
@given(MIXED_BATCHES)
def test_cross_call_sees_the_path_of_each_branch(batch):
    order, _, packed = pack(batch, "uniform")
    calls = sequences(packed.cross_call)
    for (_, _, path, output), (queries, keys) in zip(branches(batch), calls, strict=True):
        rows = packed.branch_q_index.numpy()[list(queries)] + packed.output_start
        assert order[rows].tolist() == output
        assert order[keys].tolist() == path, "in the order of positions"
    assert packed.branch_q_index.min() == 0
    assert packed.branch_q_index.max() == packed.output_end - packed.output_start - 1
    leading = [key for _, keys in calls for key in keys] == list(range(packed.output_start))
    assert (packed.branch_kv_index is None) == leading


@bounded
@given(MIXED_BATCHES)
def test_pairs_call_sees_the_path_then_the_output_causally(batch):
    order, _, packed = pack(batch, "uniform", window=1)
    at, offsets = 0, packed.pair_kv_offset
    for (_, branch, path, output), (queries, keys) in zip(branches(batch), sequences(packed.pairs_call), strict=True):
        rows = packed.branch_q_index.numpy()[list(queries)] + packed.output_start
        assert order[rows].tolist() == output
        for i, visible in enumerate(causal(queries, keys)):
            assert order[visible].tolist() == path + output[: i + 1]
        got = [0] * len(keys) if offsets is None else offsets[at : at + len(keys)].tolist()
        assert got == [-branch.offset] * len(path) + [0] * len(output)
        at += len(keys)
    assert offsets is None or len(offsets) == at
    assert (offsets is None) == (packed.branch_kv_offset is None)


@bounded
@given(MIXED_BATCHES)
def test_pairs_fields_are_only_made_on_request(batch):
    _, _, without = pack(batch, "uniform")
    _, _, with_pairs = pack(batch, "uniform", window=1)
    for field in fields(PackedSegments):
        value, twin = getattr(without, field.name), getattr(with_pairs, field.name)
        if field.name.startswith("pair_"):
            assert value in (None, 0) and (twin is not None or field.name == "pair_kv_offset")
        else:
            assert torch.equal(value, twin) if isinstance(value, torch.Tensor) else value == twin


@bounded
@given(MIXED_BATCHES)
def test_key_offsets_and_weights_of_each_branch(batch):
    _, _, packed = pack(batch, "uniform")
    count = int(packed.branch_cu_seqlens_k[-1])
    offsets = [0] * count if packed.branch_kv_offset is None else packed.branch_kv_offset.tolist()
    weights = [bits_float(bits) for bits in packed.branch_weight.tolist()]
    assert len(offsets) == count and len(weights) == len(packed.branch_q_index)
    assert (packed.branch_kv_offset is None) == (not any(offsets)), "an absent offset is 0, a present one needed"
    at = packed.branch_cu_seqlens_k.tolist()
    for i, ((_, branch, _, _), (queries, _)) in enumerate(
        zip(branches(batch), sequences(packed.cross_call), strict=True)
    ):
        assert set(offsets[at[i] : at[i + 1]]) == {-branch.offset}
        assert {weights[query].hex() for query in queries} == {branch.weight.hex()}


@bounded
@given(CONTEXTS, st.integers(1, 4), st.lists(examples(), max_size=2))
def test_successive_output_continues_every_context(contexts, output, rest):
    _, example = parallel(contexts, output, [1 / len(contexts)] * len(contexts), "successive")
    _, position_ids, packed = pack([example, *rest], "uniform", window=1)
    offsets = torch.zeros(packed.pair_kv_index.shape, dtype=torch.int64)
    offsets = offsets if packed.pair_kv_offset is None else packed.pair_kv_offset
    turned = position_ids[packed.pair_kv_index] + offsets.numpy()
    at = 0
    for context in contexts:
        size = len(context) + output
        longest = max(map(len, contexts))
        assert turned[at : at + size].tolist() == list(range(longest - len(context), longest + output))
        at += size


@bounded
@given(BATCHES)
def test_longest_path_and_gap(batch):
    _, _, packed = pack(batch, "uniform")
    assert packed.longest == max(example.longest for example in batch)
    tokens = concatenation(batch)
    jumps = [tokens[output[0]][2] + branch.offset - tokens[path[-1]][2] for _, branch, path, output in branches(batch)]
    assert packed.gap == int(any(jump != 1 for jump in jumps))


@bounded
@given(st.lists(examples(("single",)), min_size=1, max_size=4))
def test_single_runs_cost_nothing(batch):
    order, position_ids, packed = pack(batch, "uniform", window=1)
    lengths = [example.num_tokens for example in batch]
    assert order.tolist() == list(range(sum(lengths)))
    assert position_ids.tolist() == [i for length in lengths for i in range(length)]
    assert torch.equal(packed.cu_seqlens_q, packed.cu_seqlens_k)
    assert [f.name for f in fields(packed) if getattr(packed, f.name) is None] == [
        "kv_index",
        "branch_cu_seqlens_q",
        "branch_cu_seqlens_k",
        "branch_q_index",
        "branch_weight",
        "branch_kv_index",
        "branch_kv_offset",
        "pair_cu_seqlens_k",
        "pair_kv_index",
        "pair_kv_offset",
    ]
    assert packed.num_mixed == packed.output_start == packed.output_end == packed.gap == 0


@bounded
@given(MIXED_BATCHES, st.sampled_from(WEIGHTINGS), st.booleans())
def test_batch_keys_are_integers_and_round_trip(batch, weighting, pairs):
    _, _, packed = pack(batch, weighting, pairs)
    keys = packed.to_batch()
    assert WEIGHTINGS[keys["miso_weighting"]] == weighting
    assert all(key.startswith(PREFIX) and value is not None for key, value in keys.items())
    for value in keys.values():
        if isinstance(value, torch.Tensor):
            assert value.dtype in (torch.int32, torch.int64) and value.dim() == 1 and value.is_contiguous()
        else:
            assert type(value) is int
    back = PackedSegments.from_batch(keys | {"input_ids": torch.zeros(1), "cu_seqlens_q": None})
    for field in fields(PackedSegments):
        value, other = getattr(packed, field.name), getattr(back, field.name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_no_metadata():
    assert PackedSegments.from_batch({"input_ids": torch.zeros(1, 2), "position_ids": torch.zeros(1, 2)}) is None


def test_unshared_batches_gather_nothing():
    """Separate contexts are the leading rows in branch order, whatever is between them in the batch."""
    _, shared = parallel([[1, 2, 3], [1, 4]], 2, [0.5, 0.5], "successive")
    separate, _ = unshare(shared, [])
    _, _, packed = pack([separate, single(3), successive([2, 1], 1), separate], "uniform")
    assert packed.kv_index is packed.branch_kv_index is packed.branch_kv_offset is None
    assert packed.output_start == 5 + 3 + 5


def test_branches_out_of_order_gather_their_contexts():
    example = Example(
        (Segment(2, ROOT, 0), Segment(1, ROOT, 1), Segment(1, ROOT, 2)),
        (Output(2, (Branch(1, 0, 0.5), Branch(0, 0, 0.5))),),
    )
    _, _, packed = pack([example], "uniform")
    assert packed.branch_kv_index.tolist() == [2, 0, 1]


def test_worked_example_with_a_single_run():
    """The worked example of `segments/tree.py` after a single run of 2 tokens: the run moves behind the output."""
    _, example = parallel([[1, 2, 3, 4], [1, 2, 3], [1, 2, 5]], 2, [0.5, 0.25, 0.25], "successive")
    order, position_ids, packed = pack([single(2), example], "fid", window=1)
    assert order.tolist() == [2, 3, 4, 5, 6, 7, 8, 0, 1]
    assert position_ids.tolist() == [0, 1, 2, 3, 2, 4, 5, 0, 1]
    bits = [float_bits(weight) for weight in (0.5, 0.5, 0.25, 0.25, 0.25, 0.25)]
    expected = {
        "miso_cu_seqlens_q": [0, 2, 3, 4, 5, 7, 9],
        "miso_cu_seqlens_k": [0, 2, 5, 9, 12, 14, 16],
        "miso_max_seqlen_q": 2,
        "miso_max_seqlen_k": 4,
        "miso_num_examples": 2,
        "miso_num_mixed": 1,
        "miso_num_outputs": 1,
        "miso_weighting": 1,
        "miso_longest": 6,
        "miso_gap": 0,
        "miso_kv_index": [0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8],
        "miso_output_start": 5,
        "miso_output_end": 7,
        "miso_branch_cu_seqlens_q": [0, 2, 4, 6],
        "miso_branch_cu_seqlens_k": [0, 4, 7, 10],
        "miso_branch_max_seqlen_q": 2,
        "miso_branch_max_seqlen_k": 4,
        "miso_branch_q_index": [0, 1, 0, 1, 0, 1],
        "miso_branch_weight": bits,
        "miso_branch_kv_index": [0, 1, 2, 3, 0, 1, 2, 0, 1, 4],
        "miso_branch_kv_offset": [0, 0, 0, 0, 1, 1, 1, 1, 1, 1],
        "miso_pair_cu_seqlens_k": [0, 6, 11, 16],
        "miso_pair_max_seqlen_k": 6,
        "miso_pair_kv_index": [0, 1, 2, 3, 5, 6, 0, 1, 2, 5, 6, 0, 1, 4, 5, 6],
        "miso_pair_kv_offset": [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0],
    }
    got = packed.to_batch()
    assert {key: value.tolist() if torch.is_tensor(value) else value for key, value in got.items()} == expected
