"""What the outputs of a generation read: each segment of the contexts once, and how these parts make up a context.

A *part* are segments as the outputs of some branches see them, their keys turned by these branches' offset (`segments.py`). Branches that
hold a segment at one offset have it in common: of contexts of one length, and with `after_longest`, a common prefix is read once.
A branch is the union of its parts p, with `(O_p, l_p)` the attention to a part alone and its log-sum-exp:

    l_i = logsumexp_{p in i} l_p
    out = share_out O_out + sum_p c_p O_p,    c_p = sum_{i holds p} share_i exp(l_p - l_i)

with the shares of `mixture.py`. Shapes as there, and: P parts, N branches, S key rows of the parts, C rows that generate from one request,
M = C H / G queries of a key-value head.
"""

from collections.abc import Sequence

import numpy as np
import torch

from trl_miso.attention.kernels import attend_on_cpu, heads_first, merge_two
from trl_miso.segments import Example
from trl_miso.segments.packed import Varlen, cumulative_lengths, ranges

KeysAndValues = tuple[torch.Tensor, torch.Tensor]

_FEW = 192  # rows or keys: fewer, and masked ones among them, cost less than another call


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
        held: dict[tuple[int, int, int], list[int]] = {}  # branches that hold a segment of a request at an offset
        branch_request, weights = [], list[float]()
        for e, example in enumerate(examples):
            for view in example.branches:
                for segment in example.path(view.segment):
                    held.setdefault((e, segment, view.offset), []).append(len(weights))
                branch_request.append(e)
                weights.append(view.weight)
        # Segments that the same branches hold, which continue each other, are one part.
        runs: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        for run, branches in held.items():
            runs.setdefault(tuple(branches), []).append(run)
        packed = {(e, s): segment.length for e, x in enumerate(examples) for s, segment in enumerate(x.segments[:-1])}
        starts = dict(zip(packed, np.cumsum([0, *packed.values()]), strict=False))
        pieces = [[(starts[e, s], packed[e, s]) for e, s, _ in run] for run in runs.values()]
        self.lengths = np.array([sum(length for _, length in piece) for piece in pieces])
        self.request = np.array([run[0][0] for run in runs.values()])
        self.rows = ranges(*np.array([row for piece in pieces for row in piece]).T)
        self.offset = np.repeat([-run[0][2] for run in runs.values()], self.lengths)
        pairs = sorted((branch, part) for part, branches in enumerate(runs) for branch in branches)
        self.branch, self.part = np.array(pairs).T
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
        keys = ranges(self.starts[self.part], self.lengths[self.part])
        lengths = self.branch_lengths
        kept = np.minimum(lengths, window)
        return keys[ranges(lengths.cumsum() - kept, kept)]

    def call(self, device: torch.device) -> Varlen:
        """How the parts' keys are taken from the packed rows."""
        identity = np.array_equal(self.rows, np.arange(len(self.rows)))
        index = None if identity else torch.from_numpy(self.rows).to(device)
        offset = torch.from_numpy(self.offset).to(device) if self.offset.any() else None
        ends = cumulative_lengths(self.lengths).to(device)
        # The last is more than any offset: so many positions a rotation is made for.
        return Varlen(ends, ends, 1, int(self.offset.max()) + 1, index, offset)


class Reading:
    """Attention of packed contexts to themselves on the CPU: causal attention of every segment to its path, without copies of paths.

    A segment is read by itself, and in one call by all that continue it, which follow it since trees are packed depth first. What
    are few rows together is read in one call with a mask.
    """

    def __init__(self, examples: Sequence[Example]):
        self._bounds = [0]  # first rows of the segments, one after the other, and the end
        self._paths: list[list[int]] = []
        for example in examples:
            first = len(self._paths)
            for s, segment in enumerate(example.segments[:-1]):
                self._paths.append([first + above for above in example.path(s)])
                self._bounds.append(self._bounds[-1] + segment.length)
        self._last = list(range(len(self._paths)))  # of the segments that continue each
        for i, path in enumerate(self._paths):
            for above in path:
                self._last[above] = i
        # (rows, keys, mask): without a mask, rows from the keys' first on are causal, rows after the keys see all.
        self._calls: list[tuple[slice, slice, torch.Tensor | None]] = []
        self._plan()
        self._masks: dict[torch.dtype, list[torch.Tensor | None]] = {}

    def _plan(self) -> None:
        todo = [(0, len(self._paths) - 1)]  # segments first..last, whole trees below what was planned before
        while todo:
            first, stop = todo.pop()
            last = self._last[first]
            while last < stop and self._size(first, self._last[last + 1]) <= _FEW:  # trees that are few together
                last = self._last[last + 1]
            if last < stop:
                todo.append((last + 1, stop))
            rows = self._rows(first, last)
            if first < last and self._size(first, last) <= _FEW:
                self._calls.append((rows, rows, self._mask(first, last)))
                continue
            own = self._rows(first, first)
            piece = _piece(own.stop - own.start)
            whole = own.stop - own.start > 2 * piece  # those that continue it read it in one call, else with its pieces
            for start in range(own.start, own.stop, piece):
                end = min(own.stop, start + piece)
                self._calls.append((slice(start, own.stop if whole else rows.stop), slice(start, end), None))
            if first < last:  # one tree
                if whole:
                    self._calls.append((slice(own.stop, rows.stop), own, None))
                todo.append((first + 1, last))

    def _rows(self, first: int, last: int) -> slice:
        return slice(self._bounds[first], self._bounds[last + 1])

    def _size(self, first: int, last: int) -> int:
        return self._bounds[last + 1] - self._bounds[first]

    def _mask(self, first: int, last: int) -> torch.Tensor:
        """(rows, rows) bool: which the rows of the segments first..last do not see of each other."""
        bounds = np.array(self._bounds) - self._bounds[first]
        seen = np.zeros((bounds[last + 1],) * 2, dtype=bool)
        for i in range(first, last + 1):
            for above in self._paths[i]:
                if above >= first:
                    seen[bounds[i] : bounds[i + 1], bounds[above] : bounds[above + 1]] = True
        return torch.from_numpy(~np.tril(seen))

    def attend(self, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, scale: float) -> torch.Tensor:
        """(T, H, D)."""
        dtype = q_THD.dtype
        if dtype not in self._masks:
            self._masks[dtype] = [None if mask is None else _hides(mask, dtype) for *_, mask in self._calls]
        q, k, v = (heads_first(x) for x in (q_THD, k_TGD, v_TGD))
        out = lse = None
        filled = 0
        for (rows, keys, _), mask in zip(self._calls, self._masks[dtype], strict=True):
            causal = mask is None and rows.start == keys.start
            read = attend_on_cpu(q[:, :, rows], k[:, :, keys], v[:, :, keys], scale, causal, mask)
            if out is None or lse is None:
                out, lse = (
                    read
                    if len(q_THD) == rows.stop - rows.start
                    else (torch.empty_like(q), read[1].new_empty(q.shape[:3]))
                )
            if rows.start < filled:
                read = merge_two((out[:, :, rows], lse[:, :, rows]), read)
            if read[0] is not out:
                out[:, :, rows], lse[:, :, rows] = read
            filled = max(filled, rows.stop)
        assert out is not None, "contexts have tokens"
        return out[0].transpose(0, 1)


class DenseParts:
    """The parts of all requests in few dense batches of like lengths, for a kernel that takes no ragged ones.

    Shorter parts than the longest of their batch are filled up and masked. The P parts stand in the order of the batches, part p
    at `place[p]`.
    """

    def __init__(self, parts: Parts, dtype: torch.dtype):
        order = np.argsort(-parts.lengths, kind="stable")
        place = np.argsort(order)
        self.place = torch.from_numpy(place)
        request = torch.from_numpy(parts.request[order])
        # Of each batch (parts, keys) key rows, a mask, and whose its parts are.
        self._batches: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = []
        at = 0
        for index, lengths in _batches([parts.starts[part] + np.arange(parts.lengths[part]) for part in order]):
            hidden = torch.from_numpy(np.arange(index.shape[1]) >= lengths)[:, None, None]
            mask = _hides(hidden, dtype) if hidden.any() else None
            self._batches.append((torch.from_numpy(index), mask, request[at : at + len(index)]))
            at += len(index)
        held = np.zeros((len(parts.weights), len(order)), dtype=bool)
        held[parts.branch, place[parts.part]] = True
        wide = torch.promote_types(dtype, torch.float32)
        self._log_held: torch.Tensor | None = None
        weights = parts.weights
        if (held.sum(0) == 1).all() and (held.sum(1) == 1).all():  # each branch is a part: in the parts' order
            weights = weights[held.argmax(0)]
        elif (parts.request == 0).all():
            self._log_held = torch.from_numpy(np.where(held.T, 0.0, -np.inf))[..., None, None].to(wide)  # (P, N, 1, 1)
        self._weight = torch.from_numpy(weights).to(wide)[:, None, None]

    def keep(self, k_SGD: torch.Tensor, v_SGD: torch.Tensor) -> list[KeysAndValues]:
        """Keys and values of each batch, (parts, G, keys, D), out of those of all parts."""
        batched = [[x[index].transpose(1, 2).contiguous() for x in (k_SGD, v_SGD)] for index, *_ in self._batches]
        return [(k, v) for k, v in batched]

    def attend(
        self, q_RGMD: torch.Tensor, kept: list[KeysAndValues], scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the queries of R requests to each part, (P, G, M, D), and its log-sum-exp, (P, G, M)."""
        made = []
        for (k, v), (_, mask, request) in zip(kept, self._batches, strict=True):
            q = q_RGMD.expand(len(k), -1, -1, -1) if len(q_RGMD) == 1 else q_RGMD.index_select(0, request)
            made.append(attend_on_cpu(q, k, v, scale, mask=mask))
        if len(made) == 1:
            return made[0]
        return torch.cat([o for o, _ in made]), torch.cat([lse for _, lse in made])

    def mix(
        self, o_PGMD: torch.Tensor, l_PGM: torch.Tensor, o_out_GMD: torch.Tensor, l_out_GM: torch.Tensor, weighting: str
    ) -> torch.Tensor:
        """The attention of one request's output from that to the parts and to the output, (G, M, D)."""
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

    None is shorter than half of the longest of its batch, unless few rows fill all of it up.
    """
    made, rest = [], runs
    while rest:
        longest = len(rest[0])
        filling = np.cumsum([longest - len(rows) for rows in rest])
        count = sum(2 * len(rows) > longest or fill <= _FEW for rows, fill in zip(rest, filling, strict=True))
        batch, rest = rest[:count], rest[count:]
        index = np.stack([np.pad(rows, (0, longest - len(rows)), mode="edge") for rows in batch])
        made.append((index, np.array([[len(rows)] for rows in batch])))
    return made


def _hides(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to scores."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _piece(length: int) -> int:
    """Keys of a segment that are read at once: the operator takes as long for few rows' causal attention as for all pairs of them."""
    return 256 if length <= 1024 else length
