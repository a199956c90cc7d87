"""Batches of raw rows to prepared columns: contexts, tokens, layout. Rows are dropped with a reason and counted."""

import gc
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

from datasets import Dataset, Features, List, Value
from trl.data_utils import get_dataset_column_names

from trl_miso.data.contexts import ContextRow, full_row, parallel_row
from trl_miso.data.dropped import SAMPLE, AnyDataset, Dropped, dropped_rows, report_dropped, report_kept
from trl_miso.data.layout import Layout, columns
from trl_miso.data.mapping import REASON, KeepRow, check_not_empty, map_rows, naming, rows_of
from trl_miso.data.options import DataOptions
from trl_miso.data.schema import RowDropped, template_kwargs
from trl_miso.data.tokenization import NO_END, RowTokenizer, Tokenized, lacks_end
from trl_miso.data.turns import each_completion, earlier_answers, trains_all_turns, turns_not_trained
from trl_miso.segments import encode, single

# The columns that the collator reads. `miso_row` is a list, since a bin holds several rows.
COLUMNS = ["input_ids", "labels", "miso_layout", "miso_row"]
# Declared rather than inferred: if the first rows are all dropped, their empty lists have no type.
_FEATURES = Features(
    {name: List(Value("int64")) for name in [*COLUMNS, "miso_cut"]} | {"miso_notes": List(Value("string"))} | REASON
)
_BATCH = 250  # rows per batch: many texts per call of the tokenizer, few enough for the processor's cache


@dataclass(frozen=True)
class RowPreparation:
    """Maps batches of raw rows to prepared columns, for `Dataset.map(batched=True)`.

    A dropped row is kept with empty columns and its reason in `miso_dropped`, so that it is counted in any number of
    processes.

    Args:
        kind: The format of the rows, see `schema.row_format`.
        mode: `"para"`, `"succ"` or `"single"`.
        vocab_size: Token ids must be below it; None skips the check.
    """

    kind: str
    mode: str
    options: DataOptions
    tokenizer: RowTokenizer
    vocab_size: int | None = None

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        with _garbage_collection_paused():
            return self._prepare_batch(batch, indices)

    def _prepare_batch(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = rows_of(batch)
        answers = [self._answers(row, index) for row, index in zip(rows, indices, strict=True)]
        # All answers of all rows are tokenized together.
        flat: list[ContextRow] = []
        owners: list[int] = []  # the place of each answer's row in the batch
        for place, own in enumerate(answers):
            if isinstance(own, list):
                flat += own
                owners += [place] * len(own)
        tokenized = self._tokenize(flat, [rows[i] for i in owners], [indices[i] for i in owners])
        of_row: list[list[Tokenized | RowDropped]] = [[] for _ in rows]
        for place, result in zip(owners, tokenized, strict=True):
            of_row[place].append(result)
        prepared = [_with_reason(self._lay_out, *row) for row in zip(answers, of_row, indices, strict=True)]
        return _to_columns(prepared, self.vocab_size)

    def _answers(self, row: dict[str, Any], index: int) -> list[ContextRow] | RowDropped:
        """The answers of a row that are trained, each with its contexts."""
        with naming(index):
            try:
                given = each_completion(row, self.kind)
                full_rows = [full_row(one, self.kind, self.options) for one in given]
                answers = earlier_answers(row, self.kind, self.options, full_rows[0])
                answers += [self._contexts(one, full) for one, full in zip(given, full_rows, strict=True)]
                if trains_all_turns(row, self.kind, self.options):
                    answers[-1] = answers[-1]._replace(notes=turns_not_trained(full_rows[0].contexts[0]))
            except RowDropped as reason:
                return reason
        return answers

    def _contexts(self, row: dict[str, Any], full: ContextRow) -> ContextRow:
        if self.mode != "para" or not self._layout.is_mixed(full):
            return full
        parallel = parallel_row(row, self.kind, self.options, full)
        self._check_length(parallel, row)
        has_anchor = self.options.full_context_weight is not None and parallel.weights is None
        if has_anchor and parallel.contexts[0] != full.contexts[0]:
            raise ValueError(
                "Got full_context_weight and a row whose prompt is not one of its contexts, expected the full context among "
                "them. Fix: add the prompt to column 'contexts', or give the row context_weights."
            )
        return parallel

    @property
    def _layout(self) -> Layout:
        return Layout(self.options)

    def _check_length(self, parallel: ContextRow, row: dict[str, Any]) -> None:
        """Raise RowDropped if the first context of a very long row does not fit, before all its contexts are tokenized."""
        limit = self.options.max_length or len(parallel.text)
        if len(parallel.contexts) > 1 and len(parallel.text) > 100 * limit:
            first_context = parallel._replace(contexts=parallel.contexts[:1])
            (tokenized,) = self.tokenizer([first_context], [template_kwargs(row)])
            if isinstance(tokenized, RowDropped):
                raise tokenized
            self._layout([tokenized], "single", [None])

    def _tokenize(
        self, context_rows: list[Any], rows: list[dict[str, Any]], indices: list[int]
    ) -> list[Tokenized | RowDropped]:
        kwargs = []
        for row, index in zip(rows, indices, strict=True):
            with naming(index):
                kwargs.append(template_kwargs(row))
        try:
            return self.tokenizer(context_rows, kwargs)
        except ValueError:
            # Tokenize one by one to find the row whose number the error gets.
            for context_row, row_kwargs, index in zip(context_rows, kwargs, indices, strict=True):
                with naming(index):
                    self.tokenizer([context_row], [row_kwargs])
            raise

    def _lay_out(
        self, answers: list[ContextRow] | RowDropped, tokenized: list[Tokenized | RowDropped], index: int
    ) -> dict[str, list]:
        if isinstance(answers, RowDropped):
            raise answers
        kept = []
        for answer in tokenized:
            if isinstance(answer, RowDropped):
                raise answer
            kept.append(answer)
        return self._layout(kept, self.mode, [answer.weights for answer in answers]) | {"miso_row": [index]}


def prepare_rows(
    dataset: AnyDataset, rows: RowPreparation, name: str, num_proc: int | None
) -> tuple[AnyDataset, Dropped]:
    """Apply a row preparation, then drop and report rows. Raises ValueError if no row is left."""
    desc = f"Preparing contexts of {name} dataset"
    return _drop(map_rows(dataset, rows, num_proc, desc, features=_FEATURES, batch_size=_BATCH), name)


def fit_rows(
    dataset: AnyDataset,
    options: DataOptions,
    name: str,
    num_proc: int | None,
    vocab_size: int | None = None,
    end_ids: Set[int] = frozenset(),
) -> tuple[AnyDataset, Dropped]:
    """Cut tokenized rows to `max_length` as TRL does, and give each the layout of causal runs; see `prepare_rows`.

    Args:
        end_ids: The tokens that can end a turn, to note rows whose labels have none; empty for no such notes.
    """
    if dataset.column_names is None:
        check_not_empty(dataset)
    names = [c for c in get_dataset_column_names(dataset) if c in ("input_ids", "labels", "seq_lengths", "miso_row")]
    runs = _CausalRuns(options.max_length, options.truncation_mode, vocab_size, tuple(sorted(end_ids)))
    dataset = dataset.select_columns(names)
    return _drop(map_rows(dataset, runs, num_proc, f"Laying out {name} dataset", features=_FEATURES), name)


@dataclass(frozen=True)
class _CausalRuns:
    """Maps batches of tokenized rows to prepared columns: one causal run per row, or one per entry of `seq_lengths`."""

    max_length: int | None
    truncation_mode: str
    vocab_size: int | None = None
    end_ids: tuple[int, ...] = ()

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        numbers = [number for (number,) in batch["miso_row"]] if "miso_row" in batch else indices
        rows = zip(rows_of(batch), numbers, strict=True)
        return _to_columns([_with_reason(self._prepare, row, number) for row, number in rows], self.vocab_size)

    def _prepare(self, row: dict[str, Any], number: int) -> dict[str, list[int]]:
        ids, labels = row["input_ids"], row["labels"]
        if self.max_length is None:
            kept = slice(None)
        elif self.truncation_mode == "keep_end":
            kept = slice(-self.max_length, None)
        else:
            kept = slice(None, self.max_length)
        lengths = row.get("seq_lengths") or [len(ids[kept])]
        if sum(lengths) != len(ids[kept]) or min(lengths) < 1:
            raise ValueError(
                f"Row {number}: Got {len(ids[kept])} tokens with {lengths!r:.100} in column 'seq_lengths', expected lengths above 0 "
                "that add up to the row's tokens. Fix: set max_length to at least the length it was packed to."
            )
        starts = {0, *accumulate(lengths)}  # the first token of a run is predicted from nothing
        if all(label == -100 or i in starts for i, label in enumerate(labels[kept])):
            had_labels = any(label != -100 for label in labels[1:])
            raise RowDropped("no label left within max_length" if had_labels else "no label")
        layout = list(chain.from_iterable(encode(single(length)) for length in lengths))
        prepared = {"input_ids": ids[kept], "labels": labels[kept], "miso_layout": layout}
        notes = [NO_END] if self.end_ids and lacks_end(labels, set(self.end_ids)) else []
        return prepared | {"miso_row": [number], "miso_cut": [len(ids) - len(ids[kept])], "miso_notes": notes}


def _with_reason(prepare: Callable, row: Any, *args: Any) -> dict[str, Any]:
    """Prepare a row; on RowDropped return empty columns and the reason, so that worker processes can report it.

    The last of `args` is the row's number.
    """
    try:
        return prepare(row, *args) | {"miso_dropped": ""}
    except RowDropped as reason:
        empty = columns([], [], single(0)) | {"miso_row": [args[-1]], "miso_cut": [0], "miso_notes": []}
        return empty | {"miso_dropped": str(reason)}


def _to_columns(rows: Iterable[dict[str, Any]], vocab_size: int | None) -> dict[str, list]:
    """Rows as columns. Raises ValueError for token ids that the model does not have."""
    rows = list(rows)
    for row in rows:
        for name, ids in (("input_ids", set(row["input_ids"])), ("labels", set(row["labels"]) - {-100})):
            for token in (min(ids, default=0), max(ids, default=0)):
                if token < 0 or (vocab_size is not None and token >= vocab_size):
                    raise _unknown_token(token, name, row, vocab_size)
    return {name: [row[name] for row in rows] for name in _FEATURES}


def _unknown_token(token: int, name: str, row: dict[str, Any], vocab_size: int | None) -> ValueError:
    return ValueError(
        f"Row {row['miso_row'][0]}: Got {token} in column {name!r}, expected token ids from 0 to "
        f"{(vocab_size or 0) - 1}, the model's vocabulary{', or -100' if name == 'labels' else ''}. Fix: use the model's "
        "tokenizer, or model.resize_token_embeddings(len(tokenizer)) if tokens were added to it."
    )


def _drop(dataset: AnyDataset, name: str) -> tuple[AnyDataset, Dropped]:
    """Remove the rows that have a reason to be dropped, and report them."""
    if isinstance(dataset, Dataset):
        numbers = (number for batch in dataset.select_columns("miso_row").iter(1000) for (number,) in batch["miso_row"])
        reasons = dataset["miso_dropped"][:]
        dropped = dropped_rows(numbers, reasons)
        report_dropped(dropped, len(dataset), name)
        total = len(dataset)
        if dropped:
            dataset = dataset.select([i for i, reason in enumerate(reasons) if not reason])
        report_kept(dataset.select_columns(["miso_row", "miso_cut", "miso_notes"]), total, name)
        return dataset.remove_columns("miso_dropped"), dropped
    sample = list(dataset.take(SAMPLE))
    dropped = dropped_rows((row["miso_row"][0] for row in sample), (row["miso_dropped"] for row in sample))
    report_dropped(dropped, len(sample), name, streamed=True)
    report_kept((row for row in sample if not row["miso_dropped"]), len(sample), name, streamed=True)
    dataset = dataset.filter(KeepRow(tuple(dropped)), input_columns="miso_dropped")
    check_not_empty(dataset)
    return dataset.remove_columns("miso_dropped"), dropped


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause garbage collection while a batch is prepared: it would search many short-lived objects for cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
