"""`map` over datasets in memory and streams alike: batches of rows with their numbers, and errors that name the row."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Features, IterableDataset, Value
from pyarrow import ArrowException  # type: ignore[import-untyped]
from trl.data_utils import get_dataset_column_names

from trl_miso.data.columns import read_beside
from trl_miso.data.dropped import AnyDataset
from trl_miso.data.schema import is_given

logger = get_logger(__name__)

REASON = Features(miso_dropped=Value("string"))  # why a row is dropped; empty for rows that are kept


def rows_of(batch: dict[str, list]) -> list[dict[str, Any]]:
    """The rows of a batch of columns."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


@contextmanager
def naming(index: int) -> Iterator[None]:
    """Prefix a ValueError with the number of the row."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error


@dataclass(frozen=True)
class _OfThisCode:
    """A function with the code it runs in: `datasets` keeps results by what is pickled, and modules are pickled by name alone."""

    function: Callable
    code: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def of_this_code(function: Callable) -> Callable:
    """The function for `Dataset.map`, so that results cached by another version of this package are made anew."""
    return _OfThisCode(function, package_digest())


@cache
def package_digest() -> str:
    """Digest of this package's source."""
    folder = Path(__file__).parents[1]
    digest = sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def same_columns(dataset: IterableDataset, text_field: str) -> IterableDataset:
    """A stream whose rows all have the columns of the first row, null where absent: later maps remove columns by name.

    A later row with another column that preparation reads raises ValueError.
    """
    if dataset.column_names is not None or not (names := get_dataset_column_names(dataset)):
        return dataset
    fill = _FillColumns(tuple(names), tuple(sorted(read_beside(names, text_field))))
    return dataset.map(fill, with_indices=True).select_columns(names)


@dataclass(frozen=True)
class _FillColumns:
    names: tuple[str, ...]
    refused: tuple[str, ...]

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        late = [name for name in self.refused if is_given(row, name)]
        if late:
            raise ValueError(
                f"Row {index}: Got columns {late}, which the first row of the stream lacks, expected the columns of the first row. "
                "Fix: give every row the same columns, None where it has no value."
            )
        return {name: row.get(name) for name in self.names}


def map_rows(dataset: AnyDataset, function: Callable, num_proc: int | None, desc: str, **options: Any) -> AnyDataset:
    """Replace all columns by what `function` returns for a batch of rows and their indices."""
    names = get_dataset_column_names(dataset)
    return map_batches(dataset, function, num_proc, desc, with_indices=True, remove_columns=names, **options)


def map_batches(dataset: AnyDataset, function: Callable, num_proc: int | None, desc: str, **options: Any) -> AnyDataset:
    """`Dataset.map(batched=True)`, or the same of a stream. Raises ValueError for rows whose types differ."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(function, batched=True, **options)
    function = of_this_code(function)
    try:
        # One process per node fills the cache that the other ranks of the node then read.
        with PartialState().local_main_process_first():
            return dataset.map(function, batched=True, num_proc=num_proc, desc=desc, **options)
    except (ArrowException, TypeError) as error:
        raise ValueError(
            f"Got columns {dataset.column_names} with rows that no single type holds ({error}), expected values of one type in "
            "each column, and messages with the same keys. Fix: convert them, or stream the dataset (to_iterable_dataset)."
        ) from error
    except ValueError as error:
        error.add_note(f"{desc}.")  # names the dataset and the step
        raise


@dataclass(frozen=True)
class KeepRow:
    """Filter of a stream: True for an empty reason. Logs a reason that is not in `reported` when it first occurs."""

    reported: tuple[str, ...] = ()

    def __call__(self, reason: str) -> bool:
        if reason and reason not in self.reported:
            logger.warning_once(f"Dropped a streamed row; further rows are dropped without a message: {reason}.")
        return not reason


def check_not_empty(dataset: IterableDataset) -> None:
    """Raise ValueError if a stream has no rows left."""
    if next(iter(dataset), None) is None:
        raise ValueError(
            "Got a streamed dataset none of whose rows can be trained on (the reasons are logged), expected rows with "
            "an input and an output that fit. Fix: raise max_length, or check the columns."
        )


class UnshardedStream(torch.utils.data.IterableDataset):
    """A stream that every rank reads in full, to take its own rows from it.

    accelerate would give each rank shards of its own where there are enough of them. Shards differ in length, and ranks
    with fewer batches would leave the others waiting.
    """

    def __init__(self, stream: IterableDataset):
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.stream)

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)
