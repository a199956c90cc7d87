"""The answers of an example as plain data: where their tokens are, what each sees, and what was cut from them."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

from trl_miso.data.contexts import full_row, parallel_row
from trl_miso.data.options import DataOptions
from trl_miso.data.turns import each_completion
from trl_miso.segments import Example, trained_spans


def context_names(row: dict[str, Any], kind: str, mode: str, options: DataOptions) -> Sequence[str]:
    """What the contexts of a raw row are called. All its completions have the same contexts."""
    if mode == "succ":
        return [f"chunk {i + 1}" for i in range(len(options.chunk_probs))]
    if mode != "para":
        return ()
    first = each_completion(row, kind)[0]
    return parallel_row(first, kind, options, full_row(first, kind, options)).names


def answers_of(example: Example, labels: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
    """The answers of an example (see `segments.trained_spans`) in the order of their positions, which is that of a conversation.

    An answer has `contexts` if it is an output. Without, it sees the tokens before it on its path. Its `tail` are the tokens
    without loss after it that no other answer sees.

    Args:
        names: What the contexts of the example's outputs are called; at least as many as an output has.
    """
    branches_of = {output.segment: output.branches for output in example.outputs}
    spans = trained_spans(example, labels)
    bounds = _bounds(example)
    last = {span.segment: span for span in spans}
    followed = {segment.parent for segment in example.segments} | example.contexts()
    answers = []
    for span in spans:
        branches = branches_of.get(span.segment, ())
        named = zip(branches, names[: len(branches)], strict=True)
        has_tail = span.segment not in followed and last[span.segment] is span
        tail = bounds[span.segment + 1] - span.start - span.length if has_tail else 0
        contexts = [branch._asdict() | {"name": name} for branch, name in named]
        answers.append(span._asdict() | {"tail": tail, "contexts": contexts, "cut": []})
    starts = [segment.start for segment in example.segments]
    return sorted(answers, key=lambda answer: starts[answer["segment"]] + answer["start"] - bounds[answer["segment"]])


def cut_ends(
    row: tuple[Example, list[int], list[int]],
    uncut: Iterable[tuple[Example, list[int], list[int]]],
    names: Sequence[str],
) -> list[list[int]]:
    """The tokens that were cut from the end of each answer of a row; none for an answer that `uncut` does not have.

    Args:
        row: Example, ids and labels.
        uncut: The same row without truncation, as one or more examples.
    """
    whole = [answer for one in uncut for answer in _seen_and_own(*one, names)]
    whole.sort(key=lambda answer: len(answer[1]))  # an answer that was not cut before a longer one that begins alike
    ends = []
    for seen, tokens in _seen_and_own(*row, names):
        end: list[int] = []
        for candidate in whole:
            if candidate[0] == seen and candidate[1][: len(tokens)] == tokens:
                end = candidate[1][len(tokens) :]
                whole.remove(candidate)
                break
        ends.append(end)
    return ends


def _seen_and_own(
    example: Example, ids: list[int], labels: list[int], names: Sequence[str]
) -> list[tuple[list[list[int]], list[int]]]:
    """For each answer the tokens of each of its contexts, and its own tokens."""
    bounds = _bounds(example)
    runs = [ids[bounds[s] : bounds[s + 1]] for s in range(len(example.segments))]
    result = []
    for answer in answers_of(example, labels, names):
        segment, start = answer["segment"], answer["start"]
        own = ids[start : start + answer["length"] + answer["tail"]]
        paths = [example.path(context["segment"]) for context in answer["contexts"]]
        seen = [list(chain.from_iterable(runs[s] for s in path)) for path in paths]
        if not seen:
            above = example.path(segment)[:-1]
            seen = [[*chain.from_iterable(runs[s] for s in above), *ids[bounds[segment] : start]]]
        result.append((seen, own))
    return result


def _bounds(example: Example) -> list[int]:
    """The index of the first token of each segment, and the number of tokens."""
    return list(accumulate((segment.length for segment in example.segments), initial=0))
