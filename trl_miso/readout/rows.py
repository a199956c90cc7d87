"""Rows of a readout: a seeded sample of rows that give several contexts, prepared as the trainer prepares evaluation rows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_miso.config import MISOSFTConfig
from trl_miso.data.contexts import ContextRow, full_row, parallel_row
from trl_miso.data.mapping import naming
from trl_miso.data.options import DataOptions
from trl_miso.data.pipeline import Pipeline
from trl_miso.data.schema import RowDropped, row_format
from trl_miso.data.turns import each_completion
from trl_miso.report.samples import ConstraintCheck
from trl_miso.segments import Example, decode

Columns = dict[str, list[int]]
# Called with items and what is done with them; returns the items, and may show how many were consumed.
Progress = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass
class SampledRows:
    """Raw rows with their contexts, and what became of the other rows that were looked at.

    Attributes:
        dataset: The dataset that `numbers` counts in.
        kind: The format of the rows, see `trl_miso.data.schema.row_format`.
        read: Number of rows looked at.
        numbers: The rows of the sample.
        contexts: Per row of the sample its full context alone and its contexts.
        left_out: The numbers of the other rows, by reason.
    """

    dataset: Dataset
    kind: str
    read: int = 0
    numbers: list[int] = field(default_factory=list)
    contexts: list[tuple[ContextRow, ContextRow]] = field(default_factory=list)
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def leave_out(self, number: int, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(number)


@dataclass(frozen=True)
class PreparedRow:
    """A row in the collator's columns, as standard inference sees it and with several contexts; both have the same labels.

    Attributes:
        number: The row's number in its dataset.
        row: The raw row.
        full: The row with its full context alone.
        parallel: The row with its contexts.
        standard: Prepared columns of the full context alone.
        mixed: Prepared columns of the several contexts, weighted 1/n or by the row's own weights.
        example: The layout of `mixed`.
    """

    number: int
    row: dict[str, Any]
    full: ContextRow
    parallel: ContextRow
    standard: Columns
    mixed: Columns
    example: Example


def readout_options(args: MISOSFTConfig) -> DataOptions:
    """Options for preparing all rows as several contexts; the weights come later (`losses.weighted`).

    Raises:
        ValueError: For a context_mode without parallel contexts.
    """
    if args.context_mode not in ("auto", "para"):
        raise ValueError(
            f"Got context_mode={args.context_mode!r}, expected 'auto' or 'para': a readout compares parallel contexts with the full "
            "context. Fix: leave context_mode unset."
        )
    return replace(DataOptions.of(args), context_mode="para", para_prob=1.0, full_context_weight=None)


def sample_rows(
    dataset: Dataset,
    args: MISOSFTConfig,
    count: int,
    least_contexts: int = 2,
    check: ConstraintCheck | None = None,
) -> SampledRows:
    """Draw rows in an order that `args.seed` decides, until `count` of them have enough contexts.

    Args:
        least_contexts: Fewest contexts of a row, above 1.
        check: Constraint check that every sampled row needs; None for no such need.

    Raises:
        ValueError: If no row has enough contexts, or a sampled row has no check.
    """
    kind = row_format(dataset.column_names, args.dataset_text_field)
    if kind not in ("constraints", "contexts"):
        raise ValueError(
            f"Got rows in the {kind!r} format, expected a constraints or a contexts column, from which several contexts are made. "
            "Fix: add one of these columns (trl_miso.sources has adapters; --source)."
        )
    options, sampled = readout_options(args), SampledRows(dataset, kind)
    for number in map(int, np.random.default_rng(args.seed).permutation(len(dataset))):
        if len(sampled.numbers) == count:
            break
        sampled.read += 1
        row = dataset[number]
        with naming(number):
            try:
                first = each_completion(row, kind)[0]
                full = full_row(first, kind, options)
                contexts = parallel_row(first, kind, options, full)
            except RowDropped as reason:
                sampled.leave_out(number, str(reason))
                continue
            if len(contexts.contexts) < least_contexts:
                sampled.leave_out(number, f"fewer than {least_contexts} contexts")
                continue
            if check is not None:
                _check_checkable(row, check)
        sampled.numbers.append(number)
        sampled.contexts.append((full, contexts))
    if not sampled.numbers:
        raise _no_rows(sampled)
    return sampled


def prepare_rows(
    sampled: SampledRows, tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, vocab_size: int | None = None
) -> list[PreparedRow]:
    """Prepare sampled rows as `MISOSFTTrainer` prepares evaluation rows with `eval_contexts="standard"` and `"miso"`.

    Rows that are dropped, or whose labels differ between the two (cut at `max_length` in different places, tokens merged across the
    boundary of prompt and answer), are added to `sampled.left_out`.

    Raises:
        ValueError: As training; if no row is left.
    """
    pipeline = replace(
        Pipeline.of(args, tokenizer, vocab_size=vocab_size, shares_prefixes=args.share_prefixes),
        options=readout_options(args),
        shuffle_seed=None,
    )
    rows = sampled.dataset.select(sampled.numbers)
    by_contexts: dict[str, dict[int, Columns]] = {}
    for eval_contexts in ("standard", "miso"):
        prepared = replace(pipeline, eval_contexts=eval_contexts)(rows, f"readout ({eval_contexts})", "para")
        by_contexts[eval_contexts] = {row["miso_row"][0]: row for row in prepared.rows}
        for reason, places in (prepared.dropped or {}).items():
            for place in places:
                sampled.leave_out(sampled.numbers[place], reason)
    kept = []
    for place, (number, (full, parallel)) in enumerate(zip(sampled.numbers, sampled.contexts, strict=True)):
        standard, mixed = (by_contexts[eval_contexts].get(place) for eval_contexts in ("standard", "miso"))
        if standard is None or mixed is None:
            continue
        if _labels(standard) != _labels(mixed):
            sampled.leave_out(number, "labels under several contexts that differ from those under the full context")
            continue
        (example,) = decode(mixed["miso_layout"])
        kept.append(PreparedRow(number, rows[place], full, parallel, standard, mixed, example))
    if not kept:
        raise _no_rows(sampled)
    return kept


def _check_checkable(row: dict[str, Any], check: ConstraintCheck) -> None:
    """Raise ValueError if a row's constraints cannot be checked."""
    verdicts = check(row, "") if row.get("constraints") else None
    if verdicts is None or any(verdict is None for verdict in verdicts):
        raise ValueError(
            "Got constraints without a checker, expected IFEval's instruction_id_list and kwargs with one item per constraint, by which "
            "generated answers are checked. Fix: add these columns, leave such rows out, or leave --generate out."
        )


def _labels(columns: Columns) -> list[int]:
    """The labels of a prepared row, in an order that does not depend on its layout."""
    return sorted(label for label in columns["labels"] if label != -100)


def _no_rows(sampled: SampledRows) -> ValueError:
    reasons = "; ".join(sampled.left_out) or "there are none"
    return ValueError(
        f"Got {sampled.read} rows, none of which can be read with several contexts ({reasons}), expected at least one that can. Fix: give "
        "other rows, lower --min_contexts, or raise --max_length."
    )
