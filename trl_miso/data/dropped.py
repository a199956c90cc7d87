"""What became of a dataset's rows, counted and logged once."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TypeAlias

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from trl_miso.segments import decode

logger = get_logger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
Dropped: TypeAlias = dict[str, list[int]]  # reason -> numbers of the raw rows
STATUS = "miso_status"  # what a source says of each row: "split", or why it keeps one context
SAMPLE = 500  # rows of a stream that are counted, since it has no end at which all could be


def dropped_rows(numbers: Iterable[int], reasons: Iterable[str]) -> Dropped:
    """Row numbers by reason, of the rows that have one."""
    dropped: Dropped = {}
    for number, reason in zip(numbers, reasons, strict=True):
        if reason:
            dropped.setdefault(reason, []).append(number)
    return dropped


def report_dropped(dropped: Dropped, rows: int, name: str, streamed: bool = False) -> None:
    """Log each reason once with its count and first row. Raises ValueError if every row was dropped."""
    of = f"the first {rows} streamed" if streamed else f"{rows}"
    for reason, numbers in dropped.items():
        logger.warning(
            f"Dropped {len(numbers)} of {of} rows of the {name} dataset (first: row {numbers[0]}): {reason}."
        )
    if rows and not streamed and sum(map(len, dropped.values())) == rows:
        counts = {reason: len(numbers) for reason, numbers in dropped.items()}
        raise ValueError(
            f"Got a {name} dataset of {rows} rows none of which can be trained on ({counts}), expected rows with an "
            "input and an output that fit. Fix: raise max_length, or check the columns."
        )


def count_statuses(dataset: AnyDataset) -> Counter[str]:
    """How often each status was given by the source that made the rows; of a stream, by its first `SAMPLE` rows."""
    rows = dataset.select_columns(STATUS)
    rows = rows.take(SAMPLE) if isinstance(rows, IterableDataset) else rows
    statuses = chain.from_iterable(batch[STATUS] for batch in rows.iter(1000))
    return Counter(status for status in statuses if isinstance(status, str))


def report_statuses(statuses: Mapping[str, int], name: str, streamed: bool = False) -> None:
    """Log how many rows were split, and for each reason how many keep one context; loudly if none was split."""
    rows = sum(statuses.values())
    others = ", ".join(f"{count} {status}" for status, count in statuses.items() if status != "split")
    split = statuses.get("split", 0)
    of = f"the first {rows} streamed" if streamed else f"{rows}"
    level = logging.INFO if split or not rows else logging.WARNING
    logger.log(level, f"{name} dataset: {split} of {of} rows were split{f'; not split: {others}' if others else ''}.")


def report_mixture(dataset: AnyDataset, name: str) -> None:
    """Log how many examples mix contexts and what sharing saves."""
    if not isinstance(dataset, Dataset) or not logger.isEnabledFor(logging.INFO):
        return
    count = Counter[str]()
    for batch in dataset.select_columns("miso_layout").iter(1000):
        for example in chain.from_iterable(map(decode, batch["miso_layout"])):
            count["examples"] += 1
            count["mixed"] += bool(example.branches)
            count["contexts"] += len(example.branches)
            count["tokens"] += example.num_tokens
            count["unshared"] += example.num_unshared_tokens
    logger.info(
        f"{name} dataset: {count['examples']} examples, {count['mixed'] / max(count['examples'], 1):.0%} with several contexts "
        f"({count['contexts'] / max(count['mixed'], 1):.1f} on average), {count['tokens']} tokens ({count['unshared']} without "
        "shared prefixes)."
    )
