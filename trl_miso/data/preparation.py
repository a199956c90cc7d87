"""Raw dataset to prepared dataset: contexts, tokens, layout; rows dropped and counted; packing."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Any

from datasets import Dataset, Features, List, Value
from trl.data_utils import get_dataset_column_names

from trl_miso.data.contexts import ContextRow, RowDropped, full_row, parallel_row, template_kwargs
from trl_miso.data.dropped import SAMPLE, AnyDataset, Dropped, dropped_rows, report_dropped
from trl_miso.data.mapping import REASON, Kept, check_not_empty, map_batches, map_rows, naming, rows_of
from trl_miso.data.tokenization import Layout, RowTokenizer, columns
from trl_miso.segments import decode, encode, single
from trl_miso.segments.packed import plan_bins

# What the collator reads; the last is the number of the raw row, a list, as in a bin of several.
COLUMNS = ["input_ids", "labels", "miso_layout", "miso_row"]
_CUT = ["miso_cut"]  # how many tokens of the output's end max_length took
# Given, not inferred: the first rows may all be dropped, whose empty lists have no type.
_FEATURES = Features({name: List(Value("int64")) for name in [*COLUMNS, *_CUT]} | REASON)
_BATCH = 250  # rows prepared at a time: enough to tokenize many texts in one call, few enough to stay in the cache


@dataclass(frozen=True)
class RowPreparation:
    """Maps batches of raw rows to prepared columns, for `Dataset.map(batched=True)`.

    A row with nothing to learn from is kept, empty, with its reason in `miso_dropped`, so that it can be counted however
    many processes prepared the dataset.
    """

    kind: str
    mode: str
    include_full: bool
    include_bare: bool
    tokenizer: RowTokenizer
    layout: Layout
    vocab_size: int | None = None

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        with _without_collection():
            return self._batch(batch, indices)

    def _batch(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = rows_of(batch)
        made = [self._contexts(row, index) for row, index in zip(rows, indices, strict=True)]
        kept = [i for i, made_row in enumerate(made) if isinstance(made_row, ContextRow)]
        tokenized = iter(self._tokenize([made[i] for i in kept], [rows[i] for i in kept], [indices[i] for i in kept]))
        prepared = (_reasoned(self._prepared, row, tokenized, index) for row, index in zip(made, indices, strict=True))
        return _columns(prepared, self.vocab_size)

    def _contexts(self, row: dict[str, Any], index: int) -> ContextRow | RowDropped:
        with naming(index):
            try:
                template = self.tokenizer.response_template
                full = full_row(row, self.kind, template)
                if self.mode != "para" or not self.layout.is_mixed(full):
                    return full
                made = parallel_row(row, self.kind, self.include_full, self.include_bare, template, full)
                self._check_length(made, row)
            except RowDropped as reason:
                return reason
            anchored = self.layout.full_context_weight is not None and made.weights is None
            if anchored and made.contexts[0] != full.contexts[0]:
                raise ValueError(
                    "Got full_context_weight and a row whose prompt is not one of its contexts, expected the full context among "
                    "them. Fix: add the prompt to column 'contexts', or give the row context_weights."
                )
            return made

    def _check_length(self, made: ContextRow, row: dict[str, Any]) -> None:
        """Raise RowDropped if a very long row does not fit, as its first context shows before all are tokenized."""
        if len(made.contexts) > 1 and len(made.text) > 100 * (self.layout.max_length or len(made.text)):
            (first,) = self.tokenizer([made._replace(contexts=made.contexts[:1])], [template_kwargs(row)])
            if isinstance(first, RowDropped):
                raise first
            self.layout(first, "single", None)

    def _tokenize(self, made: list[Any], rows: list[dict[str, Any]], indices: list[int]) -> list:
        options = []
        for row, index in zip(rows, indices, strict=True):
            with naming(index):
                options.append(template_kwargs(row))
        try:
            return self.tokenizer(made, options)
        except ValueError:
            # One by one, to name the row.
            for made_row, kwargs, index in zip(made, options, indices, strict=True):
                with naming(index):
                    self.tokenizer([made_row], [kwargs])
            raise

    def _prepared(self, row: ContextRow | RowDropped, tokenized: Iterator, index: int) -> dict[str, list[int]]:
        if isinstance(row, RowDropped):
            raise row
        ids = next(tokenized)
        if isinstance(ids, RowDropped):
            raise ids
        return self.layout(ids, self.mode, row.weights) | {"miso_row": [index]}


def prepare_rows(
    dataset: AnyDataset, rows: RowPreparation, name: str, num_proc: int | None
) -> tuple[AnyDataset, Dropped]:
    """Apply a row preparation, drop and report what it dropped. Raises ValueError if no row is left."""
    desc = f"Preparing contexts of {name} dataset"
    return _drop(map_rows(dataset, rows, num_proc, desc, features=_FEATURES, batch_size=_BATCH), name)


def fit_rows(
    dataset: AnyDataset,
    max_length: int | None,
    truncation_mode: str,
    name: str,
    num_proc: int | None,
    vocab_size: int | None = None,
) -> tuple[AnyDataset, Dropped]:
    """Tokenized rows cut to `max_length` as TRL cuts them, each with the layout of causal runs; see `prepare_rows`."""
    if dataset.column_names is None:
        check_not_empty(dataset)
    names = [c for c in get_dataset_column_names(dataset) if c in ("input_ids", "labels", "seq_lengths", "miso_row")]
    dataset = dataset.select_columns(names)
    runs = _Runs(max_length, truncation_mode, vocab_size)
    return _drop(map_rows(dataset, runs, num_proc, f"Laying out {name} dataset", features=_FEATURES), name)


@dataclass(frozen=True)
class _Runs:
    """Maps batches of tokenized rows to prepared columns: one causal run a row, or one for each of its `seq_lengths`."""

    max_length: int | None
    truncation_mode: str
    vocab_size: int | None = None

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        numbers = [number for (number,) in batch["miso_row"]] if "miso_row" in batch else indices
        rows = zip(rows_of(batch), numbers, strict=True)
        return _columns((_reasoned(self._prepared, row, number) for row, number in rows), self.vocab_size)

    def _prepared(self, row: dict[str, Any], number: int) -> dict[str, list[int]]:
        ids, labels = row["input_ids"], row["labels"]
        end = len(ids) if self.max_length is None else self.max_length
        kept = slice(-end, None) if self.truncation_mode == "keep_end" else slice(None, end)
        lengths = row.get("seq_lengths") or [len(ids[kept])]
        if sum(lengths) != len(ids[kept]) or min(lengths) < 1:
            raise ValueError(
                f"Row {number}: Got {len(ids[kept])} tokens with {lengths!r:.100} in column 'seq_lengths', expected lengths above 0 "
                "that add up to the row's tokens. Fix: set max_length to at least the length it was packed to."
            )
        starts = {0, *accumulate(lengths)}  # what nothing precedes is not predicted
        if all(label == -100 or i in starts for i, label in enumerate(labels[kept])):
            cut = any(label != -100 for label in labels[1:])
            raise RowDropped("no label left within max_length" if cut else "no label")
        layout = list(chain.from_iterable(encode(single(length)) for length in lengths))
        made = {"input_ids": ids[kept], "labels": labels[kept], "miso_layout": layout}
        return made | {"miso_row": [number], "miso_cut": [len(ids) - len(ids[kept])]}


def _reasoned(prepare: Callable, row: Any, *args: Any) -> dict[str, Any]:
    """Prepared columns of a row, or empty ones with the reason, so that it can be counted in whichever process it was."""
    try:
        return prepare(row, *args) | {"miso_dropped": ""}
    except RowDropped as reason:
        return columns([], [], single(0)) | {"miso_row": [args[-1]], "miso_cut": [0], "miso_dropped": str(reason)}


def _columns(rows: Iterable[dict[str, Any]], vocab_size: int | None) -> dict[str, list]:
    made = list(rows)
    for row in made:
        for name, ids in (("input_ids", set(row["input_ids"])), ("labels", set(row["labels"]) - {-100})):
            beyond = [i for i in (min(ids, default=0), max(ids, default=0)) if i < 0 or i >= (vocab_size or i + 1)]
            if beyond:
                raise ValueError(
                    f"Row {row['miso_row'][0]}: Got {beyond[0]} in column {name!r}, expected token ids from 0 to "
                    f"{(vocab_size or 0) - 1}, the model's vocabulary{', or -100' if name == 'labels' else ''}. Fix: use the model's "
                    "tokenizer, or model.resize_token_embeddings(len(tokenizer)) if tokens were added to it."
                )
    return {name: [row[name] for row in made] for name in _FEATURES}


def _drop(dataset: AnyDataset, name: str) -> tuple[AnyDataset, Dropped]:
    """The rows without a reason to drop them, and the others, reported."""
    if isinstance(dataset, Dataset):
        numbers = (number for batch in dataset.select_columns("miso_row").iter(1000) for (number,) in batch["miso_row"])
        reasons = dataset["miso_dropped"][:]
        dropped = dropped_rows(numbers, reasons)
        report_dropped(dropped, len(dataset), name)
        if dropped:
            dataset = dataset.select([i for i, reason in enumerate(reasons) if not reason])
        return dataset.remove_columns("miso_dropped"), dropped
    sample = [(row["miso_row"][0], row["miso_dropped"]) for row in dataset.take(SAMPLE)]
    dropped = dropped_rows(*zip(*sample, strict=True)) if sample else {}
    report_dropped(dropped, len(sample), name, streamed=True)
    dataset = dataset.filter(Kept(tuple(dropped)), input_columns="miso_dropped")
    check_not_empty(dataset)
    return dataset.remove_columns("miso_dropped"), dropped


def is_chat(dataset: AnyDataset, kind: str) -> bool | None:
    """Whether rows are messages, by the first that has a completion; None if that cannot be told."""
    if kind in ("text", "messages"):
        return kind == "messages"
    completions = (row.get("completion") for row in islice(dataset, SAMPLE))
    return next((isinstance(value, list) for value in completions if value and isinstance(value, str | list)), None)


def check_prepared(dataset: AnyDataset, max_length: int | None, name: str) -> None:
    """Raise ValueError if a row prepared before has an example longer than `max_length`: it is no longer cut."""
    if max_length is None or not isinstance(dataset, Dataset):
        return
    for index, row in enumerate(dataset.select_columns("miso_layout")):
        longest = max(example.end(len(example.segments) - 1) for example in decode(row["miso_layout"]))
        if longest > max_length:
            raise ValueError(
                f"Got a prepared {name} dataset whose row {index} has an example of {longest} positions, expected at most "
                f"max_length={max_length}. Fix: prepare it again from its text, or set max_length={longest}."
            )


def pack_rows(dataset: AnyDataset, max_length: int, shared: bool, num_proc: int | None) -> AnyDataset:
    """Bins of whole examples with at most `max_length` unique tokens, planned over batches of rows as TRL's packing is."""
    names = get_dataset_column_names(dataset)
    dataset = dataset.select_columns([name for name in COLUMNS if name in names])
    return map_batches(dataset, _Packing(max_length, shared), num_proc, "Packing examples")


@dataclass(frozen=True)
class _Packing:
    max_length: int
    shared: bool

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        sizes = [
            sum(example.num_tokens if self.shared else example.num_unshared_tokens for example in decode(layout))
            for layout in batch["miso_layout"]
        ]
        bins = plan_bins(sizes, self.max_length)
        return {
            name: [list(chain.from_iterable(of[i] for i in members)) for members in bins] for name, of in batch.items()
        }


@contextmanager
def _without_collection() -> Iterator[None]:
    """Spare the many short-lived objects of a batch the search for cycles among them, a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
