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

Constraints are added to the last message, or to a string before its `response_template`, if it has one.
"""

import json
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple

Prompt = str | list[dict[str, Any]]

MODES = ("auto", "para", "succ", "single", "augment")
_AUTO = {"contexts": "para", "constraints": "para", "prompt": "succ", "messages": "succ"}
_PARALLEL = ("contexts", "constraints")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
TEMPLATE_ROLES = ("system", "developer", "user", "assistant", "tool")
KEPT = ("tools", "chat_template_kwargs")  # columns that TRL hands to the chat template
TOKENS = ("input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths")  # columns of tokenized rows
# Arguments of apply_chat_template that are not a template's own.
_NOT_OF_THE_TEMPLATE = {
    "conversation",
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "padding",
    "tokenize",
}
_NOT_OF_THE_TEMPLATE |= {"truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}


class RowDropped(Exception):
    """A row that carries nothing to learn from; its message is the reason it is counted under."""


class ContextRow(NamedTuple):
    """Contexts, the full one first if it is among them, the completion, and fixed weights if the row has them."""

    contexts: list[Prompt]
    completion: Prompt
    weights: list[float] | None = None

    @property
    def text(self) -> str:
        """What the first context and the completion say: what draws are made from before the row is tokenized."""
        return "\0".join(
            value if isinstance(value, str) else "\0".join(str(message.get("content")) for message in value)
            for value in (self.contexts[0], self.completion)
        )


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
        if mode in ("auto", "single"):
            return "single"
        raise ValueError(
            f"Got context_mode={mode!r} for rows of {'plain text' if kind == 'text' else 'tokens'}, which have no input apart from "
            "their output, expected rows with a prompt and a completion. Fix: give the prompt and the completion as columns, or "
            "set context_mode='single'."
        )
    if mode == "auto":
        return _AUTO[kind]
    if mode in ("para", "augment") and kind not in _PARALLEL:
        raise ValueError(
            f"Got context_mode={mode!r} for rows in the {kind!r} format, expected a constraints or a contexts column to make "
            "contexts from. Fix: add one (trl_miso.sources has adapters), or set context_mode='succ' or 'single'."
        )
    return mode


def full_row(row: dict[str, Any], kind: str, response_template: str | None = None) -> ContextRow:
    """The row with its full context alone: what standard inference would see."""
    if kind == "messages":
        messages = to_messages(row)
        if not messages or messages[-1]["role"] != "assistant":
            raise RowDropped("no output: the conversation does not end in an assistant turn")
        return _row([_prompt(messages[:-1], "messages")], messages[-1:], "messages")
    if kind == "contexts" and not _is_given(row, "prompt"):
        contexts = _list_of(row, "contexts", (str, list))
        if not contexts:
            raise RowDropped("an empty context: the contexts column is empty")
        column = "contexts"
        prompt = _prompt(contexts[0], column)
    elif kind == "constraints" and not _is_given(row, "full_prompt"):
        column = "prompt"
        prompt = _with_constraints(_prompt(row.get(column), column), _constraints(row), response_template)
    else:
        column = "full_prompt" if kind == "constraints" else "prompt"
        prompt = _prompt(row.get(column), column)
    return _row([prompt], row.get("completion"), column)


def parallel_row(
    row: dict[str, Any],
    kind: str,
    include_full: bool,
    include_bare: bool,
    response_template: str | None = None,
    full: ContextRow | None = None,
) -> ContextRow:
    """The row with its parallel contexts (paper, section 5.1): full, one per constraint, bare; each listed once.

    A row without constraints, or with a prompt but no contexts, keeps its full context only. `full` is the row's `full_row`,
    where it is at hand.
    """
    full = full or full_row(row, kind, response_template)
    if kind == "contexts":
        contexts = [_prompt(context, "contexts") for context in _list_of(row, "contexts", (str, list))]
        if not contexts:
            return full
        weights = _context_weights(row, len(contexts))
        said = list(map(_without_nulls, contexts))
        if (first := _without_nulls(full.contexts[0])) in said:
            at = said.index(first)
            contexts.insert(0, contexts.pop(at))
            if weights:
                weights.insert(0, weights.pop(at))
        return _alike(ContextRow(contexts, full.completion, weights), "contexts")
    constraints = _constraints(row)
    if not constraints:
        return full
    bare = _prompt(row.get("prompt"), "prompt")
    contexts = [*full.contexts, *(_with_constraints(bare, [c], response_template) for c in constraints), bare]
    contexts = contexts[0 if include_full else 1 : len(contexts) if include_bare else -1]
    said = list(map(_without_nulls, contexts))
    return _alike(ContextRow([c for i, c in enumerate(contexts) if said[i] not in said[:i]], full.completion), "prompt")


def as_trl_row(row: dict[str, Any], prompt: Prompt, completion: Prompt) -> dict[str, Any]:
    """A prompt-completion row for TRL's own preparation."""
    return {"prompt": prompt, "completion": completion} | _kept(row)


def messages_row(row: dict[str, Any]) -> dict[str, Any]:
    """A conversation for TRL's own preparation."""
    messages = to_messages(row)
    if not any(map(_says_something, messages)):
        raise RowDropped("an empty conversation")
    return {"messages": messages} | _kept(row)


def text_row(row: dict[str, Any], field: str) -> dict[str, Any]:
    """Plain text for TRL's own preparation."""
    text = row.get(field)
    if not isinstance(text, str | None):
        raise _wrong_type(text, field, "a string")
    if not text or not text.strip():
        raise RowDropped("an empty text")
    return {field: _readable(text, field)}


def token_row(row: dict[str, Any]) -> dict[str, Any]:
    """Columns of a tokenized row, as lists of integers."""
    made = {name: _integers(row[name], name) for name in TOKENS if name in row}
    ids = made["input_ids"]
    if not ids:
        raise RowDropped("no tokens")
    for name, values in made.items():
        if name != "seq_lengths" and len(values) != len(ids):
            raise ValueError(
                f"Got {len(values)} values in column {name!r} beside {len(ids)} in column 'input_ids', expected one for each token. "
                f"Fix: make {name!r} as long as 'input_ids'."
            )
    return made


def _integers(value: Any, column: str) -> list[int]:
    values = [] if value is None else value.tolist() if hasattr(value, "tolist") else value
    types = set(map(type, values)) if isinstance(values, list) else {str}
    if not all(issubclass(t, Integral) for t in types) or (bool in types and "mask" not in column):
        raise _wrong_type(value, column, "a list of integers")
    return values if types == {int} else list(map(int, values))


def template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """The row's `tools` and `chat_template_kwargs`, as TRL passes them to the chat template."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise _wrong_type(tools, "tools", f"a list of tools, or that list as JSON ({error})") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) or callable(t) for t in tools)):
        raise _wrong_type(tools, "tools", "a list of tools, or that list as JSON")
    kwargs: Any = {} if row.get("chat_template_kwargs") is None else row["chat_template_kwargs"]
    if not isinstance(kwargs, dict) or not all(isinstance(k, str) and k not in _NOT_OF_THE_TEMPLATE for k in kwargs):
        raise _wrong_type(kwargs, "chat_template_kwargs", "a dict of arguments of the chat template's own")
    return {"tools": _readable(tools, "tools"), **_readable(kwargs, "chat_template_kwargs")}


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """What TRL hands to the chat template, in the forms that it can read."""
    read = template_kwargs(row)
    kept = {name: row[name] for name in KEPT if name in row}
    if "tools" in kept and read["tools"] is None:
        kept["tools"] = None
    if kept.get("chat_template_kwargs", {}) is None:
        kept["chat_template_kwargs"] = {}
    return kept


def to_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of a `messages` row, or of a ShareGPT `conversations` row with its roles mapped."""
    column = "conversations" if row.get("messages") is None else "messages"
    turns = row.get(column)
    if not isinstance(turns, list | None) or not all(isinstance(turn, dict) for turn in turns or []):
        raise _wrong_type(turns, column, "a list of messages")
    messages = [_to_message(turn) for turn in turns or []]
    for turn, message in zip(turns or [], messages, strict=True):
        _check_message(message, column, turn)
    return _readable(messages, column)


def _to_message(turn: dict[str, Any]) -> dict[str, Any]:
    """A ShareGPT turn with TRL's keys and roles. Arrow gives turns of both kinds, where mixed, the keys of both."""
    kept = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    if turn.get("from") is None:
        return {key: turn[key] for key in ("role", "content") if key in turn} | kept
    role = turn["from"]
    if isinstance(role, str):
        role = ROLES.get(role.strip().lower(), role.strip().lower())
    return {"role": role, "content": turn.get("value")} | kept


def _without_nulls(prompt: Prompt) -> Prompt:
    """What to compare prompts by: Arrow gives messages of different columns different keys that they lack."""
    if isinstance(prompt, str):
        return prompt
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]


def _row(contexts: list[Prompt], completion: Any, column: str) -> ContextRow:
    completion = _prompt(completion, "completion")
    if isinstance(completion, list) and completion[0]["role"] != "assistant":
        raise ValueError(
            f"Got a turn of role {completion[0]['role']!r:.200} first in column 'completion', expected role 'assistant', whose turn "
            "the model learns to write. Fix: correct the role, or move the turn to the prompt."
        )
    return _alike(ContextRow(contexts, completion), column)


def _alike(row: ContextRow, column: str) -> ContextRow:
    """`row`. Raises ValueError if some of it are strings and some messages."""
    if other := [context for context in row.contexts if isinstance(context, str) != isinstance(row.completion, str)]:
        raise ValueError(
            f"Got a {type(other[0]).__name__} in column {column!r} beside a completion (in column 'completion') that is a "
            f"{type(row.completion).__name__}, expected all of a row's prompts, contexts and completion to be strings, or all lists of "
            "messages. Fix: convert one to the other."
        )
    return row


def _prompt(value: Any, column: str) -> Prompt:
    """`value`, a prompt or completion that says something. Raises RowDropped if it does not."""
    if not isinstance(value, str | list | None):
        raise _wrong_type(value, column, "a string or a list of messages")
    for message in value if isinstance(value, list) else []:
        _check_message(message, column, message)
    if not value or not (value.strip() if isinstance(value, str) else any(map(_says_something, value))):
        raise RowDropped("no output: the completion is empty" if column == "completion" else "an empty context")
    return _readable(value, column)


def _check_message(message: Any, column: str, given: Any) -> None:
    """Raise ValueError if `message`, made of what was `given`, is none."""
    if not _is_message(message):
        raise _wrong_type(
            given, column, "messages, each a dict with a role and text as content, alone or in parts of type 'text'"
        )
    role = message["role"]
    if role != (lower := role.strip().lower()) and lower in TEMPLATE_ROLES:
        raise ValueError(
            f"Got role {role!r} in column {column!r}, expected {lower!r}: chat templates tell roles by their exact name. Fix: set it "
            f"to {lower!r}."
        )


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content, calls = value.get("content"), value.get("tool_calls")
    parts = content if isinstance(content, list) else []
    return (
        isinstance(content, str | list | None)  # none beside tool calls
        and all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts)
        and (calls is None or isinstance(calls, list) and all(isinstance(call, dict) for call in calls))
    )


def _is_given(row: dict[str, Any], column: str) -> bool:
    """Whether an optional prompt is there: null and empty ones stand for none."""
    value = row.get(column)
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, list) and not value)


def _readable(value: Any, column: str) -> Any:
    """`value`, whose strings a tokenizer can read. Raises ValueError if one has half of a surrogate pair."""
    for text in _texts(value):
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Got {text[error.start]!r} in column {column!r} (at character {error.start} of {text[:50]!r}), expected text that "
                "UTF-8 can hold: this is half of a surrogate pair. Fix: text.encode('utf-16', 'surrogatepass').decode('utf-16', "
                "'replace') joins halves that belong together and replaces others."
            ) from error
    return value


def _texts(value: Any) -> Iterator[str]:
    """All strings in a value."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item


def _says_something(message: dict[str, Any]) -> bool:
    texts = [*message_texts(message), message.get("reasoning_content") or ""]
    return bool(message.get("tool_calls")) or any(str(text).strip() for text in texts)


def message_texts(message: dict[str, Any]) -> list[str]:
    """What a message says: its content, or the texts of its content's parts."""
    content = message.get("content") or []
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _with_constraints(prompt: Prompt, constraints: list[str], response_template: str | None) -> Prompt:
    """The base instruction followed by constraints, as Crab writes most of its rows."""
    if not constraints:
        return prompt
    if isinstance(prompt, str):
        at = prompt.rfind(response_template) if response_template else -1
        base = prompt[:at].rstrip() if at >= 0 else prompt
        return f"{base}\n\n" + "\n".join(constraints) + prompt[len(base) :]
    last = prompt[-1]
    if not isinstance(last.get("content"), str):
        raise _wrong_type(last, "prompt", "its last message to have text content, which constraints are added to")
    return [*prompt[:-1], {**last, "content": _with_constraints(last["content"], constraints, None)}]


def _constraints(row: dict[str, Any]) -> list[str]:
    return [constraint for constraint in _list_of(row, "constraints", (str,)) if constraint.strip()]


def _list_of(row: dict[str, Any], column: str, types: tuple[type, ...]) -> list:
    value = [] if row.get(column) is None else row[column]
    if isinstance(value, list) and all(isinstance(item, types) for item in value):
        return _readable(value, column)
    expected = " or ".join("a list of messages" if t is list else "a string" for t in types)
    raise _wrong_type(value, column, f"a list whose items are each {expected}")


def _context_weights(row: dict[str, Any], n: int) -> list[float] | None:
    weights: Any = row.get("context_weights")
    if weights is None:
        return None
    numbers = isinstance(weights, list) and all(issubclass(type(w), Real) and 0 < w < 1e30 for w in weights)
    scaled = [float(w) / float(sum(weights)) for w in weights] if numbers else []
    if len(scaled) != n or not all(scaled):  # one may be so small that nothing of it is left beside the others
        raise ValueError(
            f"Got context_weights {weights!r:.200} for {n} contexts, expected {n} positive numbers in column 'context_weights' (they "
            "are scaled to sum to 1). Fix: give one weight a context, and leave out contexts that should have none."
        )
    return scaled


def _wrong_type(value: Any, column: str, expected: str) -> ValueError:
    return ValueError(f"Got {value!r:.200} in column {column!r}, expected {expected}. Fix: convert the column.")
