"""Raw dataset to prepared dataset: contexts, tokens, layout; rows dropped and counted; packing."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, List, Value
from jinja2 import TemplateError
from trl.data_utils import get_dataset_column_names

from trl_miso.contexts import KEPT, Row, RowDropped, as_trl_row, full_row, messages_row, parallel_row
from trl_miso.packing import plan_bins
from trl_miso.segments import Example, decode, encode, single, unshare
from trl_miso.tokenization import Layout, Tokenizer, columns

logger = get_logger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
COLUMNS = ["input_ids", "labels", "miso_layout"]
# Given, not inferred: the first rows may all be dropped, whose empty lists have no type.
_REASON = {"miso_dropped": Value("string")}
_FEATURES = {name: List(Value("int64")) for name in COLUMNS} | _REASON


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
    tokenizer: Tokenizer
    layout: Layout

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = _rows(batch)
        made = [self._contexts(row, index) for row, index in zip(rows, indices, strict=True)]
        kept = [i for i, made_row in enumerate(made) if isinstance(made_row, Row)]
        tokenized = iter(self._tokenize([made[i] for i in kept], [rows[i] for i in kept], [indices[i] for i in kept]))
        out: dict[str, list] = {name: [] for name in _FEATURES}
        for row in made:
            reason = ""
            try:
                prepared = self._lay_out(row, next(tokenized)) if isinstance(row, Row) else _raise(row)
            except RowDropped as dropped:
                reason, prepared = str(dropped), columns([], [], single(0))
            for name, value in (prepared | {"miso_dropped": reason}).items():
                out[name].append(value)
        return out

    def _contexts(self, row: dict[str, Any], index: int) -> Row | RowDropped:
        with _naming(index):
            try:
                template = self.tokenizer.response_template
                full = full_row(row, self.kind, template)
                if self.mode != "para" or not self.layout.is_mixed(full):
                    return full
                made = parallel_row(row, self.kind, self.include_full, self.include_bare, template)
            except RowDropped as reason:
                return reason
            anchored = self.layout.full_context_weight is not None and made.weights is None
            if anchored and made.contexts[0] != full.contexts[0]:
                raise ValueError(
                    "Got full_context_weight and a row whose prompt is not one of its contexts, expected the full context among "
                    "them. Fix: add the prompt to column 'contexts', or give the row context_weights."
                )
            return made

    def _tokenize(self, made: list[Any], rows: list[dict[str, Any]], indices: list[int]) -> list:
        options = []
        for row, index in zip(rows, indices, strict=True):
            with _naming(index):
                options.append(_template_kwargs(row))
        try:
            return self.tokenizer(made, options)
        except (ValueError, TypeError, TemplateError):
            # One by one, to name the row.
            for made_row, kwargs, index in zip(made, options, indices, strict=True):
                with _naming(index):
                    self.tokenizer([made_row], [kwargs])
            raise

    def _lay_out(self, row: Row, tokenized: Any) -> dict[str, list[int]]:
        if isinstance(tokenized, RowDropped):
            raise tokenized
        return self.layout(tokenized, self.mode, row.weights)


def prepare_rows(dataset: AnyDataset, rows: RowPreparation, name: str, num_proc: int | None) -> AnyDataset:
    """Apply a row preparation, drop and report what it dropped. Raises ValueError if no row is left."""
    desc = f"Preparing contexts of {name} dataset"
    dataset = _map_rows(dataset, rows, num_proc, desc, features=Features(_FEATURES))
    if isinstance(dataset, Dataset):
        dataset = _kept(dataset, dataset["miso_dropped"][:], name)
    else:
        dataset = dataset.filter(_warn_dropped, input_columns="miso_dropped")
        _check_not_empty(dataset)
    return dataset.remove_columns("miso_dropped")


def _kept(dataset: Dataset, reasons: list[str], name: str) -> Dataset:
    """The rows without a reason to drop them, the others reported."""
    report_dropped(reasons, name)
    return dataset.select([i for i, reason in enumerate(reasons) if not reason]) if any(reasons) else dataset


def _warn_dropped(reason: str) -> bool:
    """Whether a streamed row is kept. A stream has no end at which rows could be counted."""
    if reason:
        logger.warning_once(f"Dropped a streamed row, and will drop more without saying so: {reason}.")
    return not reason


def _check_not_empty(dataset: IterableDataset) -> None:
    if next(iter(dataset), None) is None:
        raise ValueError(
            "Got a streamed dataset none of whose rows can be trained on (the reasons are logged), expected rows with "
            "an input and an output that fit. Fix: raise max_length, or check the columns."
        )


def report_dropped(reasons: Iterable[str], name: str) -> None:
    """Log each reason once with its count and first row. Raises ValueError if every row was dropped."""
    reasons = list(reasons)
    counts = Counter(reason for reason in reasons if reason)
    for reason, count in counts.items():
        logger.warning(
            f"Dropped {count} of {len(reasons)} rows of the {name} dataset (first: row {reasons.index(reason)}): {reason}."
        )
    if reasons and sum(counts.values()) == len(reasons):
        raise ValueError(
            f"Got a {name} dataset of {len(reasons)} rows none of which can be trained on ({dict(counts)}), expected rows with an "
            "input and an output that fit. Fix: raise max_length, or check the columns."
        )


def report_truncated(before: AnyDataset, after: AnyDataset, name: str) -> None:
    """Log how many rows TRL dropped since truncation left no label. Raises ValueError if it was all of them."""
    if isinstance(before, Dataset) and isinstance(after, Dataset) and len(after) < len(before):
        reason = "no label left within max_length"
        logger.warning(f"Dropped {len(before) - len(after)} of {len(before)} rows of the {name} dataset: {reason}.")
        if not len(after):
            report_dropped([reason] * len(before), name)


def report_mixture(dataset: AnyDataset, name: str) -> None:
    """Log how many rows mix contexts and what sharing saves."""
    if not isinstance(dataset, Dataset) or not logger.isEnabledFor(logging.INFO):
        return
    count = Counter[str]()
    for batch in dataset.select_columns("miso_layout").iter(1000):
        for example in chain.from_iterable(map(decode, batch["miso_layout"])):
            count["examples"] += 1
            count["mixed"] += bool(example.branches)
            count["contexts"] += len(example.branches)
            count["tokens"] += example.num_tokens
            count["unshared"] += unshared_tokens(example)
    logger.info(
        f"{name} dataset: {count['examples']} examples, {count['mixed'] / max(count['examples'], 1):.0%} with several contexts "
        f"({count['contexts'] / max(count['mixed'], 1):.1f} on average), {count['tokens']} tokens ({count['unshared']} without "
        "shared prefixes)."
    )


def full_rows(
    dataset: AnyDataset, kind: str, name: str, num_proc: int | None, response_template: str | None = None
) -> AnyDataset:
    """Rows of our own formats as rows for TRL's preparation: prompt and completion with the full context, or messages."""
    return _to_trl(dataset, _TRLRows(kind, response_template), name, num_proc)


def augmented_rows(
    dataset: AnyDataset,
    kind: str,
    include_full: bool,
    include_bare: bool,
    name: str,
    num_proc: int | None,
    response_template: str | None = None,
) -> AnyDataset:
    """Every context as a prompt-completion row of its own: the paper's "no MISO" ablation."""
    rows = _TRLRows(kind, response_template, augment=True, include_full=include_full, include_bare=include_bare)
    return _to_trl(dataset, rows, name, num_proc)


@dataclass(frozen=True)
class _TRLRows:
    """Maps batches of raw rows to rows for TRL's preparation, without the rows that are dropped."""

    kind: str
    response_template: str | None = None
    augment: bool = False
    include_full: bool = True
    include_bare: bool = True

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = []
        for row, index in zip(_rows(batch), indices, strict=True):
            try:
                rows += self.make(row, index)
            except RowDropped as reason:
                _warn_dropped(str(reason))
        names = ["messages"] if self.kind == "messages" else ["prompt", "completion"]
        return {name: [row[name] for row in rows] for name in [*names, *(name for name in KEPT if name in batch)]}

    def reasons(self, batch: dict[str, list], indices: list[int]) -> dict[str, list[str]]:
        """Why rows are dropped, empty for the others."""
        return {"miso_dropped": [self._reason(row, index) for row, index in zip(_rows(batch), indices, strict=True)]}

    def _reason(self, row: dict[str, Any], index: int) -> str:
        try:
            self.make(row, index)
        except RowDropped as reason:
            return str(reason)
        return ""

    def make(self, row: dict[str, Any], index: int) -> list[dict[str, Any]]:
        """The row as one or more rows for TRL. Raises RowDropped if it carries nothing to learn from."""
        with _naming(index):
            if self.kind == "messages":
                return [messages_row(row)]  # TRL's masks apply, which need no assistant turn at the end
            if self.augment:
                made = parallel_row(row, self.kind, self.include_full, self.include_bare, self.response_template)
            else:
                made = full_row(row, self.kind, self.response_template)
            return [as_trl_row(row, context, made.completion) for context in made.contexts]


def _to_trl(dataset: AnyDataset, rows: _TRLRows, name: str, num_proc: int | None) -> AnyDataset:
    desc = f"Making prompts of {name} dataset"
    if isinstance(dataset, Dataset):
        reasons = _map_rows(dataset, rows.reasons, num_proc, desc, features=Features(_REASON))
        dataset = _kept(dataset, reasons["miso_dropped"][:], name)
        return _map_rows(dataset, rows, num_proc, desc)
    dataset = _map_rows(dataset, rows, num_proc, desc)
    _check_not_empty(dataset)
    return dataset


def add_layout(dataset: AnyDataset, num_proc: int | None) -> AnyDataset:
    """Give tokenized rows without a layout that of one causal run, and keep only what the collator reads."""
    if dataset.column_names is None:
        _check_not_empty(dataset)
    names = get_dataset_column_names(dataset)
    if "miso_layout" not in names:
        dataset = _map(dataset, _single_layouts, num_proc, "Adding layouts")
    return dataset.select_columns([name for name in COLUMNS if name in names or name == "miso_layout"])


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
    return _map(dataset.select_columns(COLUMNS), _Packing(max_length, shared), num_proc, "Packing examples")


@dataclass(frozen=True)
class _Packing:
    max_length: int
    shared: bool

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        sizes = [
            sum(example.num_tokens if self.shared else unshared_tokens(example) for example in decode(layout))
            for layout in batch["miso_layout"]
        ]
        bins = plan_bins(sizes, self.max_length)
        return {
            name: [list(chain.from_iterable(batch[name][i] for i in members)) for members in bins] for name in COLUMNS
        }


def unshared_tokens(example: Example) -> int:
    """Tokens of the example when every context has its own copy."""
    return unshare(example, [])[0].num_tokens


def _single_layouts(batch: dict[str, list]) -> dict[str, list[list[int]]]:
    """One causal run a row, or one for each of the `seq_lengths` of a row that TRL packed."""
    layouts = []
    for i, ids in enumerate(batch["input_ids"]):
        lengths = batch["seq_lengths"][i] if "seq_lengths" in batch else [len(ids)]
        if sum(lengths) != len(ids):
            raise ValueError(
                f"Got a packed row of {len(ids)} tokens with seq_lengths {lengths!r:.100}, expected them to add up to its tokens. Fix: "
                "set max_length to at least the length it was packed to."
            )
        layouts.append(list(chain.from_iterable(encode(single(length)) for length in lengths)))
    return {"miso_layout": layouts}


def _rows(batch: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """The row's `tools` and `chat_template_kwargs`, as TRL passes them to the chat template."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ValueError(
            f"Got {kwargs!r:.200} in column 'chat_template_kwargs', expected a dict. Fix: convert the column."
        )
    return {"tools": tools, **kwargs}


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Give errors the number of the row."""
    try:
        yield
    except (ValueError, TypeError, TemplateError) as error:
        raise ValueError(f"Row {index}: {error}") from error


def _raise(error: Exception) -> Any:
    raise error


def _map_rows(dataset: AnyDataset, function: Callable, num_proc: int | None, desc: str, **options: Any) -> AnyDataset:
    """Replace rows and all their columns by what `function` makes of a batch of rows and their indices."""
    names = get_dataset_column_names(dataset)
    return _map(dataset, function, num_proc, desc, with_indices=True, remove_columns=names, **options)


def _map(dataset: AnyDataset, function: Callable, num_proc: int | None, desc: str, **options: Any) -> AnyDataset:
    if isinstance(dataset, IterableDataset):
        return dataset.map(function, batched=True, **options)
    with PartialState().local_main_process_first():  # which fills the cache that the node's other ranks read
        return dataset.map(function, batched=True, num_proc=num_proc, desc=desc, **options)
