"""Segments: prefix tree, positions and offsets, integer code, and the unshared form."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_miso.segments import (
    ROOT,
    Branch,
    Example,
    Output,
    Segment,
    bits_float,
    decode,
    encode,
    float_bits,
    parallel,
    single,
    successive,
    unshare,
)

bounded = settings(max_examples=100, deadline=None, database=None, derandomize=True)

# Few distinct tokens, so that contexts share prefixes, are prefixes of each other, or are equal.
CONTEXTS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=7), min_size=2, max_size=6)
POSITIONS = st.sampled_from(["successive", "after_longest"])
OUTPUT = st.integers(1, 4)
LENGTHS = st.lists(st.integers(1, 5), min_size=2, max_size=5)

# The worked example of the module's docstring.
FULL, SHORT, OTHER = [1, 2, 3, 4], [1, 2, 3], [1, 2, 5]
SEGMENTS = (
    Segment(2, ROOT, 0),
    Segment(1, 0, 2),
    Segment(1, 1, 3),
    Segment(1, 0, 2),
    Segment(2, ROOT, 4),
)


def uniform(contexts):
    return [1 / len(contexts)] * len(contexts)


def bounds(example):
    """[first token, end) of each segment."""
    ends = np.cumsum([0, *(segment.length for segment in example.segments)]).tolist()
    return list(zip(ends, ends[1:], strict=False))


def walk(example, branch, column):
    """(value, position) of each token on the path of a branch, by walking from the last segment to the root."""
    tokens, at = [], branch.segment
    while at != ROOT:
        segment, (first, end) = example.segments[at], bounds(example)[at]
        positions = range(segment.start, segment.start + segment.length)
        tokens = list(zip(column[first:end], positions, strict=True)) + tokens
        at = segment.parent
    return tokens


def distances(example, branch, column):
    """(value, distance from the output's first query) of each token on the path, as rotary attention sees it."""
    query = example.segments[-1].start + branch.offset
    return [(value, query - position) for value, position in walk(example, branch, column)]


@st.composite
def examples(draw):
    kind = draw(st.sampled_from(["single", "parallel", "successive", "unshared"]))
    output = draw(OUTPUT)
    if kind == "single":
        return single(output)
    if kind == "successive":
        return successive(draw(LENGTHS), output)
    contexts = draw(CONTEXTS)
    tokens, example = parallel(contexts, output, uniform(contexts), draw(POSITIONS))
    return unshare(example, [tokens + [0] * output])[0] if kind == "unshared" else example


def test_worked_example():
    tokens, example = parallel([FULL, SHORT, OTHER], 2, uniform([0] * 3), "successive")
    assert tokens == [1, 2, 3, 4, 5]
    assert example.segments == SEGMENTS
    assert example.branches == (Branch(2, 0, 1 / 3), Branch(1, -1, 1 / 3), Branch(3, -1, 1 / 3))
    assert example.num_tokens == 7
    assert [example.path(i) for i in range(5)] == [[0], [0, 1], [0, 1, 2], [0, 3], [4]]
    assert [example.end(i) for i in range(5)] == [2, 3, 4, 3, 6]


def test_worked_example_after_longest():
    tokens, example = parallel([FULL, SHORT, OTHER], 2, [0.5, 0.25, 0.25], "after_longest")
    assert tokens == [1, 2, 3, 4, 5]
    assert example.segments == SEGMENTS
    assert example.branches == (Branch(2, 0, 0.5), Branch(1, 0, 0.25), Branch(3, 0, 0.25))


def test_worked_example_unshared():
    tokens, example = parallel([FULL, SHORT, OTHER], 2, [0.5, 0.25, 0.25], "successive")
    columns = [tokens + [8, 9], [-100] * 6 + [9]]
    separate, (ids, labels) = unshare(example, columns)
    assert separate == Example(
        (Segment(4, ROOT, 0), Segment(3, ROOT, 1), Segment(3, ROOT, 1), Segment(2, ROOT, 4)),
        (Output(3, (Branch(0, 0, 0.5), Branch(1, 0, 0.25), Branch(2, 0, 0.25))),),
    )
    assert ids == [1, 2, 3, 4, 1, 2, 3, 1, 2, 5, 8, 9]
    assert labels == [-100] * 11 + [9]
    assert columns == [[1, 2, 3, 4, 5, 8, 9], [-100] * 6 + [9]]


def test_equal_contexts_end_in_one_segment():
    tokens, example = parallel([[1, 2], [1, 2]], 1, [0.5, 0.5], "successive")
    assert tokens == [1, 2]
    assert example.segments == (Segment(2, ROOT, 0), Segment(1, ROOT, 2))
    assert [branch.segment for branch in example.branches] == [0, 0]


def test_contexts_without_common_prefix_are_roots_in_order():
    tokens, example = parallel([[3, 1], [2], [1, 1, 1]], 2, uniform([0] * 3), "successive")
    assert tokens == [3, 1, 2, 1, 1, 1]
    assert example.segments == (
        Segment(2, ROOT, 0),
        Segment(1, ROOT, 0),
        Segment(3, ROOT, 0),
        Segment(2, ROOT, 3),
    )
    assert [(branch.segment, branch.offset) for branch in example.branches] == [(0, -1), (1, -2), (2, 0)]


def test_crab_shaped_sizes():
    """The token counts of the design: 620 shared, 1,120 in separate contexts."""
    instruction, *constraints = [list(range(60)), *([1000 * i + j for j in range(20)] for i in range(1, 8))]
    contexts = [
        sum(constraints, instruction),
        *(instruction + constraint for constraint in constraints),
        instruction,
    ]
    tokens, example = parallel(contexts, 300, uniform(contexts), "successive")
    assert len(tokens) + 300 == example.num_tokens == 60 + 7 * 20 + 6 * 20 + 300 == 620
    assert unshare(example, [])[0].num_tokens == 1120


def test_single_is_one_segment_without_branches():
    example = single(5)
    assert example == Example((Segment(5, ROOT, 0),), ())
    assert (example.num_tokens, example.path(0), example.end(0)) == (5, [0], 5)


def test_weights_must_be_as_many_as_contexts():
    with pytest.raises(ValueError):
        parallel([[1], [2]], 1, [1.0], "successive")


@bounded
@given(CONTEXTS, OUTPUT, POSITIONS)
def test_each_path_is_its_context_from_position_0(contexts, output, positions):
    before = [list(context) for context in contexts]
    tokens, example = parallel(contexts, output, uniform(contexts), positions)
    assert contexts == before
    for context, branch in zip(contexts, example.branches, strict=True):
        assert walk(example, branch, tokens) == [(token, position) for position, token in enumerate(context)]
        path = example.path(branch.segment)
        assert path == sorted(set(path))


@bounded
@given(CONTEXTS, OUTPUT, POSITIONS)
def test_every_prefix_is_stored_once(contexts, output, positions):
    tokens, example = parallel(contexts, output, uniform(contexts), positions)
    prefixes = {tuple(context[: i + 1]) for context in contexts for i in range(len(context))}
    assert len(tokens) == len(prefixes) == example.num_tokens - output
    assert len(tokens) <= sum(map(len, contexts))


@bounded
@given(CONTEXTS, OUTPUT, POSITIONS)
def test_tree_is_compressed_and_parents_come_first(contexts, output, positions):
    tokens, example = parallel(contexts, output, uniform(contexts), positions)
    inner = example.segments[:-1]
    first = [(segment.parent, tokens[start]) for segment, (start, _) in zip(inner, bounds(example), strict=False)]
    assert len(set(first)) == len(first), "siblings begin with different tokens"
    assert all(segment.length > 0 and segment.parent < i for i, segment in enumerate(inner))
    children = Counter(segment.parent for segment in inner)
    ends = {branch.segment for branch in example.branches}
    assert all(i in ends or children[i] > 1 for i in range(len(inner))), "a run is only split where contexts part"


@bounded
@given(CONTEXTS, OUTPUT, POSITIONS)
def test_output_follows_every_context(contexts, output, positions):
    _, example = parallel(contexts, output, uniform(contexts), positions)
    longest = max(len(context) for context in contexts)
    assert example.segments[-1] == Segment(output, ROOT, longest)
    for context, branch in zip(contexts, example.branches, strict=True):
        follows = len(context) if positions == "successive" else longest
        assert example.segments[-1].start + branch.offset == follows


@bounded
@given(CONTEXTS, OUTPUT, POSITIONS, st.randoms(use_true_random=False))
def test_order_of_contexts_changes_nothing_but_the_order(contexts, output, positions, random):
    weights = [float(i) for i in range(len(contexts))]
    shuffled = random.sample(range(len(contexts)), len(contexts))
    tokens, example = parallel(contexts, output, weights, positions)
    tokens_2, example_2 = parallel([contexts[i] for i in shuffled], output, [weights[i] for i in shuffled], positions)
    assert example_2.num_tokens == example.num_tokens
    for i, branch in zip(shuffled, example_2.branches, strict=True):
        assert branch[1:] == example.branches[i][1:]
        assert walk(example_2, branch, tokens_2) == walk(example, example.branches[i], tokens)


def test_successive_literal():
    assert successive([2, 1, 3], 4) == Example(
        (Segment(2, ROOT, 0), Segment(1, ROOT, 2), Segment(3, ROOT, 3), Segment(4, ROOT, 6)),
        (Output(3, (Branch(0, 0, 1 / 3), Branch(1, 0, 1 / 3), Branch(2, 0, 1 / 3))),),
    )


@bounded
@given(LENGTHS, OUTPUT)
def test_successive_keeps_the_positions_of_the_unsplit_input(lengths, output):
    example = successive(lengths, output)
    positions = [p for segment in example.segments for p in range(segment.start, segment.start + segment.length)]
    assert positions == list(range(sum(lengths) + output))
    assert [segment.length for segment in example.segments] == [*lengths, output]
    assert [walk(example, branch, positions) for branch in example.branches] == [
        [(p, p) for p in range(sum(lengths[:i]), sum(lengths[: i + 1]))] for i in range(len(lengths))
    ]
    assert all(segment.parent == ROOT for segment in example.segments)
    assert all(branch.offset == 0 and branch.weight == 1 / len(lengths) for branch in example.branches)


@bounded
@given(CONTEXTS, OUTPUT)
def test_unshared_contexts_are_copies_that_end_where_the_output_begins(contexts, output):
    tokens, example = parallel(contexts, output, uniform(contexts), "successive")
    answer = [50 + i for i in range(output)]
    labels = list(range(100, 100 + len(tokens) + output))  # distinct: a label must travel with its token
    separate, (ids, moved) = unshare(example, [tokens + answer, labels])
    assert ids == sum(contexts, []) + answer
    assert len(ids) == len(moved) == separate.num_tokens
    label_to_token = dict(zip(labels, tokens + answer, strict=True))
    assert [label_to_token[label] for label in moved] == ids
    assert moved[-output:] == labels[-output:]
    for i, (context, branch) in enumerate(zip(contexts, separate.branches, strict=True)):
        assert separate.segments[i] == Segment(len(context), ROOT, max(map(len, contexts)) - len(context))
        assert separate.end(i) == separate.segments[-1].start
        assert branch == Branch(i, 0, example.branches[i].weight)
    assert unshare(separate, [ids, moved]) == (separate, [ids, moved])


@bounded
@given(examples())
def test_unsharing_keeps_every_branch(example):
    column = list(range(example.num_tokens))
    separate, (copy,) = unshare(example, [column])
    assert len(separate.branches) == len(example.branches)
    for before, after in zip(example.branches, separate.branches, strict=True):
        assert distances(separate, after, copy) == distances(example, before, column)
        assert (after.offset, after.weight) == (0, before.weight)
    assert all(segment.parent == ROOT and segment.start >= 0 for segment in separate.segments)
    assert copy[-separate.segments[-1].length :] == column[-example.segments[-1].length :]


@bounded
@given(st.one_of(OUTPUT.map(single), st.builds(successive, LENGTHS, OUTPUT)))
def test_unsharing_leaves_unshared_examples_alone(example):
    column = list(range(example.num_tokens))
    assert unshare(example, [column]) == (example, [column])


def test_code_literal():
    half = 4602678819172646912
    _, example = parallel([[7, 1], [7]], 2, [0.5, 0.5], "successive")
    code = [3, 2] + [1, -1, 0] + [1, 0, 1] + [2, -1, 2] + [2, 1, 0, half] + [2, 0, -1, half]
    assert encode(example) == code
    assert encode(single(4)) == [1, 0, 4, -1, 0]
    assert list(decode(code + [1, 0, 4, -1, 0])) == [example, single(4)]
    assert list(decode([])) == []


@bounded
@given(st.lists(examples(), max_size=4))
def test_concatenated_codes_decode_to_the_examples(batch):
    code = sum(map(encode, batch), [])
    assert list(decode(code)) == batch
    assert all(type(value) is int for value in code)
    assert np.array(code, dtype=np.int64).tolist() == code, "fits a dataset's int64 column"


@bounded
@given(CONTEXTS, st.data())
def test_weights_survive_the_code_to_the_bit(contexts, data):
    weights = [data.draw(st.floats(allow_nan=False)) for _ in contexts]
    _, example = parallel(contexts, 1, weights, "successive")
    (decoded,) = decode(encode(example))
    assert [branch.weight.hex() for branch in decoded.branches] == [weight.hex() for weight in weights]


@pytest.mark.parametrize(
    "value, bits",
    [(0.0, 0), (0.5, 4602678819172646912), (1.0, 4607182418800017408), (1 / 3, 4599676419421066581), (-0.0, -(2**63))],
)
def test_float_bits(value, bits):
    assert float_bits(value) == bits
    assert bits_float(bits).hex() == value.hex()
