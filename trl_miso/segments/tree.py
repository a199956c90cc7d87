"""The contract between data and attention: segments, contexts and how a batch of them is packed.

Every example, whatever its mode, is one small prefix tree:

- a **segment** is a contiguous token run with a start position and at most one parent segment. Its tokens see all of
  their ancestors and themselves causally.
- a **branch** is the output's view of one context: the path root..segment, a query offset (see below) and a weight.
- the **output** is the last segment. With two or more branches it has no parent and mixes over them; an example with a
  single context has no branch at all: it is one ordinary causal run, exactly as in plain SFT.

Worked example. Contexts `[1 2 3 4]` (full), `[1 2 3]`, `[1 2 5]` and output `[8 9]`, prefixes shared, `successive`:

    segment  tokens  parent  start        branch  segment  path tokens  length  offset  weight
    0        1 2     -       0            0       2        1 2 3 4      4        0      1/3
    1        3       0       2            1       1        1 2 3        3       -1      1/3
    2        4       1       3            2       3        1 2 5        3       -1      1/3
    3        5       0       2
    4        8 9     -       4  (output, at P = the longest context)

In branch i the output must be successive to context i (paper, section 4.1), that is stand at `len_i + t`, while it is
stored at `P + t`. Rotary attention depends on differences only: it is enough that the query is turned by the *offset*
`len_i - P`, or, as is done since contexts have fewer rows and heads, that the context's keys are turned by minus that.
Without sharing the same example is three root segments, right-aligned to end at P, all offsets 0.

Packing several examples, the rows are laid out as `[all contexts | all outputs | all single runs]`, so that the mixing
outputs are one slice. No label crosses a segment boundary: the first token of each segment is never labelled.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

ROOT = -1


class Segment(NamedTuple):
    """A token run of `length` tokens at positions `start, start + 1, ...` below segment `parent` (`ROOT`: none)."""

    length: int
    parent: int
    start: int


class Branch(NamedTuple):
    """The output's view of the context that ends with `segment`; `offset` in positions, `weight` in [0, 1]."""

    segment: int
    offset: int
    weight: float


class Example(NamedTuple):
    """Segments in packed token order, the output last; `branches` is empty for a single causal run."""

    segments: tuple[Segment, ...]
    branches: tuple[Branch, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def num_unshared_tokens(self) -> int:
        """Tokens if every context had its own copy of its path; the same as `num_tokens` for a single causal run."""
        if not self.branches:
            return self.num_tokens
        lengths = [segment.length for segment in self.segments]
        return lengths[-1] + sum(lengths[i] for branch in self.branches for i in self.path(branch.segment))

    def path(self, index: int) -> list[int]:
        """Segment indices root..index."""
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
    """Lay out contexts that each start at position 0, common prefixes stored once (MISO-para).

    Args:
        contexts: Token ids of n >= 2 contexts, none empty.
        output_length: Tokens of the output.
        weights: n weights that sum to 1.
        output_positions: `"successive"`: the output follows every context (offset `len_i - P`); `"after_longest"`: it
            stands at P = the longest length for all of them (offset 0).

    Returns:
        The context tokens in packed order, and the example (its output segment comes after these tokens).
    """
    tokens, segments, leaves = _prefix_tree(contexts)
    longest = max(map(len, contexts))
    shift = output_positions == "successive"
    branches = tuple(
        Branch(leaf, len(context) - longest if shift else 0, weight)
        for leaf, context, weight in zip(leaves, contexts, weights, strict=True)
    )
    return tokens, Example((*segments, Segment(output_length, ROOT, longest)), branches)


def successive(chunk_lengths: Sequence[int], output_length: int) -> Example:
    """Lay out chunks of one input at the positions they have unsplit, mixed uniformly (MISO-succ)."""
    starts = np.cumsum([0, *chunk_lengths]).tolist()
    segments = [Segment(n, ROOT, start) for n, start in zip(chunk_lengths, starts, strict=False)]
    branches = tuple(Branch(i, 0, 1 / len(segments)) for i in range(len(segments)))
    return Example((*segments, Segment(output_length, ROOT, starts[-1])), branches)


def unshare(example: Example, columns: Sequence[list[int]]) -> tuple[Example, list[list[int]]]:
    """Give every context its own copy of its tokens: the same computation without shared prefixes or query offsets.

    Positions are right-aligned: context i moves by `-offset_i`, so that it ends where the output begins.
    `columns` are the example's per-token lists (ids, labels), returned in the new order.
    """
    if not example.branches:
        return example, list(columns)
    bounds = np.cumsum([0, *(segment.length for segment in example.segments)]).tolist()
    segments, pieces = [], []
    for branch in example.branches:
        path = example.path(branch.segment)
        pieces += path
        length = sum(example.segments[i].length for i in path)
        segments.append(Segment(length, ROOT, example.segments[path[0]].start - branch.offset))
    pieces.append(len(example.segments) - 1)
    branches = tuple(Branch(i, 0, branch.weight) for i, branch in enumerate(example.branches))
    copies = [[token for i in pieces for token in column[bounds[i] : bounds[i + 1]]] for column in columns]
    return Example((*segments, example.segments[-1]), branches), copies


def _prefix_tree(contexts: Sequence[Sequence[int]]) -> tuple[list[int], list[Segment], list[int]]:
    """Compressed prefix tree in depth-first order: tokens, segments, and the segment in which each context ends."""
    tokens: list[int] = []
    segments: list[Segment] = []
    leaves = [0] * len(contexts)
    # Contexts below a node agree on everything before `start`; each pop emits the run that its group still agrees on.
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
    groups: dict[int, list[int]] = {}
    for m in members:
        groups.setdefault(contexts[m][at], []).append(m)
    return list(groups.values())


def common_prefix(a: Sequence, b: Sequence, start: int = 0) -> int:
    """Length of the common prefix of `a` and `b`, which agree up to `start`."""
    low, high = start, min(len(a), len(b))
    while low < high:  # bisection: comparing slices is fast, a Python step an element is not
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def encode(example: Example) -> list[int]:
    """Flat integers for a dataset column: `[S, B, S x (length, parent, start), B x (segment, offset, weight bits)]`.

    Self-delimiting, so a bin of packed examples is the concatenation of their codes. The weight is the bit pattern of
    a float64: datasets and engines that cast floats (DeepSpeed does, to bf16) cannot touch it.
    """
    flat = [len(example.segments), len(example.branches)]
    for segment in example.segments:
        flat += segment
    for branch in example.branches:
        flat += [branch.segment, branch.offset, float_bits(branch.weight)]
    return flat


def decode(flat: Sequence[int]) -> Iterator[Example]:
    """Inverse of `encode`, for a concatenation of codes."""
    at = 0
    while at < len(flat):
        n, b = (*flat[at : at + 2], 0)[:2]
        rows = [flat[i : i + 3] for i in range(at + 2, at + 2 + 3 * (n + b), 3)]
        if at + 2 + 3 * (n + b) > len(flat) or not n:
            raise ValueError(
                f"Got a layout that ends within an example ({len(flat)} integers), expected what `encode` wrote. Fix: prepare the "
                "dataset again."
            )
        segments = tuple(Segment(*row) for row in rows[:n])
        branches = tuple(Branch(row[0], row[1], bits_float(row[2])) for row in rows[n:])
        yield Example(segments, branches)
        at += 2 + 3 * (n + b)


def float_bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def bits_float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
