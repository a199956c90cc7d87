"""Faster paths of generation on the CPU. `decoding.py` computes the same with the kernels alone.

`Reading` reads contexts without a copy of a path per segment. `DenseParts` lets a new token attend to all parts in few dense
calls, for a kernel that takes no ragged batches.

Shapes: T packed tokens, P parts, N branches, R requests, C rows that generate from one request, H query heads, G key-value
heads, M = C H / G queries of a key-value head, D head dimension.
"""

from collections.abc import Sequence

import numpy as np
import torch

from trl_miso.attention.kernels import attend_on_cpu, heads_first
from trl_miso.attention.merge import merge_two
from trl_miso.generation.context_parts import KeysAndValues, Parts
from trl_miso.segments import Example

_FEW = 192  # rows or keys: up to this number, masked ones among them, they cost less than another call


class Reading:
    """Causal attention of every segment to its path, over packed contexts on the CPU, without copies of paths.

    A segment's keys are read by the segment itself, and in one call by all segments that continue it. These follow the segment,
    since trees are packed depth first. Trees of few rows are read in one call with a mask.
    """

    def __init__(self, examples: Sequence[Example]):
        self._bounds = [0]  # first row of each segment, then the end
        self._paths: list[list[int]] = []
        for example in examples:
            first = len(self._paths)
            for s, segment in enumerate(example.segments[:-1]):
                self._paths.append([first + ancestor for ancestor in example.path(s)])
                self._bounds.append(self._bounds[-1] + segment.length)
        self._last = list(range(len(self._paths)))  # last segment of the subtree below each segment
        for i, path in enumerate(self._paths):
            for ancestor in path:
                self._last[ancestor] = i
        # (rows, keys, mask). Without a mask, rows from the first key on are causal, and rows after the keys see all keys.
        self._calls: list[tuple[slice, slice, torch.Tensor | None]] = []
        self._plan()
        self._masks: dict[torch.dtype, list[torch.Tensor | None]] = {}

    def _plan(self) -> None:
        todo = [
            (0, len(self._paths) - 1)
        ]  # ranges of segments, each of complete trees below the segments planned so far
        while todo:
            first, stop = todo.pop()
            # Take one tree, and the trees after it as long as all have few rows together.
            last = self._last[first]
            while last < stop and self._size(first, self._last[last + 1]) <= _FEW:
                last = self._last[last + 1]
            if last < stop:
                todo.append((last + 1, stop))
            rows = self._rows(first, last)
            if first < last and self._size(first, last) <= _FEW:
                self._calls.append((rows, rows, self._mask(first, last)))
                continue

            # One tree: its root by pieces of keys, then the subtrees below the root.
            root = self._rows(first, first)
            piece = _keys_per_call(root.stop - root.start)
            # Descendants read a long root in one call of their own, a short one together with the root's own rows.
            is_long = root.stop - root.start > 2 * piece
            for start in range(root.start, root.stop, piece):
                end = min(root.stop, start + piece)
                self._calls.append((slice(start, root.stop if is_long else rows.stop), slice(start, end), None))
            if first < last:
                if is_long:
                    self._calls.append((slice(root.stop, rows.stop), root, None))
                todo.append((first + 1, last))

    def _rows(self, first: int, last: int) -> slice:
        return slice(self._bounds[first], self._bounds[last + 1])

    def _size(self, first: int, last: int) -> int:
        return self._bounds[last + 1] - self._bounds[first]

    def _mask(self, first: int, last: int) -> torch.Tensor:
        """(rows, rows) bool, True where a row of the segments first..last does not see another."""
        bounds = np.array(self._bounds) - self._bounds[first]
        seen = np.zeros((bounds[last + 1],) * 2, dtype=bool)
        for i in range(first, last + 1):
            for ancestor in self._paths[i]:
                if ancestor >= first:
                    seen[bounds[i] : bounds[i + 1], bounds[ancestor] : bounds[ancestor + 1]] = True
        return torch.from_numpy(~np.tril(seen))

    def attend(self, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of all rows to their paths, (T, H, D)."""
        dtype = q_THD.dtype
        if dtype not in self._masks:
            self._masks[dtype] = [None if mask is None else _score_mask(mask, dtype) for *_, mask in self._calls]
        q, k, v = (heads_first(x) for x in (q_THD, k_TGD, v_TGD))
        out = lse = None
        filled = 0  # rows before this one have attended to some of their keys
        for (rows, keys, _), mask in zip(self._calls, self._masks[dtype], strict=True):
            causal = mask is None and rows.start == keys.start
            result = attend_on_cpu(q[:, :, rows], k[:, :, keys], v[:, :, keys], scale, causal, mask)
            if out is None or lse is None:
                if len(q_THD) == rows.stop - rows.start:
                    out, lse = result
                else:
                    out, lse = torch.empty_like(q), result[1].new_empty(q.shape[:3])
            if rows.start < filled:
                result = merge_two((out[:, :, rows], lse[:, :, rows]), result)
            if result[0] is not out:
                out[:, :, rows], lse[:, :, rows] = result
            filled = max(filled, rows.stop)
        assert out is not None, "contexts have tokens"
        return out[0].transpose(0, 1)


class DenseParts:
    """The parts of all requests in few dense batches of similar lengths, for a kernel that takes no ragged batches.

    Parts shorter than the longest of their batch are padded and masked. Results are in the order of the batches, in which part p
    has index `place[p]`.
    """

    def __init__(self, parts: Parts, dtype: torch.dtype):
        order = np.argsort(-parts.lengths, kind="stable")
        place = np.argsort(order)
        self.place = torch.from_numpy(place)
        request = torch.from_numpy(parts.request[order])
        # Per batch: key rows (parts, keys), a mask, and the request of each part.
        self._batches: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = []
        first = 0
        runs = [parts.starts[part] + np.arange(parts.lengths[part]) for part in order]
        for index, lengths in padded_batches(runs):
            hidden = torch.from_numpy(np.arange(index.shape[1]) >= lengths)[:, None, None]
            mask = _score_mask(hidden, dtype) if hidden.any() else None
            self._batches.append((torch.from_numpy(index), mask, request[first : first + len(index)]))
            first += len(index)

        held = np.zeros((len(parts.weights), len(order)), dtype=bool)
        held[parts.branch, place[parts.part]] = True
        wide = torch.promote_types(dtype, torch.float32)
        self._log_held: torch.Tensor | None = None
        weights = parts.weights
        if (held.sum(0) == 1).all() and (
            held.sum(1) == 1
        ).all():  # each branch is one part: weights in order of the parts
            weights = weights[held.argmax(0)]
        elif (parts.request == 0).all():
            self._log_held = torch.from_numpy(np.where(held.T, 0.0, -np.inf))[..., None, None].to(wide)  # (P, N, 1, 1)
        self._weight = torch.from_numpy(weights).to(wide)[:, None, None]

    def keep(self, k_SGD: torch.Tensor, v_SGD: torch.Tensor) -> list[KeysAndValues]:
        """Keys and values of each batch, (parts, G, keys, D), from those of all parts."""
        kept = []
        for index, _, _ in self._batches:
            kept.append((k_SGD[index].transpose(1, 2).contiguous(), v_SGD[index].transpose(1, 2).contiguous()))
        return kept

    def attend(
        self, q_RGMD: torch.Tensor, kept: list[KeysAndValues], scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the queries of R requests to each part, (P, G, M, D), and its log-sum-exp, (P, G, M)."""
        outs, lses = [], []
        for (k, v), (_, mask, request) in zip(kept, self._batches, strict=True):
            q = q_RGMD.expand(len(k), -1, -1, -1) if len(q_RGMD) == 1 else q_RGMD.index_select(0, request)
            out, lse = attend_on_cpu(q, k, v, scale, mask=mask)
            outs.append(out)
            lses.append(lse)
        if len(outs) == 1:
            return outs[0], lses[0]
        return torch.cat(outs), torch.cat(lses)

    def mix(
        self, o_PGMD: torch.Tensor, l_PGM: torch.Tensor, o_out_GMD: torch.Tensor, l_out_GM: torch.Tensor, weighting: str
    ) -> torch.Tensor:
        """Attention of one request's output, (G, M, D), from its attention to the parts and to the output (eqs. 3, 4, 7)."""
        # Branches from parts: l_i = logsumexp_{p in i} l_p.
        l_branch_NGM = l_PGM
        if self._log_held is not None:
            l_held = l_PGM[:, None] + self._log_held  # (P, N, G, M)
            l_branch_NGM = l_held.logsumexp(0)

        # Shares of branches and output, see `merge.attention_shares`. "uniform" stands for any fixed weights.
        if weighting == "uniform":
            share = torch.sigmoid(l_branch_NGM - l_out_GM).mul_(self._weight)
            share_out = 1 - share.sum(0)
        else:
            counted = l_out_GM + np.log(len(l_branch_NGM)) if weighting == "fid" else l_out_GM
            shares = torch.cat([l_branch_NGM, counted[None]]).softmax(0)
            share, share_out = shares[:-1], shares[-1]

        # Shares of parts: c_p = sum_{i holds p} share_i exp(l_p - l_i).
        if self._log_held is not None:
            share = l_held.softmax(0).mul_(share).sum(1)
        return torch.addcmul((share[..., None] * o_PGMD).sum(0), share_out[..., None], o_out_GMD.to(share_out.dtype))


def padded_batches(runs: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batch runs of rows, longest first, by similar length: rows (runs, longest), padded with a run's last, and lengths (runs, 1).

    No run is shorter than half of the longest of its batch, unless the batch has little padding altogether.
    """
    batches, rest = [], runs
    while rest:
        longest = len(rest[0])
        padding = np.cumsum([longest - len(rows) for rows in rest])
        count = sum(2 * len(rows) > longest or pad <= _FEW for rows, pad in zip(rest, padding, strict=True))
        batch, rest = rest[:count], rest[count:]
        index = np.stack([np.pad(rows, (0, longest - len(rows)), mode="edge") for rows in batch])
        batches.append((index, np.array([[len(rows)] for rows in batch])))
    return batches


def _score_mask(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where keys are visible, -inf where hidden: added to the scores."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _keys_per_call(length: int) -> int:
    """Keys of a segment per call: for few rows the operator's causal attention takes as long as attention to all keys."""
    return 256 if length <= 1024 else length
