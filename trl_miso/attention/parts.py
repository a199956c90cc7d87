"""What the outputs of a generation read: each segment of the contexts once, and how these parts make up a context.

A *part* is a segment as a branch's output sees it, its keys turned by the branch's offset (`segments.py`). Branches that hold a
segment at one offset have its part in common: of contexts of one length, and with `after_longest`, a common prefix is read once.
A branch is the union of its parts p, with `(O_p, l_p)` the attention to a part alone and its log-sum-exp:

    l_i = logsumexp_{p in i} l_p
    out = share_out O_out + sum_p c_p O_p,    c_p = sum_{i holds p} share_i exp(l_p - l_i)

with the shares of `mixture.py`. Shapes as there, and: P parts, N branches, S key rows of the parts, C rows that generate from one request,
M = C H / G queries of a key-value head.
"""

from collections.abc import Sequence

import numpy as np
import torch

from trl_miso.attention.kernels import attend_on_cpu
from trl_miso.packing import Varlen, _cu_seqlens, _ranges
from trl_miso.segments import ROOT, Example

KeysAndValues = tuple[torch.Tensor, torch.Tensor]

_FEW = 192  # rows or keys: fewer, and masked ones among them, cost less than another call
_PIECE = 256  # rows


class Parts:
    """The parts of several requests, their keys one after the other in this order.

    Args:
        examples: Contexts of each request, the segments of which are packed one after the other, and an output.

    Attributes:
        rows: (S,) packed row of each key. Its `offset` (S,) is by how many positions it is turned.
        lengths: (P,) keys of a part, `request` (P,) whose they are.
        part, branch: (E,) which part belongs to which branch, branches in order, each from its root on.
        branch_request: (N,). weights: (N,) of the branches.
    """

    def __init__(self, examples: Sequence[Example]):
        found: dict[tuple[int, int, int], int] = {}
        part, branch, branch_request, weights = [], [], [], list[float]()
        for e, example in enumerate(examples):
            for view in example.branches:
                for segment in example.path(view.segment):
                    part.append(found.setdefault((e, segment, view.offset), len(found)))
                    branch.append(len(weights))
                branch_request.append(e)
                weights.append(view.weight)
        packed = {(e, s): segment for e, x in enumerate(examples) for s, segment in enumerate(x.segments[:-1])}
        starts = dict(zip(packed, np.cumsum([0, *(segment.length for segment in packed.values())]), strict=False))
        self.lengths = np.array([packed[e, s].length for e, s, _ in found])
        self.request = np.array([e for e, _, _ in found])
        self.rows = _ranges(np.array([starts[e, s] for e, s, _ in found]), self.lengths)
        self.offset = np.repeat([-offset for _, _, offset in found], self.lengths)
        self.part, self.branch = np.array(part), np.array(branch)
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
        """Key rows of one branch after the other, of each the last `window`."""
        keys = _ranges(self.starts[self.part], self.lengths[self.part])
        lengths = self.branch_lengths
        kept = np.minimum(lengths, window)
        return keys[_ranges(lengths.cumsum() - kept, kept)]

    def call(self, device: torch.device) -> Varlen:
        """How the parts' keys are taken from the packed rows."""
        identity = np.array_equal(self.rows, np.arange(len(self.rows)))
        index = None if identity else torch.from_numpy(self.rows).to(device)
        offset = torch.from_numpy(self.offset).to(device) if self.offset.any() else None
        ends = _cu_seqlens(self.lengths).to(device)
        # The last is more than any offset: so many positions a rotation is made for.
        return Varlen(ends, ends, 1, int(self.offset.max()) + 1, index, offset)


class Reading:
    """Attention of packed contexts to themselves on the CPU: causal attention of every segment to its path, without copies of paths.

    A segment that others continue is read in one call by itself and by all of them, which follow it since trees are packed depth
    first. What are few rows together is read in one call with a mask.
    """

    def __init__(self, examples: Sequence[Example]):
        self._bounds = [0]  # first rows of the segments, one after the other, and the end
        self._paths: list[list[int]] = []
        for example in examples:
            ends: list[int] = []  # the last piece of each segment of this request
            for segment in example.segments[:-1]:
                path = [] if segment.parent == ROOT else self._paths[ends[segment.parent]]
                for length in _pieces(segment.length):
                    path = [*path, len(self._paths)]
                    self._paths.append(path)
                    self._bounds.append(self._bounds[-1] + length)
                ends.append(len(self._paths) - 1)
        self._last = list(range(len(self._paths)))  # of the segments that continue each
        for i, path in enumerate(self._paths):
            for above in path:
                self._last[above] = i
        # (rows, keys, seen): rows begin with the keys' own, and are causal without `seen`.
        self._calls: list[tuple[slice, slice, torch.Tensor | None]] = []
        self._plan(0, len(self._paths))
        self._masks: dict[torch.dtype, list[torch.Tensor | None]] = {}

    def _plan(self, first: int, stop: int) -> None:
        """Calls for the segments first..stop - 1, which are whole trees below what was planned before."""
        while first < stop:
            trees = [first]  # those that are few together
            while (after := self._last[trees[-1]] + 1) < stop and self._size(first, self._last[after]) <= _FEW:
                trees.append(after)
            last = self._last[trees[-1]]
            rows = self._rows(first, last)
            if first == last:
                self._calls.append((rows, rows, None))
            elif self._size(first, last) <= _FEW:
                self._calls.append((rows, rows, self._mask(first, last)))
            else:  # one tree
                self._calls.append((rows, self._rows(first, first), None))
                self._plan(first + 1, last + 1)
            first = last + 1

    def _rows(self, first: int, last: int) -> slice:
        return slice(self._bounds[first], self._bounds[last + 1])

    def _size(self, first: int, last: int) -> int:
        return self._bounds[last + 1] - self._bounds[first]

    def _mask(self, first: int, last: int) -> torch.Tensor:
        """(rows, rows) bool: which the rows of the segments first..last see of each other."""
        bounds = np.array(self._bounds) - self._bounds[first]
        seen = np.zeros((bounds[last + 1],) * 2, dtype=bool)
        for i in range(first, last + 1):
            for above in self._paths[i]:
                if above >= first:
                    seen[bounds[i] : bounds[i + 1], bounds[above] : bounds[above + 1]] = True
        return torch.from_numpy(np.tril(seen))

    def attend(self, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, scale: float) -> torch.Tensor:
        """(T, H, D)."""
        dtype = q_THD.dtype
        if dtype not in self._masks:
            self._masks[dtype] = [_hides(~seen, dtype) if seen is not None else None for *_, seen in self._calls]
        made: list[tuple[slice, torch.Tensor, torch.Tensor]] = []
        for (rows, keys, _), mask in zip(self._calls, self._masks[dtype], strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in (q_THD[rows], k_TGD[keys], v_TGD[keys]))
            o, lse = attend_on_cpu(q, k, v, scale, causal=mask is None, mask=mask)
            made.append((rows, o[0].transpose(0, 1), lse[0]))
        rows, out, lse = made[0]
        if rows.stop < len(q_THD):  # several trees: the first has not all rows
            out, lse = torch.empty_like(q_THD), lse.new_empty(q_THD.shape[1], len(q_THD))
        filled = 0
        for rows, o, own in made:
            if rows.start < filled:
                _merge_into(out[rows], lse[:, rows], o, own)
            elif o is not out:
                out[rows], lse[:, rows] = o, own
            filled = max(filled, rows.stop)
        return out


class DenseParts:
    """The parts of one request in few dense batches of like lengths, for a kernel that takes no ragged ones.

    Parts shorter than the longest of their batch, but not by half, are filled up and masked. They stand in the order of the batches.
    """

    def __init__(self, parts: Parts, request: int, dtype: torch.dtype):
        own, branches = np.flatnonzero(parts.request == request), np.flatnonzero(parts.branch_request == request)
        own = own[np.argsort(-parts.lengths[own], kind="stable")]
        keys = [parts.starts[part] + np.arange(parts.lengths[part]) for part in own]
        self._batches: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # (parts, keys) key rows, mask
        for index, lengths in _batches(keys):
            hidden = torch.from_numpy(np.arange(index.shape[1]) >= lengths)[:, None, None]
            self._batches.append((torch.from_numpy(index), _hides(hidden, dtype) if hidden.any() else None))
        held = np.array([np.isin(own, parts.part[parts.branch == branch]) for branch in branches])
        wide = torch.promote_types(dtype, torch.float32)
        self._log_held: torch.Tensor | None = None
        if (held.sum(0) == 1).all() and (held.sum(1) == 1).all():  # each branch is a part: in the parts' order
            branches = branches[held.argmax(0)]
        else:
            self._log_held = torch.from_numpy(np.where(held.T, 0.0, -np.inf))[..., None, None].to(wide)  # (P, N, 1, 1)
        self._weight = torch.from_numpy(parts.weights[branches]).to(wide)[:, None, None]

    def keep(self, k_SGD: torch.Tensor, v_SGD: torch.Tensor) -> list[KeysAndValues]:
        """Keys and values of each batch, (parts, G, keys, D), out of those of all parts."""
        batched = [[x[index].transpose(1, 2).contiguous() for x in (k_SGD, v_SGD)] for index, _ in self._batches]
        return [(k, v) for k, v in batched]

    def attend(self, q_GMD: torch.Tensor, kept: list[KeysAndValues], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to each part, (P, G, M, D), and its log-sum-exp, (P, G, M)."""
        made = [
            attend_on_cpu(q_GMD.expand(len(k), *q_GMD.shape), k, v, scale, mask=mask)
            for (k, v), (_, mask) in zip(kept, self._batches, strict=True)
        ]
        if len(made) == 1:
            return made[0]
        return torch.cat([o for o, _ in made]), torch.cat([lse for _, lse in made])

    def mix(
        self, o_PGMD: torch.Tensor, l_PGM: torch.Tensor, o_out_GMD: torch.Tensor, l_out_GM: torch.Tensor, weighting: str
    ) -> torch.Tensor:
        """The output's attention from that to the parts and to the output, (G, M, D)."""
        l_branch = l_PGM  # (N, G, M)
        if self._log_held is not None:
            l_held = l_PGM[:, None] + self._log_held  # (P, N, G, M)
            l_branch = l_held.logsumexp(0)
        if weighting == "uniform":
            share = torch.sigmoid(l_branch - l_out_GM).mul_(self._weight)
            share_out = 1 - share.sum(0)
        else:
            counted = l_out_GM + np.log(len(l_branch)) if weighting == "fid" else l_out_GM
            *_, share_out = shares = torch.cat([l_branch, counted[None]]).softmax(0)
            share = shares[:-1]
        if self._log_held is not None:
            share = l_held.softmax(0).mul_(share).sum(1)
        return torch.addcmul((share[..., None] * o_PGMD).sum(0), share_out[..., None], o_out_GMD.to(share_out.dtype))


def _batches(runs: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Runs of rows, the longest first, in batches of like lengths, each filled up with its last: (runs, rows), lengths (runs, 1).

    None is shorter than half of the longest of its batch, unless all have few.
    """
    made, rest = [], runs
    while rest:
        longest = len(rest[0])
        batch = [rows for rows in rest if 2 * len(rows) > longest or longest <= _FEW]
        index = np.stack([np.pad(rows, (0, longest - len(rows)), mode="edge") for rows in batch])
        made.append((index, np.array([[len(rows)] for rows in batch])))
        rest = rest[len(batch) :]
    return made


def _hides(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to scores."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _pieces(length: int) -> list[int]:
    """A segment's rows are read as such pieces, each continuing the one before.

    The operator takes as long for causal attention of few rows as for all of their pairs.
    """
    return [length] if length > 4 * _PIECE else [min(_PIECE, length - at) for at in range(0, length, _PIECE)]


def _merge_into(out_THD: torch.Tensor, lse_HT: torch.Tensor, o: torch.Tensor, lse: torch.Tensor) -> None:
    """Add attention to other keys to (out, lse)."""
    total = torch.logaddexp(lse_HT, lse)
    share = torch.exp(lse - total).T[..., None]
    if out_THD.dtype == share.dtype:
        out_THD.lerp_(o, share)
    else:
        out_THD.copy_(torch.lerp(out_THD.to(share.dtype), o.to(share.dtype), share))
    lse_HT.copy_(total)
