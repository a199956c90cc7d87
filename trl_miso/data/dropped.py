"""What became of a dataset's rows: counts and log lines for dropped, split and mixed rows."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TypeAlias

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from trl_miso.segments import decode_with, trained_spans

logger = get_logger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
Dropped: TypeAlias = dict[str, list[int]]  # reason -> numbers of the raw rows
STATUS = "miso_status"  # column in which a source says "split", or why a row keeps one context
SAMPLE = 500  # rows counted of a stream, which may have no end
EXAMPLES = 10_000  # of a dataset, whose mixture is logged: reading the layouts of all of a large one takes minutes


def dropped_rows(numbers: Iterable[int], reasons: Iterable[str]) -> Dropped:
    """Group the numbers of dropped rows by reason. Rows with an empty reason were kept."""
    dropped: Dropped = {}
    for number, reason in zip(numbers, reasons, strict=True):
        if reason:
            dropped.setdefault(reason, []).append(number)
    return dropped


def report_dropped(dropped: Dropped, rows: int, name: str, streamed: bool = False) -> None:
    """Log each reason once with its count and its first row. Raises ValueError if every row was dropped."""
    total = f"the first {rows} streamed" if streamed else f"{rows}"
    for reason, numbers in dropped.items():
        logger.warning(
            f"Dropped {len(numbers)} of {total} rows of the {name} dataset (first: row {numbers[0]}): {reason}."
        )
    if rows and not streamed and sum(map(len, dropped.values())) == rows:
        counts = {reason: len(numbers) for reason, numbers in dropped.items()}
        raise ValueError(
            f"Got a {name} dataset of {rows} rows none of which can be trained on ({counts}), expected rows with an "
            "input and an output that fit. Fix: raise max_length, or check the columns."
        )


def report_kept(rows: Iterable[Mapping[str, list]], total: int, name: str, streamed: bool = False) -> None:
    """Log what was cut from rows that are kept, and each note on them once with its count and its first row.

    Args:
        rows: Prepared rows: `miso_row`, `miso_cut` and `miso_notes` are read.
    """
    of = f"the first {total} streamed" if streamed else f"{total}"
    noted: dict[str, list[int]] = {}
    cut_rows = cut_tokens = 0
    for row in rows:
        cut_rows += row["miso_cut"][0] > 0
        cut_tokens += row["miso_cut"][0]
        for note in row["miso_notes"]:
            noted.setdefault(note, []).append(row["miso_row"][0])
    if cut_rows:
        logger.warning(
            f"Cut {cut_tokens} tokens to max_length from the ends of {cut_rows} of {of} rows of the {name} dataset."
        )
    for note, numbers in noted.items():
        logger.warning(f"{len(numbers)} of {of} rows of the {name} dataset (first: row {numbers[0]}): {note}.")


def count_statuses(dataset: AnyDataset) -> Counter[str]:
    """Count the statuses that the source gave the rows; of a stream, those of its first `SAMPLE` rows."""
    rows = dataset.select_columns(STATUS)
    if isinstance(rows, IterableDataset):
        rows = rows.take(SAMPLE)
    statuses = chain.from_iterable(batch[STATUS] for batch in rows.iter(1000))
    return Counter(status for status in statuses if isinstance(status, str))


def report_statuses(statuses: Mapping[str, int], name: str, streamed: bool = False) -> None:
    """Log how many rows were split, and how many keep one context, by reason; as a warning if no row was split."""
    rows = sum(statuses.values())
    split = statuses.get("split", 0)
    others = ", ".join(f"{count} {status}" for status, count in statuses.items() if status != "split")
    total = f"the first {rows} streamed" if streamed else f"{rows}"
    level = logging.INFO if split or not rows else logging.WARNING
    logger.log(
        level, f"{name} dataset: {split} of {total} rows were split{f'; not split: {others}' if others else ''}."
    )


def report_mixture(dataset: AnyDataset, name: str, mode: str = "para") -> None:
    """Log how many examples mix contexts, what these are, and how many tokens shared prefixes save."""
    if not isinstance(dataset, Dataset) or not logger.isEnabledFor(logging.INFO):
        return
    examples = mixed = contexts = tokens = unshared_tokens = answers = 0
    sample = dataset.select(range(min(len(dataset), EXAMPLES)))
    for batch in sample.select_columns(["miso_layout", "labels"]).iter(1000):
        for example, labels in chain.from_iterable(map(decode_with, batch["miso_layout"], batch["labels"])):
            examples += 1
            answers += len(trained_spans(example, labels))
            mixed += bool(example.outputs)
            contexts += len(example.branches)
            tokens += example.num_tokens
            unshared_tokens += example.num_unshared_tokens
    average = f" ({contexts / mixed:.1f} on average)" if mixed else ""
    meaning = " In succ, contexts are chunks of the input, cut at random (chunk_probs)." if mode == "succ" else ""
    counted = examples if len(sample) == len(dataset) else f"the first {examples} of {len(dataset)}"
    logger.info(
        f"{name} dataset: {counted} examples with {answers} answers, {mixed / max(examples, 1):.0%} with several contexts{average}, "
        f"{tokens} tokens ({unshared_tokens} without shared prefixes).{meaning}"
    )
