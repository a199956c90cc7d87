"""Segments and branches: every example, in every mode, is one small prefix tree.

- A **segment** is a contiguous token run with a start position and at most one parent segment. Its tokens see all tokens of
  their ancestors, and each other causally.
- A **branch** is the output's view of one context: the path root..segment, a query offset (see below) and a weight.
- The **output** is the last segment. With two or more branches it has no parent and mixes over the branches. An example with
  a single context has no branch: it is one ordinary causal run, exactly as in plain SFT.

Worked example. Contexts `[1 2 3 4]` (full), `[1 2 3]`, `[1 2 5]` and output `[8 9]`, prefixes shared, `successive`:

    segment  tokens  parent  start        branch  segment  path tokens  length  offset  weight
    0        1 2     -       0            0       2        1 2 3 4      4        0      1/3
    1        3       0       2            1       1        1 2 3        3       -1      1/3
    2        4       1       3            2       3        1 2 5        3       -1      1/3
    3        5       0       2
    4        8 9     -       4  (output, at P = the longest context)

In branch i the output must be successive to context i (paper, section 4.1): its token t stands at position `len_i + t`, but
is stored at `P + t`. Rotary attention depends on position differences only, so it is enough to turn the query by the *offset*
`len_i - P`. Attention turns the context's keys by minus the offset instead, since contexts have fewer rows and heads.
Without sharing, the same example is three root segments, right-aligned to end at P, with all offsets 0.

A batch of several examples is laid out as `[all contexts | all outputs | all single runs]`, so that the mixing outputs are
one slice (`packed.py`). No label crosses a segment boundary: the first token of each segment is never labelled.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

ROOT = -1


class Segment(NamedTuple):
    """A run of `length` tokens at positions `start, start + 1, ...` below segment `parent` (`ROOT` for none)."""

    length: int
    parent: int
    start: int


class Branch(NamedTuple):
    """The output's view of the context that ends with `segment`; `offset` in positions, `weight` in [0, 1]."""

    segment: int
    offset: int
    weight: float


class Example(NamedTuple):
    """Segments in token order, the output last; `branches` is empty for a single causal run."""

    segments: tuple[Segment, ...]
    branches: tuple[Branch, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def num_unshared_tokens(self) -> int:
        """Number of tokens if every context had its own copy of its path; `num_tokens` for a single causal run."""
        if not self.branches:
            return self.num_tokens
        count = self.segments[-1].length
        for branch in self.branches:
            count += sum(self.segments[i].length for i in self.path(branch.segment))
        return count

    def path(self, index: int) -> list[int]:
        """Segment indices from the root to `index`."""
        path = [index]
        while (parent := self.segments[path[-1]].parent) != ROOT:
            path.append(parent)
        return path[::-1]

    def end(self, index: int) -> int:
        """Position after the last token of a segment."""
        return self.segments[index].start + self.segments[index].length


def single(length: int) -> Example:
    """One causal run of `length` tokens: plain SFT."""
    return Example((Segment(length, ROOT, 0),))


def parallel(
    contexts: Sequence[Sequence[int]], output_length: int, weights: Sequence[float], output_positions: str
) -> tuple[list[int], Example]:
    """Lay out contexts that each start at position 0, with common prefixes stored once (MISO-para; paper, section 4.1).

    Args:
        contexts: Token ids of n >= 2 contexts, none empty.
        output_length: Tokens of the output.
        weights: n weights that sum to 1.
        output_positions: `"successive"`: the output follows every context (offset `len_i - P`). `"after_longest"`: the
            output stands at P, the length of the longest context, for all contexts (offset 0).

    Returns:
        The context tokens in segment order, and the example. Its output segment comes after these tokens.
    """
    tokens, segments, leaves = _prefix_tree(contexts)
    longest = max(map(len, contexts))
    branches = []
    for leaf, context, weight in zip(leaves, contexts, weights, strict=True):
        offset = len(context) - longest if output_positions == "successive" else 0
        branches.append(Branch(leaf, offset, weight))
    return tokens, Example((*segments, Segment(output_length, ROOT, longest)), tuple(branches))


def successive(chunk_lengths: Sequence[int], output_length: int) -> Example:
    """Lay out chunks of one input at their positions in the input, mixed uniformly (MISO-succ; paper, sections 4.1 and 4.2)."""
    starts = np.cumsum([0, *chunk_lengths]).tolist()
    segments = [Segment(n, ROOT, start) for n, start in zip(chunk_lengths, starts, strict=False)]
    branches = tuple(Branch(i, 0, 1 / len(segments)) for i in range(len(segments)))
    return Example((*segments, Segment(output_length, ROOT, starts[-1])), branches)


def unshare(example: Example, columns: Sequence[list[int]]) -> tuple[Example, list[list[int]]]:
    """Give every context its own copy of its tokens: the same computation without shared prefixes and query offsets.

    Positions are right-aligned: context i moves by `-offset_i`, so that it ends where the output begins.

    Args:
        columns: The example's per-token lists (ids, labels).

    Returns:
        The new example, and the columns in its token order.
    """
    if not example.branches:
        return example, list(columns)
    segments, source_segments = [], []
    for branch in example.branches:
        path = example.path(branch.segment)
        length = sum(example.segments[i].length for i in path)
        segments.append(Segment(length, ROOT, example.segments[path[0]].start - branch.offset))
        source_segments += path
    segments.append(example.segments[-1])
    source_segments.append(len(example.segments) - 1)

    bounds = np.cumsum([0, *(segment.length for segment in example.segments)]).tolist()
    copies = []
    for column in columns:
        copy = []
        for i in source_segments:
            copy += column[bounds[i] : bounds[i + 1]]
        copies.append(copy)
    branches = tuple(Branch(i, 0, branch.weight) for i, branch in enumerate(example.branches))
    return Example(tuple(segments), branches), copies


def _prefix_tree(contexts: Sequence[Sequence[int]]) -> tuple[list[int], list[Segment], list[int]]:
    """Build the compressed prefix tree in depth-first order: tokens, segments, and the segment in which each context ends."""
    tokens: list[int] = []
    segments: list[Segment] = []
    leaves = [0] * len(contexts)
    # The contexts of a stack entry agree on everything before `start`. Each pop emits the run on which they still agree.
    stack = [(members, ROOT, 0) for members in _groups(contexts, range(len(contexts)), 0)[::-1]]
    while stack:
        members, parent, start = stack.pop()
        first = contexts[members[0]]
        end = min((common_prefix(first, contexts[m], start) for m in members[1:]), default=len(first))
        tokens += first[start:end]
        segments.append(Segment(end - start, parent, start))
        node = len(segments) - 1
        for m in members:
            leaves[m] = node  # overwritten by a deeper segment unless the context ends here
        deeper = [m for m in members if len(contexts[m]) > end]
        stack += [(group, node, end) for group in _groups(contexts, deeper, end)[::-1]]
    return tokens, segments, leaves


def _groups(contexts: Sequence[Sequence[int]], members: Sequence[int], at: int) -> list[list[int]]:
    """Group contexts by their token at index `at`, in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for m in members:
        groups.setdefault(contexts[m][at], []).append(m)
    return list(groups.values())


def common_prefix(a: Sequence, b: Sequence, start: int = 0) -> int:
    """Length of the common prefix of `a` and `b`, which agree up to `start`."""
    low, high = start, min(len(a), len(b))
    while low < high:  # bisection: comparing slices is fast, a Python step per element is not
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def encode(example: Example) -> list[int]:
    """Flatten an example to integers for a dataset column: `[S, B, S x (length, parent, start), B x (segment, offset, weight bits)]`.

    The code is self-delimiting, so a bin of packed examples is the concatenation of their codes. The weight is the bit pattern
    of a float64, which datasets and engines that cast floats (DeepSpeed does, to bf16) cannot change.
    """
    flat = [len(example.segments), len(example.branches)]
    for segment in example.segments:
        flat += segment
    for branch in example.branches:
        flat += [branch.segment, branch.offset, float_bits(branch.weight)]
    return flat


def decode(flat: Sequence[int]) -> Iterator[Example]:
    """Inverse of `encode`, for a concatenation of codes.

    Raises:
        ValueError: If the integers end within an example.
    """
    start = 0
    while start < len(flat):
        num_segments = flat[start]
        num_branches = flat[start + 1] if start + 1 < len(flat) else 0
        first = start + 2
        end = first + 3 * (num_segments + num_branches)
        if end > len(flat) or not num_segments:
            raise ValueError(
                f"Got a layout that ends within an example ({len(flat)} integers), expected the output of `encode`. Fix: prepare the "
                "dataset again."
            )
        triples = [flat[i : i + 3] for i in range(first, end, 3)]
        segments = tuple(Segment(*triple) for triple in triples[:num_segments])
        branches = tuple(Branch(segment, offset, bits_float(bits)) for segment, offset, bits in triples[num_segments:])
        yield Example(segments, branches)
        start = end


def float_bits(x: float) -> int:
    """Bit pattern of a float64 as a signed 64-bit integer."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


def bits_float(bits: int) -> float:
    """Inverse of `float_bits`."""
    return struct.unpack("<d", struct.pack("<q", bits))[0]
