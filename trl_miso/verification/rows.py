"""Prepared rows of one example each: which of a data set to check on, and the same rows arranged otherwise."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

from trl_miso.segments import Example, decode, encode, single, unshare, unshare_row

# `input_ids`, `labels` and `miso_layout` of a single example; `sources` of a row with copies: the token that each copies.
PreparedRow = dict[str, list[int]]
LONGEST = 4096  # tokens of a row for which all attention scores at once, or all contexts unshared, fit in memory
ALL_SHORT = 2  # of up to this many rows each is a short one


def choose(rows: Iterable[dict[str, Any]], count: int) -> list[PreparedRow]:
    """Choose up to `count` examples with labels from prepared rows or bins, one row per example.

    Prefers examples of at most `LONGEST` tokens, then examples with several contexts, then short ones, since the checks forward
    each row many times. One has several contexts if any does. Of more than `ALL_SHORT` the last is the longest of those preferred,
    since a sliding window shows in long rows only. Those with several contexts come first in the result, which is their order in
    a batch.
    """
    examples: list[PreparedRow] = []
    for row in chain.from_iterable(map(_split_examples, rows)):
        if any(label != -100 for label in row["labels"][1:]):
            examples.append(row)
    examples.sort(key=_preference)
    chosen = examples[:count]
    alike = [row for row in examples if _preference(row)[:2] == _preference(examples[0])[:2]]
    if count > ALL_SHORT and len(alike) > count:
        chosen[-1] = alike[-1]
    several = [row for row in examples if example_of(row).branches]
    if several and not any(example_of(row).branches for row in chosen):  # all of them are longer than `LONGEST`
        chosen[-1] = several[0]
    return sorted(chosen, key=lambda row: not example_of(row).branches)


def _preference(row: PreparedRow) -> tuple[bool, bool, int]:
    tokens = example_of(row).num_unshared_tokens
    return tokens > LONGEST, not example_of(row).branches, tokens


def _split_examples(row: dict[str, Any]) -> Iterator[PreparedRow]:
    """One row per example of a prepared row."""
    examples = list(decode(row["miso_layout"])) if "miso_layout" in row else [single(len(row["input_ids"]))]
    ends = list(accumulate(example.num_tokens for example in examples))
    for example, end in zip(examples, ends, strict=True):
        span = slice(end - example.num_tokens, end)
        yield _make_row(row["input_ids"][span], row.get("labels", row["input_ids"])[span], example)


def _make_row(ids: Sequence[int], labels: Sequence[int], example: Example) -> PreparedRow:
    return {"input_ids": list(ids), "labels": list(labels), "miso_layout": encode(example)}


def example_of(row: PreparedRow) -> Example:
    return next(decode(row["miso_layout"]))


def length(row: PreparedRow) -> int:
    return len(row["input_ids"])


def first_context_row(row: PreparedRow) -> PreparedRow:
    """The first context and its output, or else the first run with labels, as one causal run: as in plain SFT."""
    row = unshared(row)
    example, bounds = example_of(row), _bounds(row)
    if example.outputs:
        output = example.outputs[0]
        parts = [output.branches[0].segment, output.segment]
    else:
        runs = enumerate(pairwise(bounds))
        parts = [next(s for s, (a, b) in runs if any(label != -100 for label in row["labels"][a + 1 : b]))]
    row = _select(row, parts, example)
    return _make_row(row["input_ids"], row["labels"], single(len(row["input_ids"])))


def reverse_contexts(row: PreparedRow) -> PreparedRow:
    """Each output's contexts in reverse order, each with its own copy of its tokens."""
    row = unshared(row)
    example = example_of(row)
    order = list(range(len(example.segments)))
    outputs = []
    for output in example.outputs:
        # The contexts of an output stand before it, one segment each.
        first, last = output.branches[0].segment, output.segment
        order[first:last] = order[first:last][::-1]
        branches = [branch._replace(segment=s) for s, branch in enumerate(output.branches[::-1], start=first)]
        outputs.append(output._replace(branches=tuple(branches)))
    segments = tuple([example.segments[s] for s in order])
    return _select(row, order, Example(segments, tuple(outputs)))


def _bounds(row: PreparedRow) -> list[int]:
    """Where each segment of a row begins, and where the last ends."""
    return list(accumulate((segment.length for segment in example_of(row).segments), initial=0))


def _select(row: PreparedRow, segments: Sequence[int], example: Example) -> PreparedRow:
    """The row with these of its segments, in this order, laid out as `example`."""
    bounds = _bounds(row)
    selected: PreparedRow = {"miso_layout": encode(example)}
    for name in ("input_ids", "labels", "sources"):
        selected[name] = list(chain.from_iterable(row[name][bounds[s] : bounds[s + 1]] for s in segments))
    return selected


def unshared(row: PreparedRow) -> PreparedRow:
    """The row with a copy of its tokens for every context and run."""
    example, ids, labels = unshare_row(example_of(row), row["input_ids"], row["labels"])
    sources = row.get("sources", list(range(len(row["input_ids"]))))
    return _make_row(ids, labels, example) | {"sources": unshare(example_of(row), [sources])[1][0]}
