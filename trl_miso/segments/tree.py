"""Segments, branches and outputs: every row, in every mode, is a forest of token runs.

- A **segment** is a contiguous token run with a start position and at most one parent segment. Its tokens see all tokens of
  their ancestors, and each other causally.
- An **output** is a segment without a parent that mixes over its branches. A **branch** is the output's view of one context:
  the path root..segment, a query offset (see below) and a weight.
- An answer with a single context is no output: it is labelled where it stands, in a segment of the forest, exactly as in plain
  SFT. A conversation whose answers all have one context is one segment, or a tree where later turns see another history.

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

A batch of several examples is laid out as `[contexts | outputs | other segments]`, so that the outputs are one slice
(`packed.py`). No label crosses a segment boundary: the first token of each segment is never labelled.
"""

import struct
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np

from trl_miso.segments.forest import NO_LABEL, ROOT, Segment, grow


class Branch(NamedTuple):
    """The output's view of the context that ends with `segment`; `offset` in positions, `weight` in [0, 1]."""

    segment: int
    offset: int
    weight: float


class Output(NamedTuple):
    """A segment without a parent whose attention is mixed over two or more branches."""

    segment: int
    branches: tuple[Branch, ...]


class Example(NamedTuple):
    """A row: its segments in token order, the outputs last, and what each output mixes."""

    segments: tuple[Segment, ...]
    outputs: tuple[Output, ...] = ()

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches of all outputs, in order."""
        return tuple([branch for output in self.outputs for branch in output.branches])

    @property
    def num_tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def num_unshared_tokens(self) -> int:
        """Number of tokens if every context and every causal run had its own copy of its path."""
        return sum(self.segments[i].length for copy in self.copies() for i in copy)

    @property
    def num_positions(self) -> int:
        """Position after the last token, over all segments."""
        return max(self.end(i) for i in range(len(self.segments)))

    @property
    def longest(self) -> int:
        """Tokens of the longest path, an output counted with its longest context."""
        lengths = [self.path_length(i) for i in range(len(self.segments))]
        for output in self.outputs:
            longest = max(self.path_length(branch.segment) for branch in output.branches)
            lengths.append(longest + self.segments[output.segment].length)
        return max(lengths)

    def path(self, index: int) -> list[int]:
        """Segment indices from the root to `index`."""
        path = [index]
        while (parent := self.segments[path[-1]].parent) != ROOT:
            path.append(parent)
        return path[::-1]

    def path_length(self, index: int) -> int:
        """Number of tokens from the root to the end of segment `index`."""
        return sum(self.segments[i].length for i in self.path(index))

    def end(self, index: int) -> int:
        """Position after the last token of a segment."""
        return self.segments[index].start + self.segments[index].length

    def contexts(self) -> set[int]:
        """The segments that some output attends to."""
        return {i for branch in self.branches for i in self.path(branch.segment)}

    def copies(self) -> list[list[int]]:
        """The example without sharing, as lists of segments: each output's contexts and the output, then each causal run.

        A causal run is the path to a segment that is in no context and has no child.
        """
        copies = []
        for output in self.outputs:
            copies += [self.path(branch.segment) for branch in output.branches]
            copies.append([output.segment])
        covered = {i for copy in copies for i in copy}
        parents = {segment.parent for i, segment in enumerate(self.segments) if i not in covered}
        copies += [self.path(i) for i in range(len(self.segments)) if i not in covered and i not in parents]
        return copies


class Answer(NamedTuple):
    """An output with its contexts, before its tokens are laid out.

    Attributes:
        contexts: Token ids of n >= 1 contexts, none empty if n > 1.
        output: Token ids. labels: one per token of the output, -100 for no loss. The first has no loss.
        weights: n weights that sum to 1; none for one context and its output as a causal run.
        positions: `"successive"`: the output follows every context (offset `len_i - P`). `"after_longest"`: it stands at P, the
            length of the longest context, for all contexts (offset 0). `"chunks"`: the contexts are chunks of one input, at
            the positions that they have in it, and the output follows the last (MISO-succ).
    """

    contexts: Sequence[Sequence[int]]
    output: Sequence[int]
    labels: Sequence[int]
    weights: Sequence[float] = ()
    positions: str = "successive"

    @property
    def begun(self) -> Sequence[Sequence[int]]:
        """The contexts that begin an input: of chunks, the first alone."""
        return self.contexts[:1] if self.positions == "chunks" else self.contexts


def lay_out(answers: Sequence[Answer]) -> tuple[list[int], list[int], Example]:
    """Lay out the answers of a row as one example in which common prefixes are stored once (paper, section 4.1).

    Equal to one row per answer and context, in the loss and in every gradient. Causal runs are labelled in the forest of
    contexts and runs. All other answers become outputs.

    Returns:
        Token ids and labels in segment order, and the example.
    """
    paths: list[Sequence[int]] = []
    labels: list[Sequence[int]] = []
    chunks: list[Sequence[int]] = []  # those that do not begin their input, and so stand in no tree
    for answer in answers:
        if not answer.weights:
            (context,) = answer.contexts
            paths.append([*context, *answer.output])
            labels.append([-100] * len(context) + list(answer.labels))
        else:
            paths += answer.begun
            labels += [()] * len(answer.begun)
            chunks += answer.contexts[len(answer.begun) :]
    tree = grow(paths, labels)
    tokens, token_labels, segments = tree.tokens, tree.labels, tree.segments
    leaves = iter(tree.leaves)
    chunk_segments = iter(range(len(segments), len(segments) + len(chunks)))
    output_segments = iter(range(len(segments) + len(chunks), sys.maxsize))

    late_segments: list[Segment] = []
    outputs: list[Output] = []
    output_tokens: list[int] = []
    output_labels: list[int] = []
    for answer in answers:
        lengths = list(map(len, answer.contexts))
        if not answer.weights:
            next(leaves)
            continue
        are_chunks = answer.positions == "chunks"
        end = sum(lengths) if are_chunks else max(lengths)
        branches = []
        for i, (length, weight) in enumerate(zip(lengths, answer.weights, strict=True)):
            segment = next(chunk_segments) if are_chunks and i else next(leaves)
            branches.append(Branch(segment, length - end if answer.positions == "successive" else 0, weight))
        if are_chunks:
            for context, start in zip(answer.contexts[1:], accumulate(lengths), strict=False):
                segments.append(Segment(len(context), ROOT, start))
                tokens += context
                token_labels += [-100] * len(context)
        outputs.append(Output(next(output_segments), tuple(branches)))
        late_segments.append(Segment(len(answer.output), ROOT, end))
        output_tokens += answer.output
        output_labels += answer.labels
    example = Example((*segments, *late_segments), tuple(outputs))
    return tokens + output_tokens, token_labels + output_labels, example


def single(length: int) -> Example:
    """One causal run of `length` tokens: plain SFT."""
    return Example((Segment(length, ROOT, 0),))


def parallel(
    contexts: Sequence[Sequence[int]], output_length: int, weights: Sequence[float], output_positions: str
) -> tuple[list[int], Example]:
    """Lay out contexts and one output; see `Answer`.

    Returns:
        The context tokens in segment order, and the example. Its output segment comes after these tokens.
    """
    output = [0] * output_length
    tokens, _, example = lay_out([Answer(contexts, output, [-100] * output_length, weights, output_positions)])
    return tokens[: len(tokens) - output_length], example


def successive(chunk_lengths: Sequence[int], output_length: int) -> Example:
    """Lay out chunks of one input at their positions in the input, mixed uniformly (MISO-succ; paper, sections 4.1 and 4.2)."""
    chunks = [[0] * length for length in chunk_lengths]
    output = [0] * output_length
    weights = [1 / len(chunks)] * len(chunks)
    return lay_out([Answer(chunks, output, [-100] * output_length, weights, "chunks")])[2]


def unshare(example: Example, columns: Sequence[list[int]]) -> tuple[Example, list[list[int]]]:
    """Give every context and every causal run its own copy of its tokens: the same computation without sharing.

    Positions are right-aligned: context i moves by `-offset_i`, so that it ends where its output begins.

    Args:
        columns: The example's per-token lists. A label on a shared token would count once per copy: see `unshare_row`.

    Returns:
        The new example, and the columns in its token order.
    """
    copies = example.copies()
    if len(copies) == 1:  # a single causal run
        return example, list(columns)
    segments: list[Segment] = []
    outputs: list[Output] = []
    # In the order of `copies`: the contexts of each output and the output, then the causal runs.
    for output in example.outputs:
        branches: list[Branch] = []
        for branch in output.branches:
            branches.append(Branch(len(segments), 0, branch.weight))
            start = example.segments[example.path(branch.segment)[0]].start - branch.offset
            segments.append(Segment(example.path_length(branch.segment), ROOT, start))
        outputs.append(Output(len(segments), tuple(branches)))
        segments.append(example.segments[output.segment])
    for run in copies[len(segments) :]:
        segments.append(Segment(example.path_length(run[-1]), ROOT, example.segments[run[0]].start))

    bounds = np.cumsum([0, *(segment.length for segment in example.segments)]).tolist()
    copied = []
    for column in columns:
        new: list[int] = []
        for i in chain.from_iterable(copies):
            new += column[bounds[i] : bounds[i + 1]]
        copied.append(new)
    return Example(tuple(segments), tuple(outputs)), copied


def unshare_row(example: Example, input_ids: list[int], labels: list[int]) -> tuple[Example, list[int], list[int]]:
    """`unshare` token ids and labels. A label stays on the first copy of its token alone, so that it counts once."""
    unshared, (ids, labels, sources) = unshare(example, [input_ids, labels, list(range(len(input_ids)))])
    if len(ids) > len(input_ids):
        first_copies = set(np.unique(sources, return_index=True)[1].tolist())
        labels = [label if i in first_copies else -100 for i, label in enumerate(labels)]
    return unshared, ids, labels


class Span(NamedTuple):
    """A trained answer: `length` tokens from token `start` of the example, within segment `segment`."""

    segment: int
    start: int
    length: int


def trained_spans(example: Example, labels: Sequence[int] | np.ndarray) -> list[Span]:
    """The answers of an example, in token order: every output as a whole, and every run of labels in the forest."""
    outputs = {output.segment for output in example.outputs}
    labelled = np.asarray(labels) != NO_LABEL
    spans = []
    begin = 0
    for i, segment in enumerate(example.segments):
        end = begin + segment.length
        if i in outputs:
            spans.append(Span(i, begin, segment.length))
        else:
            changes = np.diff(labelled[begin:end].astype(np.int8), prepend=0, append=0)
            bounds = (np.flatnonzero(changes) + begin).tolist()
            spans += [Span(i, start, stop - start) for start, stop in zip(bounds[::2], bounds[1::2], strict=True)]
        begin = end
    return spans


def encode(example: Example) -> list[int]:
    """Flatten an example to integers for a dataset column.

    `[S, B, S x (length, parent, start), B x (output, segment, offset, weight bits)]`, for S segments and B branches. The code is
    self-delimiting, so a bin of packed examples is the concatenation of their codes. The weight is the bit pattern of a float64,
    which datasets and engines that cast floats (DeepSpeed does, to bf16) cannot change.
    """
    flat = [len(example.segments), len(example.branches)]
    for segment in example.segments:
        flat += segment
    for output in example.outputs:
        for branch in output.branches:
            flat += [output.segment, branch.segment, branch.offset, float_bits(branch.weight)]
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
        branches_start = start + 2 + 3 * num_segments
        end = branches_start + 4 * num_branches
        if end > len(flat) or not num_segments:
            raise ValueError(
                f"Got a layout that ends within an example ({len(flat)} integers), expected the output of `encode`. Fix: prepare the "
                "dataset again."
            )
        segments = [Segment(*flat[i : i + 3]) for i in range(start + 2, branches_start, 3)]
        branches: dict[int, list[Branch]] = {}  # by output
        for i in range(branches_start, end, 4):
            output, segment, offset, bits = flat[i : i + 4]
            branches.setdefault(output, []).append(Branch(segment, offset, bits_float(bits)))
        outputs = [Output(output, tuple(members)) for output, members in branches.items()]
        yield Example(tuple(segments), tuple(outputs))
        start = end


def decode_with(flat: Sequence[int], column: Sequence) -> Iterator[tuple[Example, Any]]:
    """`decode`, each example with its part of a per-token column of the row."""
    start = 0
    for example in decode(flat):
        yield example, column[start : start + example.num_tokens]
        start += example.num_tokens


def float_bits(x: float) -> int:
    """Bit pattern of a float64 as a signed 64-bit integer."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


def bits_float(bits: int) -> float:
    """Inverse of `float_bits`."""
    return struct.unpack("<d", struct.pack("<q", bits))[0]
