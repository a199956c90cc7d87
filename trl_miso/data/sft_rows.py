"""Rows for TRL's own preparation (modes single and augment): checked, numbered, with declared column types."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, chain, compress, pairwise
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from trl_miso.data.contexts import full_row, parallel_row
from trl_miso.data.dropped import SAMPLE, AnyDataset, Dropped, dropped_rows, report_dropped
from trl_miso.data.mapping import REASON, KeepRow, check_not_empty, map_rows, naming, rows_of
from trl_miso.data.options import DEFAULTS, DataOptions
from trl_miso.data.schema import (
    TEMPLATE_COLUMNS,
    TOKEN_COLUMNS,
    Prompt,
    RowDropped,
    check_text,
    has_content,
    integer_column,
    is_conversation,
    template_kwargs,
    to_messages,
    wrong_type,
)
from trl_miso.data.tokenization import RowTokenizer
from trl_miso.data.turns import each_completion


@dataclass(frozen=True)
class SFTRows:
    """Maps batches of raw rows to rows that TRL prepares, without the rows that are dropped.

    A row becomes prompt and completion with the full context, messages, text, or token ids.

    Args:
        kind: The format of the rows, see `schema.row_format`.
        options: `include_full`, `include_bare` and `response_template` are read.
        augment: Make every context a prompt-completion row of its own (the paper's "no MISO" ablation).
        tokenizer: Checks rows as TRL will render them, and removes a BOS from plain text that TRL's call adds. None skips both.
        checked: Whether all rows were checked before.
        padding: The token that pads tokenized rows; None if it also stands for something else.
        text_field: The column of plain text.
        formatting_func: Makes the plain text of a row.
        reported: Reasons to drop rows that were logged before.
    """

    kind: str
    options: DataOptions = DEFAULTS
    augment: bool = False
    tokenizer: RowTokenizer | None = None
    checked: bool = False
    padding: int | None = None
    text_field: str = "text"
    formatting_func: Callable[[dict], str] | None = None
    reported: tuple[str, ...] = ()

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows: list[dict[str, Any]] = []
        keep = KeepRow(self.reported)
        for row, index in zip(rows_of(batch), indices, strict=True):
            try:
                rows += [sft_row | {"miso_row": row["miso_row"]} for sft_row in self.make(row, index)]
            except RowDropped as reason:
                keep(str(reason))
        return {name: [row[name] for row in rows] for name in [*self.columns(list(batch)), "miso_row"]}

    def columns(self, names: list[str]) -> list[str]:
        """The columns that TRL gets from rows with columns `names`."""
        if self.kind == "text":
            return [self.text_field]
        if self.kind == "tokenized":
            return [name for name in TOKEN_COLUMNS if name in names]
        content = ["messages"] if self.kind == "messages" else ["prompt", "completion"]
        return content + [name for name in TEMPLATE_COLUMNS if name in names]

    def reasons(self, batch: dict[str, list], indices: list[int]) -> dict[str, list[str]]:
        """For each row the reason why it is dropped; empty for rows that are kept."""
        return {"miso_dropped": [self._reason(row, index) for row, index in zip(rows_of(batch), indices, strict=True)]}

    def _reason(self, row: dict[str, Any], index: int) -> str:
        try:
            self.make(row, index)
        except RowDropped as reason:
            return str(reason)
        return ""

    def make(self, row: dict[str, Any], index: int) -> list[dict[str, Any]]:
        """One or more rows for TRL. Raises RowDropped if nothing can be learned from the row."""
        with naming(index):
            sft_rows = self._make(row)
            if self.tokenizer is not None and not self.checked and self.kind != "tokenized":
                kwargs = template_kwargs(row)
                for sft_row in sft_rows:
                    prompt = sft_row.get("prompt")
                    whole = sft_row[self.columns([])[0]] if prompt is None else prompt + sft_row["completion"]
                    self.tokenizer.check(whole, prompt, kwargs)
            return sft_rows

    def _make(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        if self.kind == "messages":
            return [messages_row(row)]  # the conversation may end in any turn: TRL's masks apply
        if self.kind == "text":
            row = {self.text_field: self.formatting_func(row)} if self.formatting_func else row
            return [{self.text_field: self._without_bos(text_row(row, self.text_field)[self.text_field])}]
        if self.kind == "tokenized":
            return [token_row(row, self.padding)]
        template_columns = _template_columns(row)
        sft_rows = []
        for one in each_completion(row, self.kind):
            context_row = full_row(one, self.kind, self.options)
            if self.augment:
                context_row = parallel_row(one, self.kind, self.options, context_row)
            for context in context_row.contexts:
                columns = {"prompt": self._without_bos(context), "completion": context_row.completion}
                sft_rows.append(columns | template_columns)
        return sft_rows

    def _without_bos(self, text: Prompt) -> Prompt:
        return self.tokenizer.without_bos(text) if self.tokenizer is not None and isinstance(text, str) else text


def messages_row(row: dict[str, Any]) -> dict[str, Any]:
    """A conversation for TRL's own preparation."""
    messages = to_messages(row)
    if not any(map(has_content, messages)):
        raise RowDropped("an empty conversation")
    return {"messages": messages} | _template_columns(row)


def text_row(row: dict[str, Any], field: str) -> dict[str, Any]:
    """Plain text for TRL's own preparation."""
    text = row.get(field)
    if not isinstance(text, str | None):
        raise wrong_type(text, field, "a string")
    if not text or not text.strip():
        raise RowDropped("an empty text")
    return {field: check_text(text, field)}


def token_row(row: dict[str, Any], padding: int | None = None) -> dict[str, Any]:
    """The columns of a tokenized row as lists of integers, without padding.

    Padding is what `attention_mask` leaves out; without this column, tokens `padding` at either end.
    """
    columns = {name: integer_column(row[name], name) for name in TOKEN_COLUMNS if name in row}
    if row.get("attention_mask") is not None:
        columns["attention_mask"] = integer_column(row["attention_mask"], "attention_mask")
    ids = columns["input_ids"]
    if not ids:
        raise RowDropped("no tokens")
    for name, values in columns.items():
        if name != "seq_lengths" and len(values) != len(ids):
            raise ValueError(
                f"Got {len(values)} values in column {name!r} beside {len(ids)} in column 'input_ids', expected one for each token. "
                f"Fix: make {name!r} as long as 'input_ids'."
            )
    mask = columns.pop("attention_mask", None) or _mask_of(ids, padding)
    return columns if all(mask) else _without_padding(columns, mask)


def _mask_of(ids: list[int], padding: int | None) -> list[int]:
    """The attention mask of tokens with `padding` at either end."""
    if padding not in (ids[0], ids[-1]):
        return [1] * len(ids)
    text = [i for i, token in enumerate(ids) if token != padding] or [len(ids)]
    return [int(text[0] <= i <= text[-1]) for i in range(len(ids))]


def _without_padding(columns: dict[str, list[int]], mask: list[int]) -> dict[str, list[int]]:
    """The columns of a tokenized row without the tokens whose mask is 0."""
    if not any(mask):
        raise RowDropped("only padding")
    kept = {}
    for name, values in columns.items():
        if name != "seq_lengths":
            kept[name] = list(compress(values, mask))
        elif sum(values) == len(mask):
            runs = [mask[start:end] for start, end in pairwise(accumulate(values, initial=0))]
            kept[name] = [sum(map(bool, run)) for run in runs if any(run)]
        else:  # the padding is in none of the runs
            kept[name] = values
    return kept


def _template_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that TRL passes to the chat template, in forms that TRL can read."""
    kwargs = template_kwargs(row)
    columns = {name: row[name] for name in TEMPLATE_COLUMNS if name in row}
    if "tools" in columns and kwargs["tools"] is None:
        columns["tools"] = None
    if columns.get("chat_template_kwargs", {}) is None:
        columns["chat_template_kwargs"] = {}
    return columns


def prepare_sft_rows(dataset: AnyDataset, rows: SFTRows, name: str, num_proc: int | None) -> tuple[AnyDataset, Dropped]:
    """Number the rows, convert them for TRL, and drop and report those that cannot be trained on.

    Raises:
        ValueError: If a row is malformed, or if no row of a stream is left.
    """
    desc = f"Making prompts of {name} dataset"
    streamed = isinstance(dataset, IterableDataset)
    dataset = _with_numbers(dataset)
    checked = map_rows(dataset, rows.reasons, num_proc, desc, features=REASON)
    reasons = [row["miso_dropped"] for row in checked.take(SAMPLE)] if streamed else checked["miso_dropped"][:]
    dropped = dropped_rows(range(len(reasons)), reasons)
    report_dropped(dropped, len(reasons), name, streamed)
    if streamed:
        rows = replace(rows, reported=tuple(dropped))
        dataset = map_rows(dataset, rows, num_proc, desc)
        check_not_empty(dataset)
        return dataset, dropped
    if dropped:
        dataset = dataset.select([i for i, reason in enumerate(reasons) if not reason])
    rows = replace(rows, reported=tuple(dropped), checked=True)
    return map_rows(dataset, rows, num_proc, desc, **_type_options(dataset, rows)), dropped


def _with_numbers(dataset: AnyDataset) -> AnyDataset:
    """Rows with their number in a column that TRL's preparation keeps."""
    if isinstance(dataset, Dataset):
        return dataset.add_column("miso_row", [[i] for i in range(len(dataset))])
    return dataset.map(_number, with_indices=True)


def _number(row: dict[str, Any], index: int) -> dict[str, list[int]]:
    return {"miso_row": [index]}


def _type_options(dataset: Dataset, rows: SFTRows) -> dict[str, Any]:
    """The arguments of `Dataset.map` that declare the types of rows for TRL.

    The types are those of the raw columns from which the rows are made, since the first rows may lack some keys. Where
    that does not decide a type, `datasets` infers all types from the first rows. A prompt need not come from the column
    of that name.
    """
    raw = dataset.features
    sources = {name: [List(Value("int64"))] for name in (*TOKEN_COLUMNS, "miso_row")}
    sources[rows.text_field] = [Value("string")]
    for name in TEMPLATE_COLUMNS:
        if name in raw:
            sources[name] = [raw[name]]
    sources["completion"] = [raw[name] for name in ("completion",) if name in raw]
    sources["completion"] += [getattr(raw[name], "feature", None) for name in ("completions",) if name in raw]
    sources["messages"] = [_message_types(raw[name]) for name in ("messages", "conversations") if name in raw]
    sources["prompt"] = [raw[name] for name in ("prompt", "full_prompt") if name in raw]
    if rows.kind == "contexts":
        sources["prompt"] += [getattr(raw["contexts"], "feature", None)]
    if is_conversation(rows.kind, raw):
        sources["prompt"] = sources["messages"] + [raw[name] for name in ("full_prompt",) if name in raw]
        sources["completion"] = sources["messages"]
    if raw.get("chat_template_kwargs") == Value("null"):
        sources["chat_template_kwargs"] = [None]  # null becomes an empty dict
    types = {name: _merge_types(sources[name]) for name in [*rows.columns(list(raw)), "miso_row"]}
    features = Features(types) if None not in types.values() else None
    return {"features": features, "try_original_type": rows.kind not in ("constraints", "contexts")}


def _message_types(types: Any) -> Any:
    """The types of messages converted from turns of these types; see `schema.to_messages`."""
    turn = getattr(types, "feature", None)
    if not isinstance(turn, dict):
        return types
    alternatives = {"role": ("role", "from"), "content": ("content", "value")}
    merged = {}
    for name, keys in alternatives.items():
        merged[name] = _merge_types([turn[key] for key in keys if key in turn])
    converted = set(chain.from_iterable(alternatives.values()))
    return List(merged | {key: kind for key, kind in turn.items() if key not in converted})


def _merge_types(types: list) -> Any:
    """A type that holds values of all these types, or None if there is none."""
    types = [t for t in types if t != Value("null")] or types[:1] or [None]
    if all(isinstance(t, dict) for t in types):
        merged = {key: _merge_types([t[key] for t in types if key in t]) for key in chain.from_iterable(types)}
        return None if None in merged.values() else merged
    if all(isinstance(t, List) for t in types):
        item = _merge_types([t.feature for t in types])
        return None if item is None else List(item)
    if isinstance(types[0], Value) and all(t == types[0] for t in types):
        return types[0]
    return None
