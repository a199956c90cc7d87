"""Raw rows to contexts: which columns mean what, and the prompts that an instruction becomes.

A prompt is a string or a list of messages. Row formats, by their columns (the first that fits):

| columns | format |
| --- | --- |
| `input_ids` | `tokenized`: taken as they are |
| `contexts`, `completion`; optional `context_weights`, `prompt` | `contexts`: as given; the full one is `prompt`, else the first |
| `prompt`, `constraints`, `completion`; optional `full_prompt` | `constraints`: full, one per constraint, bare |
| `prompt`, `completion` | `prompt` |
| `messages` or ShareGPT `conversations`, ending in an assistant turn | `messages` |
| the text field | `text`: one context, plain language modelling |
"""

from typing import Any, NamedTuple

Prompt = str | list[dict[str, Any]]

MODES = ("auto", "para", "succ", "single", "augment")
_AUTO = {"contexts": "para", "constraints": "para", "prompt": "succ", "messages": "succ"}
_PARALLEL = ("contexts", "constraints")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_KEPT = ("tools", "chat_template_kwargs")  # columns that TRL hands to the chat template


class RowDropped(Exception):
    """A row that carries nothing to learn from; its message is the reason it is counted under."""


class Row(NamedTuple):
    """Contexts, the full one first unless it was left out, the completion, and fixed weights if the row has them."""

    contexts: list[Prompt]
    completion: Prompt
    weights: list[float] | None = None


def row_format(columns: list[str], text_field: str) -> str:
    """The format of a dataset with these columns. Raises ValueError if there is none."""
    have = set(columns)
    if "input_ids" in have:
        return "tokenized"
    for name, needed in (
        ("contexts", {"contexts", "completion"}),
        ("constraints", {"prompt", "constraints", "completion"}),
        ("prompt", {"prompt", "completion"}),
        ("messages", {"messages"}),
        ("messages", {"conversations"}),
        ("text", {text_field}),
    ):
        if needed <= have:
            return name
    raise ValueError(
        f"Got a dataset with columns {sorted(columns)}, expected one of: contexts + completion; prompt + constraints + "
        f"completion; prompt + completion; messages; conversations; {text_field}. Fix: rename or map your columns to one "
        "of these."
    )


def resolve_mode(mode: str, kind: str) -> str:
    """The mode that rows of this format are trained in. Raises ValueError if the format cannot be."""
    if kind in ("text", "tokenized"):
        if mode in ("auto", "single") or kind == "tokenized":
            return "single"
        raise ValueError(
            f"Got context_mode={mode!r} for rows of plain text, which have no input apart from their output, expected rows "
            "with a prompt and a completion. Fix: split the text into prompt and completion columns, or set "
            "context_mode='single'."
        )
    if mode == "auto":
        return _AUTO[kind]
    if mode in ("para", "augment") and kind not in _PARALLEL:
        raise ValueError(
            f"Got context_mode={mode!r} for rows in the {kind!r} format, expected a constraints or a contexts column to make "
            "contexts from. Fix: add one (trl_miso.sources has adapters), or set context_mode='succ' or 'single'."
        )
    return mode


def full_row(row: dict[str, Any], kind: str) -> Row:
    """The row with its full context alone: what standard inference would see."""
    if kind == "messages":
        messages = to_messages(row)
        if not messages or messages[-1]["role"] != "assistant":
            raise RowDropped("no output: the conversation does not end in an assistant turn")
        prompt, completion = messages[:-1], messages[-1:]
    else:
        completion = row["completion"]
        if kind == "contexts":
            prompt = row["prompt"] if row.get("prompt") else _list_of(row, "contexts", (str, list))[0]
        elif kind == "constraints" and row.get("full_prompt"):
            prompt = row["full_prompt"]
        elif kind == "constraints":
            prompt = _with_constraints(row["prompt"], _list_of(row, "constraints", (str,)))
        else:
            prompt = row["prompt"]
    _check_prompt("completion", completion, prompt)
    if not prompt:
        raise RowDropped("an empty context")
    if not completion or completion == [] or not _text(completion).strip():
        raise RowDropped("no output: the completion is empty")
    return Row([prompt], completion)


def parallel_row(row: dict[str, Any], kind: str, include_full: bool, include_bare: bool) -> Row:
    """The row with its parallel contexts (paper, section 5.1): full, one per constraint, bare; each listed once.

    A row without constraints keeps its full context only.
    """
    full = full_row(row, kind)
    if kind == "contexts":
        contexts = _list_of(row, "contexts", (str, list))
        weights = _context_weights(row, len(contexts))
    else:
        constraints = _list_of(row, "constraints", (str,))
        contexts = [*full.contexts, *(_with_constraints(row["prompt"], [c]) for c in constraints), row["prompt"]]
        contexts = contexts[0 if include_full else 1 : len(contexts) if include_bare else -1]
        if not constraints:
            contexts = full.contexts
        weights = None
        contexts = [c for i, c in enumerate(contexts) if c not in contexts[:i]]
    for context in contexts:
        _check_prompt("context", context, full.completion)
        if not context or not _text(context).strip():
            raise RowDropped("an empty context")
    return Row(contexts, full.completion, weights)


def as_trl_row(row: dict[str, Any], prompt: Prompt, completion: Prompt) -> dict[str, Any]:
    """A prompt-completion row for TRL's own preparation."""
    return {"prompt": prompt, "completion": completion} | {k: row[k] for k in _KEPT if k in row}


def to_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of a `messages` row, or of a ShareGPT `conversations` row with its roles mapped."""
    if row.get("messages") is not None:
        return row["messages"]
    turns = row.get("conversations") or []
    return [
        {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} if "from" in turn else turn for turn in turns
    ]


def _with_constraints(prompt: Prompt, constraints: list[str]) -> Prompt:
    """The base instruction followed by constraints, as Crab writes most of its rows."""
    if not constraints:
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}\n\n" + "\n".join(constraints)
    last = prompt[-1]
    return [*prompt[:-1], {**last, "content": _with_constraints(last["content"], constraints)}]


def _list_of(row: dict[str, Any], column: str, types: tuple[type, ...]) -> list:
    value = row[column] if row[column] is not None else []
    if isinstance(value, list) and all(isinstance(item, types) for item in value):
        if column == "contexts" and not value:
            raise RowDropped("an empty context: the contexts column is empty")
        return value
    expected = " or ".join("a list of messages" if t is list else "a string" for t in types)
    raise ValueError(
        f"Got {value!r:.200} in column {column!r}, expected a list whose items are each {expected}. Fix: convert the column."
    )


def _context_weights(row: dict[str, Any], n: int) -> list[float] | None:
    weights = row.get("context_weights")
    if weights is None:
        return None
    if len(weights) != n or not all(isinstance(w, (int, float)) and 0 < w < float("inf") for w in weights):
        raise ValueError(
            f"Got context_weights {weights!r:.200} for {n} contexts, expected {n} positive numbers (they are scaled to sum to "
            "1). Fix: give one weight a context, and leave out contexts that should have none."
        )
    return [w / sum(weights) for w in weights]


def _check_prompt(name: str, value: Any, like: Any) -> None:
    if not isinstance(value, (str, list)) or not isinstance(like, type(value)):
        raise ValueError(
            f"Got a {name} of type {type(value).__name__} beside a {type(like).__name__}, expected all of a row's prompts, contexts "
            "and completion to be strings, or all lists of messages. Fix: convert one to the other."
        )


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "".join(m["content"] if isinstance(m.get("content"), str) else str(m.get("content") or m) for m in prompt)
