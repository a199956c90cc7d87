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

from typing import Any, NamedTuple

Prompt = str | list[dict[str, Any]]

MODES = ("auto", "para", "succ", "single", "augment")
_AUTO = {"contexts": "para", "constraints": "para", "prompt": "succ", "messages": "succ"}
_PARALLEL = ("contexts", "constraints")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
KEPT = ("tools", "chat_template_kwargs")  # columns that TRL hands to the chat template


class RowDropped(Exception):
    """A row that carries nothing to learn from; its message is the reason it is counted under."""


class Row(NamedTuple):
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


def full_row(row: dict[str, Any], kind: str, response_template: str | None = None) -> Row:
    """The row with its full context alone: what standard inference would see."""
    if kind == "messages":
        messages = to_messages(row)
        if not messages or messages[-1]["role"] != "assistant":
            raise RowDropped("no output: the conversation does not end in an assistant turn")
        return _row([_prompt(messages[:-1], "messages")], messages[-1:])
    if kind == "contexts" and not row.get("prompt"):
        contexts = _list_of(row, "contexts", (str, list))
        if not contexts:
            raise RowDropped("an empty context: the contexts column is empty")
        prompt = _prompt(contexts[0], "contexts")
    elif kind == "constraints" and not row.get("full_prompt"):
        prompt = _with_constraints(_prompt(row["prompt"], "prompt"), _constraints(row), response_template)
    else:
        column = "full_prompt" if kind == "constraints" else "prompt"
        prompt = _prompt(row[column], column)
    return _row([prompt], row["completion"])


def parallel_row(
    row: dict[str, Any], kind: str, include_full: bool, include_bare: bool, response_template: str | None = None
) -> Row:
    """The row with its parallel contexts (paper, section 5.1): full, one per constraint, bare; each listed once.

    A row without constraints, or with a prompt but no contexts, keeps its full context only.
    """
    full = full_row(row, kind, response_template)
    if kind == "contexts":
        contexts = [_prompt(context, "contexts") for context in _list_of(row, "contexts", (str, list))]
        if not contexts:
            return full
        weights = _context_weights(row, len(contexts))
        if full.contexts[0] in contexts:
            at = contexts.index(full.contexts[0])
            contexts.insert(0, contexts.pop(at))
            if weights:
                weights.insert(0, weights.pop(at))
        return _row(contexts, full.completion, weights)
    constraints = _constraints(row)
    if not constraints:
        return full
    bare = _prompt(row["prompt"], "prompt")
    contexts = [*full.contexts, *(_with_constraints(bare, [c], response_template) for c in constraints), bare]
    contexts = contexts[0 if include_full else 1 : len(contexts) if include_bare else -1]
    return _row([c for i, c in enumerate(contexts) if c not in contexts[:i]], full.completion)


def as_trl_row(row: dict[str, Any], prompt: Prompt, completion: Prompt) -> dict[str, Any]:
    """A prompt-completion row for TRL's own preparation."""
    return {"prompt": prompt, "completion": completion} | _kept(row)


def messages_row(row: dict[str, Any]) -> dict[str, Any]:
    """A conversation for TRL's own preparation."""
    messages = to_messages(row)
    if not messages:
        raise RowDropped("an empty conversation")
    return {"messages": messages} | _kept(row)


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in KEPT if name in row}
    if kept.get("chat_template_kwargs", {}) is None:
        kept["chat_template_kwargs"] = {}  # TRL unpacks it
    return kept


def to_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of a `messages` row, or of a ShareGPT `conversations` row with its roles mapped."""
    column = "conversations" if row.get("messages") is None else "messages"
    turns = row.get(column)
    if not isinstance(turns, list | None) or not all(isinstance(turn, dict) for turn in turns or []):
        raise _wrong_type(turns, column, "a list of messages")
    messages = [_to_message(turn) for turn in turns or []]
    if not all(map(_is_message, messages)):
        raise _wrong_type(turns, column, "a list of messages, each with a role (or from) and text as content (or value)")
    return messages


def _to_message(turn: dict[str, Any]) -> dict[str, Any]:
    """A ShareGPT turn with TRL's keys and roles. Arrow gives turns of both kinds, where mixed, the keys of both."""
    if turn.get("from") is None:
        return turn
    kept = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    return {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")} | kept


def _row(contexts: list[Prompt], completion: Any, weights: list[float] | None = None) -> Row:
    completion = _prompt(completion, "completion")
    if any(isinstance(context, str) != isinstance(completion, str) for context in contexts):
        raise ValueError(
            f"Got a completion of type {type(completion).__name__} beside a prompt or contexts of another, expected all of a row's "
            "prompts, contexts and completion to be strings, or all lists of messages. Fix: convert one to the other."
        )
    return Row(contexts, completion, weights)


def _prompt(value: Any, column: str) -> Prompt:
    """`value`, a prompt or completion that says something. Raises RowDropped if it does not."""
    if not isinstance(value, str | list | None) or (isinstance(value, list) and not all(map(_is_message, value))):
        raise _wrong_type(value, column, "a string or a list of messages, each with a role and text as content")
    if not value or not (value.strip() if isinstance(value, str) else any(map(_says_something, value))):
        raise RowDropped("no output: the completion is empty" if column == "completion" else "an empty context")
    return value


def _is_message(value: Any) -> bool:
    content = str | list | None  # a list of parts; none beside tool calls
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), content)


def _says_something(message: dict[str, Any]) -> bool:
    values = (message.get(key) for key in ("content", "reasoning_content", "tool_calls"))
    return any(value.strip() if isinstance(value, str) else value for value in values)


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
    value = row[column] if row[column] is not None else []
    if isinstance(value, list) and all(isinstance(item, types) for item in value):
        return value
    expected = " or ".join("a list of messages" if t is list else "a string" for t in types)
    raise _wrong_type(value, column, f"a list whose items are each {expected}")


def _context_weights(row: dict[str, Any], n: int) -> list[float] | None:
    weights = row.get("context_weights")
    if weights is None:
        return None
    numbers = isinstance(weights, list) and all(isinstance(w, int | float) and 0 < w < float("inf") for w in weights)
    if not numbers or len(weights) != n:
        raise ValueError(
            f"Got context_weights {weights!r:.200} for {n} contexts, expected {n} positive numbers (they are scaled to sum to "
            "1). Fix: give one weight a context, and leave out contexts that should have none."
        )
    return [w / sum(weights) for w in weights]


def _wrong_type(value: Any, column: str, expected: str) -> ValueError:
    return ValueError(f"Got {value!r:.200} in column {column!r}, expected {expected}. Fix: convert the column.")
