"""Packing: examples laid out in one row, and the integer tensors with which attention finds its way in it."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from trl_miso.segments.tree import Example, Segment, float_bits

PREFIX = "miso_"
WEIGHTINGS = ("uniform", "fid", "vanilla")  # the batch carries the index; "uniform" stands for any fixed weights


def plan_bins(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of the examples in each bin; one larger than `capacity` gets a bin of its own.

    TRL's `bfd` does the same but cuts what overflows, which would cut a context.
    """
    room: list[tuple[int, int]] = []  # (room left, bin), sorted
    bins: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(room, (sizes[index], -1))
        if at == len(room):
            left, which = capacity, len(bins)
            bins.append([])
        else:
            left, which = room.pop(at)
        bins[which].append(index)
        if left > sizes[index]:
            bisect.insort(room, (left - sizes[index], which))
    return bins


@dataclass
class Varlen:
    """Arguments of one variable-length attention call over packed rows.

    `cu_seqlens_*` are int32 of shape (sequences + 1,). `kv_index` (int64) gathers the key rows; without it the keys
    are the leading rows, in order. Keys are turned by `kv_offset` positions (int64, one a gathered row), if it is given.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    kv_index: torch.Tensor | None = None
    kv_offset: torch.Tensor | None = None

    def score_pairs(self, causal: bool) -> int:
        """Query-key pairs that the call scores, per head; a causal call aligns the last query with the last key."""
        q, k = self.cu_seqlens_q.diff().long(), self.cu_seqlens_k.diff().long()
        return int((q * k - q * (q - 1) // 2 if causal else q * k).sum())


@dataclass
class PackedSegments:
    """Segment metadata of one packed batch: integers and integer tensors only, made on the CPU by the collator.

    The self call is `(cu_seqlens_q, cu_seqlens_k, ...)`: each segment against its own path root..self. The fields that
    start with `branch_` and `pair_` exist only if some example mixes contexts. Rows `output_start:output_end` of the
    batch are the mixing outputs; `branch_q_index` counts from `output_start`.

    Absent `kv_index`: keys are the rows themselves. Absent `branch_kv_index`: keys are rows `0:output_start`. Absent
    `*_offset`: nothing to rotate.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    num_examples: int
    num_mixed: int
    weighting: int = 0
    longest: int = 0  # tokens of the longest path + output: a window at least this long does not bind
    gap: int = 0  # 1 if some context does not end where its output begins (succ, after_longest)
    kv_index: torch.Tensor | None = None
    output_start: int = 0
    output_end: int = 0
    branch_cu_seqlens_q: torch.Tensor | None = None
    branch_cu_seqlens_k: torch.Tensor | None = None
    branch_max_seqlen_q: int = 0
    branch_max_seqlen_k: int = 0
    branch_q_index: torch.Tensor | None = None
    branch_weight: torch.Tensor | None = None  # (Q,) float64 bit patterns
    branch_kv_index: torch.Tensor | None = None
    branch_kv_offset: torch.Tensor | None = None
    pair_cu_seqlens_k: torch.Tensor | None = None
    pair_max_seqlen_k: int = 0
    pair_kv_index: torch.Tensor | None = None
    pair_kv_offset: torch.Tensor | None = None

    def to_batch(self) -> dict[str, Any]:
        """Batch keys, each with the project's prefix; absent fields are left out."""
        items = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {PREFIX + name: value for name, value in items if value is not None}

    @classmethod
    def from_batch(cls, batch: dict[str, Any]) -> "PackedSegments | None":
        """Inverse of `to_batch` on a model's keyword arguments; None where there is no MISO metadata."""
        if PREFIX + "cu_seqlens_q" not in batch:
            return None
        return cls(**{f.name: batch[PREFIX + f.name] for f in fields(cls) if PREFIX + f.name in batch})

    @property
    def branch_rows(self) -> torch.Tensor:
        """(Q,) output row, from `output_start`, of every branch row."""
        assert self.branch_q_index is not None, "no example of the batch mixes contexts"
        return self.branch_q_index

    @property
    def self_call(self) -> Varlen:
        return Varlen(self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k, self.kv_index)

    @property
    def cross_call(self) -> Varlen:
        """Output rows against each context's path (not causal)."""
        assert self.branch_cu_seqlens_q is not None and self.branch_cu_seqlens_k is not None
        sizes = self.branch_max_seqlen_q, self.branch_max_seqlen_k
        return Varlen(
            self.branch_cu_seqlens_q, self.branch_cu_seqlens_k, *sizes, self.branch_kv_index, self.branch_kv_offset
        )

    @property
    def pairs_call(self) -> Varlen:
        """Output rows against each context's path followed by the output itself (causal, bottom-right)."""
        assert self.branch_cu_seqlens_q is not None and self.pair_cu_seqlens_k is not None
        sizes = self.branch_max_seqlen_q, self.pair_max_seqlen_k
        return Varlen(self.branch_cu_seqlens_q, self.pair_cu_seqlens_k, *sizes, self.pair_kv_index, self.pair_kv_offset)


def pack(examples: Sequence[Example], weighting: str, window: int = 0) -> tuple[np.ndarray, np.ndarray, PackedSegments]:
    """Pack examples into one row `[contexts | outputs | single runs]`.

    Args:
        examples: Examples whose tokens are concatenated in this order, each in its own segment order.
        weighting: One of `WEIGHTINGS`.
        window: The model's smallest sliding window, 0 for none. Where it binds, the pairs form's fields are made too.

    Returns:
        `order` (T,): packed row r holds token `order[r]` of the concatenation; `position_ids` (T,); the metadata.
    """
    table = _place(examples)
    lengths = np.array([segment.length for _, _, segment, _ in table])
    starts = np.cumsum([0, *lengths])[:-1]
    sources = np.array([source for *_, source in table])
    row = {(e, s): i for i, (e, s, _, _) in enumerate(table)}  # (example, segment) -> packed segment

    order = ranges(sources, lengths)
    position_ids = ranges(np.array([segment.start for _, _, segment, _ in table]), lengths)

    paths = [[row[e, i] for i in examples[e].path(s)] for e, s, _, _ in table]
    kv_lengths = np.array([lengths[path].sum() for path in paths])
    shared = any(len(path) > 1 for path in paths)
    flat = np.concatenate(paths)
    packed = PackedSegments(
        cu_seqlens_q=cumulative_lengths(lengths),
        cu_seqlens_k=cumulative_lengths(kv_lengths),
        max_seqlen_q=int(lengths.max()),
        max_seqlen_k=int(kv_lengths.max()),
        num_examples=len(examples),
        num_mixed=sum(bool(example.branches) for example in examples),
        weighting=WEIGHTINGS.index(weighting),
        longest=int(kv_lengths.max()),
        kv_index=torch.from_numpy(ranges(starts[flat], lengths[flat])) if shared else None,
    )
    if packed.num_mixed:
        _pack_branches(packed, examples, row, starts, lengths, window)
    return order, position_ids, packed


def _place(examples: Sequence[Example]) -> list[tuple[int, int, Segment, int]]:
    """(example, segment index, segment, first token in the concatenation), in packed order."""
    placed: tuple[list, list, list] = [], [], []
    source = 0
    for e, example in enumerate(examples):
        for s, segment in enumerate(example.segments):
            where = 2 if not example.branches else 1 if s == len(example.segments) - 1 else 0
            placed[where].append((e, s, segment, source))
            source += segment.length
    return [*placed[0], *placed[1], *placed[2]]


def _pack_branches(
    packed: PackedSegments,
    examples: Sequence[Example],
    row: dict[tuple[int, int], int],
    starts: np.ndarray,
    lengths: np.ndarray,
    window: int,
) -> None:
    """Fill in the fields of `packed` that describe how outputs see their contexts."""
    outputs, paths, offsets, weights = [], [], [], []  # one entry a branch
    for e, example in enumerate(examples):
        for branch in example.branches:
            outputs.append(row[e, len(example.segments) - 1])
            paths.append([row[e, i] for i in example.path(branch.segment)])
            offsets.append(branch.offset)
            weights.append(float_bits(branch.weight))
            packed.gap |= int(example.end(branch.segment) - branch.offset != example.segments[-1].start)
    q_lengths = lengths[outputs]
    path_lengths = np.array([lengths[path].sum() for path in paths])
    flat = np.concatenate(paths)
    packed.output_start = int(starts[min(outputs)])
    packed.output_end = int(starts[max(outputs)] + lengths[max(outputs)])
    packed.longest = max(packed.longest, int((path_lengths + q_lengths).max()))
    packed.branch_cu_seqlens_q = cumulative_lengths(q_lengths)
    packed.branch_cu_seqlens_k = cumulative_lengths(path_lengths)
    packed.branch_max_seqlen_q = int(q_lengths.max())
    packed.branch_max_seqlen_k = int(path_lengths.max())
    packed.branch_q_index = torch.from_numpy(ranges(starts[outputs] - packed.output_start, q_lengths))
    packed.branch_weight = torch.from_numpy(np.repeat(np.array(weights), q_lengths))
    if any(offsets):  # turning keys to where the output's positions want them costs less than turning its many queries
        packed.branch_kv_offset = torch.from_numpy(np.repeat(-np.array(offsets), path_lengths))
    if not np.array_equal(flat, np.arange(min(outputs))):  # else the contexts are rows 0..output_start, in order
        packed.branch_kv_index = torch.from_numpy(ranges(starts[flat], lengths[flat]))
    if 0 < window < packed.longest:
        with_output = [[*path, output] for path, output in zip(paths, outputs, strict=True)]
        flat = np.concatenate(with_output)
        kv_lengths = path_lengths + q_lengths
        packed.pair_cu_seqlens_k = cumulative_lengths(kv_lengths)
        packed.pair_max_seqlen_k = int(kv_lengths.max())
        packed.pair_kv_index = torch.from_numpy(ranges(starts[flat], lengths[flat]))
        if any(offsets):
            per_run = np.stack([-np.array(offsets), np.zeros_like(offsets)], axis=1).ravel()
            run_lengths = np.stack([path_lengths, q_lengths], axis=1).ravel()
            packed.pair_kv_offset = torch.from_numpy(np.repeat(per_run, run_lengths))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated `arange(start, start + length)`."""
    shift = starts - np.cumsum([0, *lengths])[:-1]
    return np.repeat(shift, lengths) + np.arange(lengths.sum())


def cumulative_lengths(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
