"""The parts of a generation's contexts: what new tokens attend to, so that each shared segment is read once.

A *part* is a run of segments as the outputs of some branches see them, with keys turned by the offset of these branches
(`segments/tree.py`). Branches that hold a segment at the same offset share the part. So a common prefix is read once if its
contexts have the same length, or with `after_longest`. A branch is the union of its parts p, with `(O_p, l_p)` the attention to
a part alone and its log-sum-exp:

    l_i = logsumexp_{p in i} l_p
    out = share_out O_out + sum_p c_p O_p,    c_p = sum_{i holds p} share_i exp(l_p - l_i)

with the shares of `attention/merge.py`.

Shapes: P parts, N branches, S key rows of all parts, E pairs of a branch and one of its parts.
"""

from collections.abc import Sequence

import numpy as np
import torch

from trl_miso.segments import Example
from trl_miso.segments.packed import Varlen, cumulative_lengths, ranges

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class Parts:
    """The parts of several requests, with the keys of all parts one after the other.

    Args:
        examples: Per request, its contexts and an output. The segments of all contexts are packed one after the other.

    Attributes:
        rows: (S,) packed row of each key. offset: (S,) positions by which each key is turned.
        lengths: (P,) keys of each part. request: (P,) request of each part.
        branch, part: (E,) pairs of a branch and one of its parts, ordered by branch, each branch from its root on.
        branch_request: (N,) request of each branch. weights: (N,) weight of each branch.
    """

    def __init__(self, examples: Sequence[Example]):
        # Which branches hold each (request, segment, offset)?
        holders: dict[tuple[int, int, int], list[int]] = {}
        branch_request, weights = [], list[float]()
        for e, example in enumerate(examples):
            for branch in example.branches:
                for s in example.path(branch.segment):
                    holders.setdefault((e, s, branch.offset), []).append(len(weights))
                branch_request.append(e)
                weights.append(branch.weight)

        # A part: all segments that the same branches hold. They continue each other.
        segments_of: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        for held_segment, held_by in holders.items():
            segments_of.setdefault(tuple(held_by), []).append(held_segment)

        # First packed row and length of each segment.
        place: dict[tuple[int, int], tuple[int, int]] = {}
        row = 0
        for e, example in enumerate(examples):
            for s, segment in enumerate(example.segments[:-1]):
                place[e, s] = row, segment.length
                row += segment.length

        runs, lengths, request, offsets, pairs = [], [], [], [], []
        for part, (branches, held_segments) in enumerate(segments_of.items()):
            part_runs = [place[e, s] for e, s, _ in held_segments]
            runs += part_runs
            lengths.append(sum(length for _, length in part_runs))
            request.append(held_segments[0][0])
            offsets.append(-held_segments[0][2])
            pairs += [(branch, part) for branch in branches]
        self.lengths, self.request = np.array(lengths), np.array(request)
        self.rows = ranges(*np.array(runs).T)
        self.offset = np.repeat(offsets, self.lengths)
        self.branch, self.part = np.array(sorted(pairs)).T
        self.branch_request, self.weights = np.array(branch_request), np.array(weights)

    @property
    def branch_lengths(self) -> np.ndarray:
        """(N,) keys of each branch."""
        return np.bincount(self.branch, self.lengths[self.part]).astype(np.int64)

    @property
    def starts(self) -> np.ndarray:
        """(P,) first key row of each part."""
        return self.lengths.cumsum() - self.lengths

    def last_keys(self, window: int) -> np.ndarray:
        """Key rows of the branches one after the other, of each branch the last `window`."""
        keys = ranges(self.starts[self.part], self.lengths[self.part])
        lengths = self.branch_lengths
        kept = np.minimum(lengths, window)
        return keys[ranges(lengths.cumsum() - kept, kept)]

    def call(self, device: torch.device) -> Varlen:
        """How to gather and turn the keys of all parts from the packed rows."""
        in_order = np.array_equal(self.rows, np.arange(len(self.rows)))
        index = None if in_order else torch.from_numpy(self.rows).to(device)
        offset = torch.from_numpy(self.offset).to(device) if self.offset.any() else None
        ends = cumulative_lengths(self.lengths).to(device)
        # `max_seqlen_k` is the number of positions that a rotation computes angles for: more than any offset.
        return Varlen(ends, ends, 1, int(self.offset.max()) + 1, index, offset)
