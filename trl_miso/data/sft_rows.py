"""Rows of every format as rows that TRL's own preparation takes: checked, numbered, with the types of their columns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from trl_miso.data.contexts import (
    KEPT,
    TOKENS,
    RowDropped,
    as_trl_row,
    full_row,
    messages_row,
    parallel_row,
    template_kwargs,
    text_row,
    token_row,
)
from trl_miso.data.dropped import SAMPLE, AnyDataset, Dropped, dropped_rows, report_dropped
from trl_miso.data.mapping import REASON, Kept, check_not_empty, map_rows, naming, rows_of
from trl_miso.data.tokenization import RowTokenizer


@dataclass(frozen=True)
class SFTRows:
    """Maps batches of raw rows to rows for TRL's preparation, without the rows that are dropped.

    Prompt and completion with the full context, messages, text, or token ids; with `augment`, every context as a
    prompt-completion row of its own (the paper's "no MISO" ablation). Rows are checked with the `tokenizer` that TRL is to
    render them with, unless it is None. `formatting_func` makes the `text_field`.
    """

    kind: str
    response_template: str | None = None
    augment: bool = False
    include_full: bool = True
    include_bare: bool = True
    tokenizer: RowTokenizer | None = None
    text_field: str = "text"
    formatting_func: Callable[[dict], str] | None = None
    reported: tuple[str, ...] = ()

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows, kept = [], Kept(self.reported)
        for row, index in zip(rows_of(batch), indices, strict=True):
            try:
                rows += [made | {"miso_row": row["miso_row"]} for made in self.make(row, index)]
            except RowDropped as reason:
                kept(str(reason))
        return {name: [row[name] for row in rows] for name in [*self.columns(list(batch)), "miso_row"]}

    def columns(self, names: list[str]) -> list[str]:
        """What rows with columns `names` have for TRL."""
        if self.kind == "text":
            return [self.text_field]
        if self.kind == "tokenized":
            return [name for name in TOKENS if name in names]
        made = ["messages"] if self.kind == "messages" else ["prompt", "completion"]
        return made + [name for name in KEPT if name in names]

    def reasons(self, batch: dict[str, list], indices: list[int]) -> dict[str, list[str]]:
        """Why rows are dropped, empty for the others."""
        return {"miso_dropped": [self._reason(row, index) for row, index in zip(rows_of(batch), indices, strict=True)]}

    def _reason(self, row: dict[str, Any], index: int) -> str:
        try:
            self.make(row, index)
        except RowDropped as reason:
            return str(reason)
        return ""

    def make(self, row: dict[str, Any], index: int) -> list[dict[str, Any]]:
        """The row as one or more rows for TRL. Raises RowDropped if it carries nothing to learn from."""
        with naming(index):
            made = self._make(row)
            if self.tokenizer is not None and self.kind != "tokenized":
                kwargs = template_kwargs(row)
                for one in made:
                    prompt = one.get("prompt")
                    whole = one[self.columns([])[0]] if prompt is None else prompt + one["completion"]
                    self.tokenizer.check(whole, prompt, kwargs)
            return made

    def _make(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        if self.kind == "messages":
            return [messages_row(row)]  # TRL's masks apply, which need no assistant turn at the end
        if self.kind == "text":
            row = {self.text_field: self.formatting_func(row)} if self.formatting_func else row
            return [text_row(row, self.text_field)]
        if self.kind == "tokenized":
            return [token_row(row)]
        made = full_row(row, self.kind, self.response_template)
        if self.augment:
            made = parallel_row(row, self.kind, self.include_full, self.include_bare, self.response_template, made)
        return [as_trl_row(row, context, made.completion) for context in made.contexts]


def prepare_sft_rows(dataset: AnyDataset, rows: SFTRows, name: str, num_proc: int | None) -> tuple[AnyDataset, Dropped]:
    """Rows numbered and made for TRL's own preparation, without those that are dropped, which are reported.

    Raises:
        ValueError: If a row is malformed, or of a stream, if no row is left.
    """
    desc = f"Making prompts of {name} dataset"
    dataset = _numbered(dataset)
    reasons = map_rows(dataset, rows.reasons, num_proc, desc, features=REASON)
    streamed = isinstance(dataset, IterableDataset)
    reasons = [row["miso_dropped"] for row in reasons.take(SAMPLE)] if streamed else reasons["miso_dropped"][:]
    dropped = dropped_rows(range(len(reasons)), reasons)
    report_dropped(dropped, len(reasons), name, streamed)
    if dropped and not streamed:
        dataset = dataset.select([i for i, reason in enumerate(reasons) if not reason])
    rows = replace(rows, reported=tuple(dropped), tokenizer=rows.tokenizer if streamed else None)  # checked above
    options = {} if streamed else _trl_types(dataset, rows)
    dataset = map_rows(dataset, rows, num_proc, desc, **options)
    if streamed:
        check_not_empty(dataset)
    return dataset, dropped


def _numbered(dataset: AnyDataset) -> AnyDataset:
    """Rows with their number, which survives what TRL does to them."""
    if isinstance(dataset, Dataset):
        return dataset.add_column("miso_row", [[i] for i in range(len(dataset))])
    return dataset.map(_number, with_indices=True)


def _number(row: dict[str, Any], index: int) -> dict[str, list[int]]:
    return {"miso_row": [index]}


def _trl_types(dataset: Dataset, rows: SFTRows) -> dict[str, Any]:
    """Options of `Dataset.map` for rows for TRL: types by the columns that rows come from, since the first rows may lack
    some, or if that cannot be told the first rows' types. A prompt need not come from the column of that name."""
    known = dataset.features
    sources = {name: [List(Value("int64"))] for name in (*TOKENS, "miso_row")} | {rows.text_field: [Value("string")]}
    sources |= {name: [known[name]] for name in ("completion", *KEPT) if name in known}
    sources["prompt"] = [known[name] for name in ("prompt", "full_prompt") if name in known]
    if rows.kind == "contexts":
        sources["prompt"] += [getattr(known["contexts"], "feature", None)]
    sources["messages"] = [_message_types(known[name]) for name in ("messages", "conversations") if name in known]
    if known.get("chat_template_kwargs") == Value("null"):
        sources["chat_template_kwargs"] = [None]  # a null one is made an empty dict
    types = {name: _merged(sources[name]) for name in [*rows.columns(list(known)), "miso_row"]}
    features = Features(types) if None not in types.values() else None
    return {"features": features, "try_original_type": rows.kind not in ("constraints", "contexts")}


def _message_types(types: Any) -> Any:
    """Types of messages made of turns of these types; see `to_messages`."""
    turn = getattr(types, "feature", None)
    if not isinstance(turn, dict):
        return types
    keys = {"role": ("role", "from"), "content": ("content", "value")}
    named = {name: _merged([turn[key] for key in either if key in turn]) for name, either in keys.items()}
    return List(named | {key: kind for key, kind in turn.items() if not any(key in either for either in keys.values())})


def _merged(types: list) -> Any:
    """A type for values of all these types, or None."""
    types = [t for t in types if t != Value("null")] or types[:1] or [None]
    if all(isinstance(t, dict) for t in types):
        made = {key: _merged([t[key] for t in types if key in t]) for key in chain.from_iterable(types)}
        return None if None in made.values() else made
    if all(isinstance(t, List) for t in types):
        item = _merged([t.feature for t in types])
        return None if item is None else List(item)
    return types[0] if isinstance(types[0], Value) and all(t == types[0] for t in types) else None
