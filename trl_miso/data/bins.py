"""Packing of prepared rows: best-fit bins of whole examples."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from trl.data_utils import get_dataset_column_names

from trl_miso.data.dropped import AnyDataset
from trl_miso.data.mapping import map_batches
from trl_miso.data.preparation import COLUMNS
from trl_miso.segments import decode

ROW_LENGTHS = "miso_row_lengths"  # column of a bin: the tokens of each of its rows


def plan_bins(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the indices of the examples in each bin; an example over `capacity` gets a bin of its own.

    TRL's `bfd` strategy does the same but cuts what overflows, which would cut a context.
    """
    room: list[tuple[int, int]] = []  # (tokens left, index of the bin), sorted
    bins: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect.bisect_left(room, (sizes[index], -1))
        if place == len(room):
            left, which = capacity, len(bins)
            bins.append([])
        else:
            left, which = room.pop(place)
        bins[which].append(index)
        if left > sizes[index]:
            bisect.insort(room, (left - sizes[index], which))
    return bins


def pack_rows(dataset: AnyDataset, max_length: int, shared: bool, num_proc: int | None) -> AnyDataset:
    """Pack prepared rows into bins of at most `max_length` tokens, planned per batch of rows as in TRL.

    Args:
        shared: Whether common prefixes are computed, and so counted, once.
    """
    names = get_dataset_column_names(dataset)
    dataset = dataset.select_columns([name for name in (*COLUMNS, ROW_LENGTHS) if name in names])
    return map_batches(dataset, _Packing(max_length, shared), num_proc, "Packing examples")


@dataclass(frozen=True)
class _Packing:
    """Maps a batch of prepared rows to bins: the concatenated columns of their rows, and the length of each row."""

    max_length: int
    shared: bool

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        bins = plan_bins([self._size(layout) for layout in batch["miso_layout"]], self.max_length)
        lengths = [[len(ids)] for ids in batch["input_ids"]]
        packed: dict[str, list] = {}
        # dict: of bins that are packed again, datasets' lazy batch would give None for a column that both sides have.
        for name, values in ({ROW_LENGTHS: lengths} | dict(batch)).items():
            packed[name] = [list(chain.from_iterable(values[i] for i in members)) for members in bins]
        return packed

    def _size(self, layout: list[int]) -> int:
        """The tokens that a row takes in a bin."""
        size = 0
        for example in decode(layout):
            size += example.num_tokens if self.shared else example.num_unshared_tokens
        return size
