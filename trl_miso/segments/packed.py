"""Packing: examples laid out in one row, and the integer tensors that tell attention which rows see which keys.

Shapes: T packed tokens, Q branch rows (an output row for each of its branches).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from trl_miso.segments.forest import Segment
from trl_miso.segments.tree import Example, float_bits

PREFIX = "miso_"
WEIGHTINGS = ("uniform", "fid", "vanilla")  # the batch carries the index; "uniform" stands for any fixed weights


@dataclass
class Varlen:
    """Arguments of one variable-length attention call over packed rows.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32, (sequences + 1,).
        kv_index: int64, the row of each key. None: the keys are the leading rows, in order.
        kv_offset: int64, the positions by which each key is turned. None: no key is turned.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    kv_index: torch.Tensor | None = None
    kv_offset: torch.Tensor | None = None

    @property
    def sizes(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        return self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k

    def score_pairs(self, causal: bool) -> int:
        """Number of query-key pairs that the call scores, per head. A causal call aligns the last query with the last key."""
        q, k = self.cu_seqlens_q.diff().long(), self.cu_seqlens_k.diff().long()
        pairs = q * k
        if causal:
            pairs = pairs - q * (q - 1) // 2
        return int(pairs.sum())


@dataclass
class PackedSegments:
    """Segment metadata of one packed batch: integers and integer tensors only, made on the CPU by the collator.

    The rows are `[contexts | outputs | other segments]`; `output_start:output_end` are the outputs. Three kernel calls:

    - self call: each segment against its own path root..self, causal (the fields without a prefix).
    - cross call: each output once per branch, against the path of the branch (`branch_`). `branch_q_index` counts rows from
      `output_start`.
    - pairs call: each output once per branch, against the path and then the output itself, causal (`branch_` for queries,
      `pair_` for keys). Only where a sliding window binds.

    The `branch_` and `pair_` fields exist only if some example mixes contexts. Without `kv_index`, the keys are the rows
    themselves; without `branch_kv_index`, rows `0:output_start`; without an `*_offset`, no key is turned.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    num_examples: int
    num_mixed: int  # examples with an output
    num_outputs: int = 0
    weighting: int = 0
    longest: int = 0  # tokens of the longest path with its output; a window of at least this length does not bind
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
        """Batch keys, each with the prefix `miso_`; absent fields are left out."""
        batch = {}
        for name in _FIELDS:
            value = getattr(self, name)
            if value is not None:
                batch[PREFIX + name] = value
        return batch

    @classmethod
    def from_batch(cls, batch: dict[str, Any]) -> "PackedSegments | None":
        """Inverse of `to_batch` on a model's keyword arguments; None if they have no MISO metadata."""
        if PREFIX + "cu_seqlens_q" not in batch:
            return None
        present = {}
        for name in _FIELDS:
            if PREFIX + name in batch:
                present[name] = batch[PREFIX + name]
        return cls(**present)

    @property
    def branch_rows(self) -> torch.Tensor:
        """Output row of every branch row, (Q,), counted from `output_start`."""
        assert self.branch_q_index is not None, "no example of the batch mixes contexts"
        return self.branch_q_index

    @property
    def self_call(self) -> Varlen:
        """Each segment against its own path (causal, bottom-right)."""
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


_FIELDS = tuple(field.name for field in fields(PackedSegments))  # torch.compile cannot ask a class for them


def pack(examples: Sequence[Example], weighting: str, window: int = 0) -> tuple[np.ndarray, np.ndarray, PackedSegments]:
    """Pack examples into one row `[contexts | outputs | other segments]`.

    Args:
        examples: Examples whose tokens are concatenated in this order, each in its own segment order.
        weighting: One of `WEIGHTINGS`.
        window: The model's smallest sliding window, 0 for none. Where it binds, the fields of the pairs call are made too.

    Returns:
        `order` (T,): packed row r holds token `order[r]` of the concatenation. `position_ids` (T,). The metadata.
    """
    # Place the segments. In what follows a segment is known by its place in the packed row.
    placed = _place(examples)
    lengths = np.array([p.segment.length for p in placed])
    starts = np.cumsum([0, *lengths])[:-1]
    place = {(p.example, p.number): i for i, p in enumerate(placed)}
    order = ranges(np.array([p.source for p in placed]), lengths)
    position_ids = ranges(np.array([p.segment.start for p in placed]), lengths)

    # Self call: each segment against its path. Paths of one segment are the rows themselves, with nothing to gather.
    paths = [[place[p.example, i] for i in examples[p.example].path(p.number)] for p in placed]
    kv_lengths = np.array([lengths[path].sum() for path in paths])
    kv_index = None
    if any(len(path) > 1 for path in paths):
        flat = np.concatenate(paths)
        kv_index = torch.from_numpy(ranges(starts[flat], lengths[flat]))
    packed = PackedSegments(
        cu_seqlens_q=cumulative_lengths(lengths),
        cu_seqlens_k=cumulative_lengths(kv_lengths),
        max_seqlen_q=int(lengths.max()),
        max_seqlen_k=int(kv_lengths.max()),
        num_examples=len(examples),
        num_mixed=sum(bool(example.outputs) for example in examples),
        num_outputs=sum(len(example.outputs) for example in examples),
        weighting=WEIGHTINGS.index(weighting),
        longest=int(kv_lengths.max()),
        kv_index=kv_index,
    )
    if packed.num_mixed:
        _pack_branches(packed, examples, place, starts, lengths, window)
    return order, position_ids, packed


class _Placed(NamedTuple):
    """A segment in packed order: segment `number` of an example; its first token is token `source` of the concatenation."""

    example: int
    number: int
    segment: Segment
    source: int


def _place(examples: Sequence[Example]) -> list[_Placed]:
    """All segments in packed order: those in contexts, outputs, others."""
    contexts: list[_Placed] = []
    outputs: list[_Placed] = []
    others: list[_Placed] = []
    source = 0
    for e, example in enumerate(examples):
        in_contexts = example.contexts()
        output_segments = {output.segment for output in example.outputs}
        for s, segment in enumerate(example.segments):
            zone = contexts if s in in_contexts else outputs if s in output_segments else others
            zone.append(_Placed(e, s, segment, source))
            source += segment.length
    return contexts + outputs + others


def _pack_branches(
    packed: PackedSegments,
    examples: Sequence[Example],
    place: dict[tuple[int, int], int],
    starts: np.ndarray,
    lengths: np.ndarray,
    window: int,
) -> None:
    """Fill in the fields of `packed` that describe how outputs see their contexts.

    Args:
        place: (example, segment index) -> place of the segment in the packed row.
        starts, lengths: First row and number of rows of each placed segment.
    """
    outputs, paths, offsets, weights = [], [], [], []  # one entry per branch
    for e, example in enumerate(examples):
        for output in example.outputs:
            for branch in output.branches:
                outputs.append(place[e, output.segment])
                paths.append([place[e, i] for i in example.path(branch.segment)])
                offsets.append(branch.offset)
                weights.append(float_bits(branch.weight))
                # Without a gap the context's end, in the output's view, is the output's beginning.
                context_end = example.end(branch.segment) - branch.offset
                packed.gap |= int(context_end != example.segments[output.segment].start)
    q_lengths = lengths[outputs]
    path_lengths = np.array([lengths[path].sum() for path in paths])
    packed.output_start = int(starts[min(outputs)])
    packed.output_end = int(starts[max(outputs)] + lengths[max(outputs)])
    packed.longest = max(packed.longest, int((path_lengths + q_lengths).max()))

    # Queries of cross and pairs call: the output's rows, once per branch, each row with the weight of its branch.
    packed.branch_cu_seqlens_q = cumulative_lengths(q_lengths)
    packed.branch_max_seqlen_q = int(q_lengths.max())
    packed.branch_q_index = torch.from_numpy(ranges(starts[outputs] - packed.output_start, q_lengths))
    packed.branch_weight = torch.from_numpy(np.repeat(np.array(weights), q_lengths))

    # Keys of the cross call: the path of each branch, gathered unless the contexts are rows 0..output_start in branch order.
    packed.branch_cu_seqlens_k = cumulative_lengths(path_lengths)
    packed.branch_max_seqlen_k = int(path_lengths.max())
    flat = np.concatenate(paths)
    if not np.array_equal(flat, np.arange(min(outputs))):
        packed.branch_kv_index = torch.from_numpy(ranges(starts[flat], lengths[flat]))
    # Keys are turned by minus the offset, instead of queries by the offset: contexts have fewer rows and heads.
    if any(offsets):
        packed.branch_kv_offset = torch.from_numpy(np.repeat(-np.array(offsets), path_lengths))

    # Keys of the pairs call: the path of each branch, turned, then the output itself, not turned.
    if 0 < window < packed.longest:
        flat = np.concatenate([[*path, output] for path, output in zip(paths, outputs, strict=True)])
        kv_lengths = path_lengths + q_lengths
        packed.pair_cu_seqlens_k = cumulative_lengths(kv_lengths)
        packed.pair_max_seqlen_k = int(kv_lengths.max())
        packed.pair_kv_index = torch.from_numpy(ranges(starts[flat], lengths[flat]))
        if any(offsets):
            run_offsets = np.stack([-np.array(offsets), np.zeros_like(offsets)], axis=1).ravel()
            run_lengths = np.stack([path_lengths, q_lengths], axis=1).ravel()
            packed.pair_kv_offset = torch.from_numpy(np.repeat(run_offsets, run_lengths))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate `arange(start, start + length)` over all pairs."""
    shift = starts - np.cumsum([0, *lengths])[:-1]
    return np.repeat(shift, lengths) + np.arange(lengths.sum())


def cumulative_lengths(lengths: np.ndarray) -> torch.Tensor:
    """`cu_seqlens` of these sequence lengths: int32, (sequences + 1,)."""
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
