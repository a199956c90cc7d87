"""Whether rows have the contexts that mode para promises: prompts that hold their constraints, datasets that mix nothing."""

import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from accelerate.logging import get_logger
from datasets import Features, IterableDataset, Value

from trl_miso.data.contexts import parallel_row, split_row
from trl_miso.data.dropped import SAMPLE, AnyDataset
from trl_miso.data.mapping import map_rows, rows_of
from trl_miso.data.options import DataOptions
from trl_miso.data.schema import RowDropped
from trl_miso.segments import decode

logger = get_logger(__name__)

_HELD = Features(held=Value("string"))


def report_held(dataset: AnyDataset, options: DataOptions, num_proc: int | None, name: str) -> None:
    """Log in how many prompts constraints stand already, and how many of these rows keep one context, by reason."""
    if streamed := isinstance(dataset, IterableDataset):
        dataset = dataset.take(SAMPLE)
    found = map_rows(dataset, _Held(options), num_proc, f"Looking for constraints in {name} prompts", features=_HELD)
    statuses = Counter(row["held"] for row in found if row["held"])
    if not statuses:
        return
    others = ", ".join(f"{count} since {status}" for status, count in statuses.items() if status != "split")
    kept = f"; one context is kept by {others}" if others else ""
    logger.log(
        logging.WARNING if others else logging.INFO,
        f"{name} dataset{f', first {SAMPLE} streamed rows' if streamed else ''}: the prompts of {statuses.total()} rows hold "
        f"constraints already; {statuses['split']} were split{kept}.",
    )


@dataclass(frozen=True)
class _Held:
    """Maps constraints rows to "split", or why their prompt cannot be split, or "" if it holds no constraint."""

    options: DataOptions

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list[str]]:
        return {"held": [self._status(row) for row in rows_of(batch)]}

    def _status(self, row: dict[str, Any]) -> str:
        with suppress(RowDropped, ValueError):  # preparation reports them
            split = split_row(row, self.options)
            return split.obstacle or ("split" if split.holds_some else "")
        return ""


def warn_unless_mixed(prepared: AnyDataset, rows: AnyDataset, kind: str, options: DataOptions, name: str) -> None:
    """Warn, with the reason, if no prepared row of mode para has several contexts; of streams, the first rows are read."""
    if not logger.isEnabledFor(logging.WARNING):
        return
    layouts = prepared.select_columns("miso_layout")
    if streamed := isinstance(prepared, IterableDataset):
        layouts = layouts.take(SAMPLE)
    decoded = chain.from_iterable(map(decode, chain.from_iterable(b["miso_layout"] for b in layouts.iter(100))))
    if any(example.branches for example in decoded):
        return
    read = islice(rows, SAMPLE) if streamed else rows
    if any(_has_several(row, kind, options) for row in read):
        why, fix = "rows that have several were dropped", "see the reasons above, or raise max_length"
        if options.para_prob < 1:
            why = f"para_prob={options.para_prob:g} drew none that is kept"
            fix = "raise para_prob, or set context_mode='single'"
    elif kind == "constraints":
        why = "no row has constraints that give it a second context"
        fix = "check column 'constraints', include_full and include_bare, or set context_mode='succ' or 'single'"
    else:
        why, fix = "no row has two contexts", "check column 'contexts', or set context_mode='succ' or 'single'"
    logger.warning(
        f"{name} dataset{f', first {SAMPLE} streamed rows' if streamed else ''}: no example has several contexts, which is plain "
        f"SFT: {why}. Fix: {fix}."
    )


def _has_several(row: dict[str, Any], kind: str, options: DataOptions) -> bool:
    try:
        return len(parallel_row(row, kind, options).contexts) > 1
    except (RowDropped, ValueError):
        return False
