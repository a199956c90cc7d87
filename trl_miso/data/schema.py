"""Raw rows: which columns mean what, and whether their values are what they should be.

A prompt is a string or a list of messages. The columns of a dataset decide the format of its rows; the first format in
this table whose columns are all there applies:

| columns | format |
| --- | --- |
| `input_ids` | `tokenized`: used unchanged |
| `contexts`, `completion`; optional `context_weights`, `prompt` | `contexts`: used unchanged; the full context is `prompt`, else the first |
| `prompt`, `constraints`, `completion`; optional `full_prompt` | `constraints`: full, one per constraint, bare |
| `messages` or `conversations`, `constraints`; optional `full_prompt` | `constraints`: the last answer is the completion |
| `prompt`, `completion` | `prompt` |
| `messages` or ShareGPT `conversations`, with an assistant turn | `messages` |
| the text field | `text`: one context, plain language modelling |

`completions`, several answers to one prompt, may stand for `completion`: each of them is an answer that is trained.
"""

import json
from collections.abc import Container, Iterator
from numbers import Integral, Real
from typing import Any

from trl_miso.data.constraints import is_identifier

Prompt = str | list[dict[str, Any]]

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
TEMPLATE_ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys under which messages carry reasoning
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # columns that TRL passes to the chat template
TOKEN_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths")
# Arguments of `apply_chat_template` itself, which a row cannot pass to its template.
_RESERVED_ARGUMENTS = {
    *("conversation", "messages", "add_generation_prompt", "continue_final_message", "padding", "tokenize"),
    *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
}


class RowDropped(Exception):
    """A row from which nothing can be learned. The message is the reason under which the row is counted."""


def row_format(columns: list[str], text_field: str) -> str:
    """The format of a dataset with these columns, by the table above. Raises ValueError if no format fits."""
    have = set(columns)
    if "completions" in have:
        have.add("completion")
    if "input_ids" in have:
        return "tokenized"
    if "contexts" in have and "completion" not in have and have & {"messages", "conversations"}:
        raise ValueError(
            f"Got a dataset with columns {sorted(columns)}, whose contexts have no completion. Expected contexts + completion. Fix: "
            "move the last answer of the messages to a column 'completion' and the turns before it to 'prompt', or remove 'contexts'."
        )
    for name, needed in (
        ("contexts", {"contexts", "completion"}),
        ("constraints", {"prompt", "constraints", "completion"}),
        ("constraints", {"messages", "constraints"}),
        ("constraints", {"conversations", "constraints"}),
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


def check_prompt(value: Any, column: str) -> Prompt:
    """Return `value` if it is a prompt or completion with some text.

    Raises:
        RowDropped: If the value is empty.
        ValueError: If the value is neither a string nor a list of messages.
    """
    if not isinstance(value, str | list | None):
        raise wrong_type(value, column, "a string or a list of messages")
    if isinstance(value, list):
        for message in value:
            _check_message(message, column, message)
        is_empty = not any(map(has_content, value))
    else:
        is_empty = not (value or "").strip()
    if is_empty:
        raise RowDropped("no output: the completion is empty" if column == "completion" else "an empty context")
    return check_text(list(map(message_without_nulls, value)) if isinstance(value, list) else value, column)


def is_conversation(kind: str, columns: Container[str]) -> bool:
    """Whether the answers of rows of format `kind` with these columns are turns of their messages."""
    has_both = "prompt" in columns and ("completion" in columns or "completions" in columns)
    has_messages = "messages" in columns or "conversations" in columns
    return kind == "messages" or (kind == "constraints" and has_messages and not has_both)


def is_given(row: dict[str, Any], column: str) -> bool:
    """Whether an optional prompt column has a value: null, blank and empty ones count as absent."""
    value = row.get(column)
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, list) and not value)


def constraints_of(row: dict[str, Any]) -> list[str]:
    """The row's constraints, without blank ones. Raises ValueError for names of checks."""
    constraints = [constraint for constraint in list_column(row, "constraints", (str,)) if constraint.strip()]
    for constraint in constraints:
        if is_identifier(constraint):
            raise ValueError(
                f"Got {constraint!r:.200} in column 'constraints', the name of a check, expected the constraint in words, as a user "
                "writes it: contexts are made of it. Fix: give the sentences of the prompt that state the constraints, or remove the column."
            )
    return constraints


def context_weights_of(row: dict[str, Any], n: int) -> list[float] | None:
    """The row's `context_weights` scaled to sum to 1, or None if it has none. Raises ValueError if they do not fit n contexts."""
    weights: Any = row.get("context_weights")
    if weights is None:
        return None
    are_numbers = isinstance(weights, list) and all(issubclass(type(w), Real) and 0 < w < 1e30 for w in weights)
    scaled = [float(w) / float(sum(weights)) for w in weights] if are_numbers else []
    if len(scaled) != n or not all(scaled):  # a weight can be so small that scaling rounds it to zero
        raise ValueError(
            f"Got context_weights {weights!r:.200} for {n} contexts, expected {n} positive numbers in column 'context_weights' "
            "(they are scaled to sum to 1). Fix: give one weight per context, and leave out contexts without weight."
        )
    return scaled


def list_column(row: dict[str, Any], column: str, types: tuple[type, ...]) -> list:
    """The items of a list column, each of one of `types`; a null column counts as empty. Raises ValueError for other values."""
    value = [] if row.get(column) is None else row[column]
    if isinstance(value, list) and all(isinstance(item, types) for item in value):
        return check_text(value, column)
    expected = " or ".join("a list of messages" if t is list else "a string" for t in types)
    raise wrong_type(value, column, f"a list whose items are each {expected}")


def integer_column(value: Any, column: str) -> list[int]:
    """A column of token ids, labels or masks as a list of int. Raises ValueError for other values."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return []
    types = set(map(type, value)) if isinstance(value, list) else {str}
    if not all(issubclass(t, Integral) for t in types) or (bool in types and "mask" not in column):
        raise wrong_type(value, column, "a list of integers")
    return value if types == {int} else list(map(int, value))


def template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """The row's `tools` and `chat_template_kwargs` as arguments of the chat template, as TRL passes them."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise wrong_type(tools, "tools", f"a list of tools, or that list as JSON ({error})") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) or callable(t) for t in tools)):
        raise wrong_type(tools, "tools", "a list of tools, or that list as JSON")
    kwargs: Any = {} if row.get("chat_template_kwargs") is None else row["chat_template_kwargs"]
    if not isinstance(kwargs, dict) or not all(isinstance(k, str) and k not in _RESERVED_ARGUMENTS for k in kwargs):
        raise wrong_type(kwargs, "chat_template_kwargs", "a dict of arguments of the chat template's own")
    return {
        "tools": check_text(without_nulls(tools), "tools"),
        **check_text(without_nulls(kwargs), "chat_template_kwargs"),
    }


def to_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a `messages` row, or of a ShareGPT `conversations` row with its roles mapped to TRL's."""
    column = "conversations" if row.get("messages") is None else "messages"
    turns = row.get(column)
    if not isinstance(turns, list | None) or not all(isinstance(turn, dict) for turn in turns or []):
        raise wrong_type(turns, column, "a list of messages")
    messages = []
    for turn in turns or []:
        message = _to_message(turn)
        _check_message(message, column, turn)
        messages.append(message_without_nulls(message))
    return check_text(messages, column)


def has_content(message: dict[str, Any]) -> bool:
    """Whether a message carries anything: text, reasoning or a tool call."""
    texts = [*message_texts(message), *(message.get(name) or "" for name in REASONING)]
    return bool(message.get("tool_calls")) or any(str(text).strip() for text in texts)


def message_texts(message: dict[str, Any]) -> list[str]:
    """The text of a message: its content, or the text of each part of its content."""
    content = message.get("content") or []
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def check_text(value: Any, column: str) -> Any:
    """Return `value` if a tokenizer can read all its strings. Raises ValueError for half of a surrogate pair."""
    for text in _strings(value):
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Got {text[error.start]!r} in column {column!r} (at character {error.start} of {text[:50]!r}), expected text that "
                "UTF-8 can encode: this is half of a surrogate pair. Fix: text.encode('utf-16', 'surrogatepass').decode('utf-16', "
                "'replace') joins halves that belong together and replaces others."
            ) from error
    return value


def without_nulls(value: Any) -> Any:
    """`value` without the keys of its dicts that are null: Arrow gives all dicts of a column the keys of each."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def message_without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """The message without null keys. Its content stays: templates ask whether it is null."""
    if len(message) == 2:  # role and content
        return message
    return {key: without_nulls(item) for key, item in message.items() if item is not None or key == "content"}


def wrong_type(value: Any, column: str, expected: str) -> ValueError:
    """The error for a value of the wrong type in a column."""
    return ValueError(f"Got {value!r:.200} in column {column!r}, expected {expected}. Fix: convert the column.")


def _to_message(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn with TRL's keys and roles. Arrow gives the turns of a list the keys of all of them, null where absent."""
    extra = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    if turn.get("from") is None:
        return {key: turn[key] for key in ("role", "content") if key in turn} | extra
    role = turn["from"]
    if isinstance(role, str):
        role = ROLES.get(role.strip().lower(), role.strip().lower())
    return {"role": role, "content": turn.get("value")} | extra


def _check_message(message: Any, column: str, raw: Any) -> None:
    """Raise ValueError if `message`, converted from `raw`, is malformed."""
    if not _is_message(message):
        expected = "messages, each a dict with a role and text as content, alone or in parts of type 'text'"
        raise wrong_type(raw, column, expected)
    role = message["role"]
    if role != (lower := role.strip().lower()) and lower in TEMPLATE_ROLES:
        raise ValueError(
            f"Got role {role!r} in column {column!r}, expected {lower!r}: chat templates match roles by their exact name. Fix: "
            f"set it to {lower!r}."
        )


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content, calls = value.get("content"), value.get("tool_calls")
    parts = content if isinstance(content, list) else []
    return (
        isinstance(content, str | list | None)  # null beside tool calls
        and all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts)
        and (calls is None or isinstance(calls, list) and all(isinstance(call, dict) for call in calls))
    )


def _strings(value: Any) -> Iterator[str]:
    """All strings in a nested value."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
