"""Token lists to a forest in which common prefixes are stored once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROOT = -1
NO_LABEL = -100


class Segment(NamedTuple):
    """A run of `length` tokens at positions `start, start + 1, ...` below segment `parent` (`ROOT` for none)."""

    length: int
    parent: int
    start: int


class Forest(NamedTuple):
    """Segments in depth-first order, their tokens and labels, and the segment in which each context ends."""

    tokens: list[int]
    labels: list[int]
    segments: list[Segment]
    leaves: list[int]


def grow(paths: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> Forest:
    """Store the common prefixes of token lists once, and every label once.

    A list without labels is a context: a segment ends where it ends. A list with labels is a causal run, whose end may lie
    within a segment. Lists part before the first label that not all of them have, so that no segment begins with a label: its
    token is predicted from the one before it.

    Args:
        paths: Token ids, none empty.
        labels: For each list one label per token (-100 for none), or nothing for a context. The first token has no label.

    Returns:
        The forest. `leaves` is meaningless for runs.
    """
    own_labels, members = _absorb(paths, labels)
    forest = Forest([], [], [], [ROOT] * len(paths))
    # The members of a stack entry agree up to `start`. Each pop stores the tokens on which they still agree.
    stack = [(members, ROOT, 0)]
    while stack:
        members, parent, start = stack.pop()
        end, groups = _part(paths, own_labels, members, start)
        ended = [m for m in members if len(paths[m]) == end]
        if end > start:
            forest.tokens.extend(paths[members[0]][start:end])
            forest.labels.extend(_merged_labels([own_labels[m] for m in members], start, end))
            forest.segments.append(Segment(end - start, parent, start))
            parent = len(forest.segments) - 1
        for m in ended:
            forest.leaves[m] = parent
        stack += [(group, parent, end) for group in groups[::-1]]
    return forest


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


def _absorb(paths: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """Move the labels of each run that is the beginning of another list to that list.

    Returns:
        The labels of each list, and the indices of the lists that are left.
    """
    own_labels = [list(given) for given in labels]
    left = list(range(len(paths)))
    for m in sorted(left, key=lambda m: len(paths[m])):
        if not labels[m]:  # a context stays one, also with the labels of a run
            continue
        for other in sorted(left, key=lambda m: -len(paths[m])):
            size = len(paths[m])
            if other == m or len(paths[other]) < size or paths[other][:size] != paths[m]:
                continue
            taken = own_labels[other] or [NO_LABEL] * len(paths[other])
            if any(a != NO_LABEL != b for a, b in zip(taken, own_labels[m], strict=False)):
                continue  # both count
            own_labels[other] = _merged_labels([taken[:size], own_labels[m]], 0, size) + taken[size:]
            left.remove(m)
            break
    return own_labels, left


def _part(
    paths: Sequence[Sequence[int]], labels: Sequence[list[int]], members: list[int], start: int
) -> tuple[int, list[list[int]]]:
    """Where lists that agree up to `start` part, and the groups in which they go on; lists that end there are in no group."""
    first = paths[members[0]]
    end = min((common_prefix(first, paths[m], start) for m in members[1:]), default=len(first))
    groups: dict[int, list[int]] = {}
    twice = _first_label_of_several(labels, members, start, end)
    if twice is None:
        ended = [m for m in members if len(paths[m]) == end]
        for m in members:
            if len(paths[m]) > end:
                groups.setdefault(paths[m][end], []).append(m)
    else:
        end, ended = twice, []
        for m in members:  # lists with a label here go on alone
            key = -1 - m if labels[m] and labels[m][end] != NO_LABEL else paths[m][end]
            groups.setdefault(key, []).append(m)
    if not groups:
        return end, []

    going_on = [labels[m] for m in members if len(labels[m]) > end]
    parting = end
    while parting > start and any(label[parting] != NO_LABEL for label in going_on):
        parting -= 1
    if parting < end and ended:
        return parting, [ended, *groups.values()]
    return parting, list(groups.values())


def _first_label_of_several(labels: Sequence[list[int]], members: list[int], start: int, end: int) -> int | None:
    """The first index from `start` to `end` at which several lists have a label, or None."""
    labelled = [np.array(labels[m][start:end]) != NO_LABEL for m in members if labels[m]]
    if len(labelled) < 2:
        return None
    indices = np.flatnonzero(np.sum(labelled, axis=0) > 1)
    return start + int(indices[0]) if len(indices) else None


def _merged_labels(labels: Sequence[list[int]], start: int, end: int) -> list[int]:
    """The labels from `start` to `end` of several lists, no two of which have a label at the same index."""
    if len(labels) == 1 and labels[0]:
        return labels[0][start:end]
    merged = [NO_LABEL] * (end - start)
    for given in labels:
        for i, label in enumerate(given[start:end]):
            if label != NO_LABEL:
                merged[i] = label
    return merged
