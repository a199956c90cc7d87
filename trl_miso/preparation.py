"""Raw dataset to prepared dataset: contexts, tokens, layout; rows dropped and counted; packing."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from accelerate.logging import get_logger
from trl.data_utils import get_dataset_column_names

from trl_miso.contexts import _KEPT, Row, RowDropped, as_trl_row, full_row, parallel_row
from trl_miso.packing import plan_bins
from trl_miso.segments import Example, decode, single
from trl_miso.tokenization import Layout, Tokenizer, columns

logger = get_logger(__name__)

AnyDataset = Dataset | IterableDataset
COLUMNS = ["input_ids", "labels", "miso_layout"]


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
        kept = [(row, made_row) for row, made_row in zip(rows, made, strict=True) if isinstance(made_row, Row)]
        kwargs = [_template_kwargs(row) for row, _ in kept]
        tokenized = iter(self._tokenize([made_row for _, made_row in kept], kwargs, indices))
        out: dict[str, list] = {name: [] for name in [*COLUMNS, "miso_dropped"]}
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
        try:
            if self.mode == "para":
                return parallel_row(row, self.kind, self.include_full, self.include_bare)
            return full_row(row, self.kind)
        except RowDropped as reason:
            return reason
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error

    def _tokenize(self, rows: list[Row], kwargs: list[dict], indices: list[int]) -> list:
        try:
            return self.tokenizer(rows, kwargs)
        except ValueError as error:
            raise ValueError(f"Rows {indices[0]} to {indices[-1]}: {error}") from error

    def _lay_out(self, row: Row, tokenized: Any) -> dict[str, list[int]]:
        if isinstance(tokenized, RowDropped):
            raise tokenized
        mode = self.mode
        if mode == "para" and not self.layout.is_mixed(tokenized.contexts[0] + tokenized.output):
            mode, tokenized.contexts = "single", tokenized.contexts[:1]
        return self.layout(tokenized, mode, row.weights)


def prepare_rows(dataset: AnyDataset, rows: RowPreparation, name: str, num_proc: int | None) -> AnyDataset:
    """Apply a row preparation, drop and report what it dropped. Raises ValueError if no row is left."""
    options = _map_options(dataset, num_proc, f"Preparing contexts of {name} dataset")
    names = get_dataset_column_names(dataset)
    dataset = dataset.map(rows, batched=True, with_indices=True, remove_columns=names, **options)
    if isinstance(dataset, Dataset):
        report_dropped(dataset["miso_dropped"], name)
    options = _map_options(dataset, num_proc, f"Dropping empty rows of {name} dataset")
    dataset = dataset.filter(_is_kept, input_columns="miso_dropped", **options)
    return dataset.remove_columns("miso_dropped")


def report_dropped(reasons: Iterable[str], name: str) -> None:
    """Log each reason once with its count and first row. Raises ValueError if every row was dropped."""
    reasons = list(reasons)
    counts = Counter(reason for reason in reasons if reason)
    for reason, count in counts.items():
        logger.warning(f"Dropped {count} of {len(reasons)} rows of the {name} dataset (first: row {reasons.index(reason)}): {reason}.")
    if reasons and sum(counts.values()) == len(reasons):
        raise ValueError(
            f"Got a {name} dataset of {len(reasons)} rows none of which can be trained on ({dict(counts)}), expected rows with an "
            "input and an output that fit. Fix: raise max_length, or check the columns."
        )


def report_mixture(dataset: AnyDataset, name: str) -> None:
    """Log how many rows mix contexts and what sharing saves."""
    if not isinstance(dataset, Dataset):
        return
    examples = [example for layout in dataset["miso_layout"] for example in decode(layout)]
    mixed = [example for example in examples if example.branches]
    if not examples:
        return
    tokens = sum(example.num_tokens for example in examples)
    unshared = sum(unshared_tokens(example) for example in examples)
    contexts = sum(len(example.branches) for example in mixed) / max(len(mixed), 1)
    logger.info(
        f"{name} dataset: {len(examples)} examples, {len(mixed) / len(examples):.0%} with several contexts ({contexts:.1f} on "
        f"average), {tokens} tokens ({unshared} without shared prefixes)."
    )


def full_rows(dataset: AnyDataset, kind: str, name: str, num_proc: int | None) -> AnyDataset:
    """Rows of our own formats as prompt-completion rows with their full context, for TRL's preparation."""
    return _to_trl(dataset, _FullRows(kind), name, num_proc)


def augmented_rows(
    dataset: AnyDataset, kind: str, include_full: bool, include_bare: bool, name: str, num_proc: int | None
) -> AnyDataset:
    """Every context as a prompt-completion row of its own: the paper's "no MISO" ablation."""
    return _to_trl(dataset, _AugmentedRows(kind, include_full, include_bare), name, num_proc)


def _to_trl(dataset: AnyDataset, rows: Callable, name: str, num_proc: int | None) -> AnyDataset:
    options = _map_options(dataset, num_proc, f"Making prompts of {name} dataset")
    return dataset.map(
        rows, batched=True, with_indices=True, remove_columns=get_dataset_column_names(dataset), **options
    )


@dataclass(frozen=True)
class _FullRows:
    kind: str

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        return _trl_batch(batch, indices, lambda row: full_row(row, self.kind))


@dataclass(frozen=True)
class _AugmentedRows:
    kind: str
    include_full: bool
    include_bare: bool

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        return _trl_batch(batch, indices, lambda row: parallel_row(row, self.kind, self.include_full, self.include_bare))


def _trl_batch(batch: dict[str, list], indices: list[int], make: Callable[[dict], Row]) -> dict[str, list]:
    out = []
    for index, row in zip(indices, _rows(batch), strict=True):
        try:
            made = make(row)
        except RowDropped as reason:
            logger.warning_once(f"Dropped row {index} and perhaps others for the same reason: {reason}.")
            continue
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error
        out += [as_trl_row(row, context, made.completion) for context in made.contexts]
    names = ["prompt", "completion", *(name for name in _KEPT if name in batch)]
    return {name: [row[name] for row in out] for name in names}


def add_layout(dataset: AnyDataset, num_proc: int | None) -> AnyDataset:
    """Give tokenized rows without a layout that of one causal run, and keep only what the collator reads."""
    names = get_dataset_column_names(dataset)
    options = _map_options(dataset, num_proc, "Adding layouts")
    if "miso_layout" not in names:
        dataset = dataset.map(_single_layout, **options)
    return dataset.select_columns([name for name in COLUMNS if name in names or name == "miso_layout"])


def pack_rows(dataset: AnyDataset, max_length: int, shared: bool, num_proc: int | None) -> AnyDataset:
    """Bins of whole examples with at most `max_length` unique tokens, planned over batches of rows as TRL's packing is."""
    options = _map_options(dataset, num_proc, "Packing examples")
    return dataset.select_columns(COLUMNS).map(_Packing(max_length, shared), batched=True, **options)


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
        return {name: [sum((batch[name][i] for i in members), []) for members in bins] for name in COLUMNS}


def unshared_tokens(example: Example) -> int:
    """Tokens of the example when every context has its own copy."""
    if not example.branches:
        return example.num_tokens
    paths = sum(example.segments[i].length for branch in example.branches for i in example.path(branch.segment))
    return paths + example.segments[-1].length


def _single_layout(row: dict[str, Any]) -> dict[str, list[int]]:
    return {"miso_layout": columns([], [], single(len(row["input_ids"])))["miso_layout"]}


def _is_kept(reason: str) -> bool:
    return not reason


def _rows(batch: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """The row's `tools` and `chat_template_kwargs`, as TRL passes them to the chat template."""
    import json

    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def _raise(error: Exception) -> Any:
    raise error


def _map_options(dataset: AnyDataset, num_proc: int | None, desc: str) -> dict[str, Any]:
    return {"num_proc": num_proc, "desc": desc} if isinstance(dataset, Dataset) else {}
