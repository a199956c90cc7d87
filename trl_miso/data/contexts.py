"""Rows to contexts: the prompts that one instruction becomes (paper, section 5.1).

Constraints are added to the last message of a prompt, a user's. In a prompt of plain text they stand before the last
`response_template` in it, or at its end. Constraints that stand in a prompt already are not added again: the prompt without
them is the bare one (`constraints.py`).
"""

from typing import Any, NamedTuple

from trl_miso.data.constraints import add_constraints, split_text
from trl_miso.data.options import DEFAULTS, DataOptions
from trl_miso.data.schema import (
    Prompt,
    RowDropped,
    check_prompt,
    constraints_of,
    context_weights_of,
    has_content,
    is_conversation,
    is_given,
    list_column,
    to_messages,
    without_nulls,
    wrong_type,
)

MODES = ("auto", "para", "succ", "single", "augment")
_AUTO = {"contexts": "para", "constraints": "para", "prompt": "succ", "messages": "succ"}
_PARALLEL_FORMATS = ("contexts", "constraints")


class ContextRow(NamedTuple):
    """A row as contexts (the full context first, if it is among them), a completion, and weights if the row fixes them.

    `notes` say what the user should know about a row that is kept. `names` say what each context is: `"full"`,
    `"constraint 2"`, `"bare"`, `"context 3"` (of column `contexts`).
    """

    contexts: list[Prompt]
    completion: Prompt
    weights: list[float] | None = None
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] = ("full",)

    @property
    def text(self) -> str:
        """The text of the first context and the completion, from which draws are made before tokenization."""
        texts = []
        for value in (self.contexts[0], self.completion):
            if isinstance(value, str):
                texts.append(value)
            else:
                texts += [str(message.get("content")) for message in value]
        return "\0".join(texts)


def resolve_mode(mode: str, kind: str) -> str:
    """The mode in which rows of format `kind` are trained. Raises ValueError if the format does not allow `mode`."""
    if kind in ("text", "tokenized"):
        if mode in ("auto", "single"):
            return "single"
        raise ValueError(
            f"Got context_mode={mode!r} for rows of {'plain text' if kind == 'text' else 'tokens'}, which do not separate input from "
            "output, expected rows with a prompt and a completion. Fix: give the prompt and the completion as columns, or "
            "set context_mode='single'."
        )
    if mode == "auto":
        return _AUTO[kind]
    if mode in ("para", "augment") and kind not in _PARALLEL_FORMATS:
        raise ValueError(
            f"Got context_mode={mode!r} for rows in the {kind!r} format, expected a constraints or a contexts column to make "
            "contexts from. Fix: add one (trl_miso.sources has adapters), or set context_mode='succ' or 'single'."
        )
    return mode


def full_row(row: dict[str, Any], kind: str, options: DataOptions = DEFAULTS) -> ContextRow:
    """The row with its full context alone: what standard inference sees."""
    prompt, completion, column = _request(row, kind)
    if kind == "contexts" and not is_given(row, "prompt"):
        column = "contexts"
        contexts = list_column(row, column, (str, list))
        if not contexts:
            raise RowDropped("an empty context: the contexts column is empty")
        prompt = check_prompt(contexts[0], column)
    elif kind == "constraints" and is_given(row, "full_prompt"):
        column = "full_prompt"
        prompt = check_prompt(row[column], column)
    elif kind == "constraints":
        prompt = split_row(row, options).full
    else:
        prompt = check_prompt(prompt, column)
    return _with_completion(prompt, completion, column)


def parallel_row(
    row: dict[str, Any], kind: str, options: DataOptions = DEFAULTS, full: ContextRow | None = None
) -> ContextRow:
    """The row with its parallel contexts (paper, section 5.1): full, one per constraint, bare; equal ones once.

    A row without constraints, or whose prompt holds some that cannot be taken out, or with a prompt but no contexts, keeps
    its full context only.

    Args:
        kind: `"constraints"` or `"contexts"`, see `row_format`.
        options: `include_full`, `include_bare` and `response_template` are read.
        full: The row's `full_row`, if the caller has it.
    """
    full = full or full_row(row, kind, options)
    if kind == "contexts":
        return _given_contexts(row, full)
    constraints = constraints_of(row)
    if not constraints:
        return full
    split = split_row(row, options)
    if split.obstacle:
        return full
    bare = split.bare
    contexts = [with_constraints(bare, [constraint], options.response_template) for constraint in constraints]
    names = [f"constraint {i}" for i in range(1, len(constraints) + 1)]
    if options.include_full:
        contexts, names = [*full.contexts, *contexts], ["full", *names]
    if options.include_bare:
        contexts, names = [*contexts, bare], [*names, "bare"]
    contexts, names = _without_repeats(contexts, names)
    return _check_same_kind(ContextRow(contexts, full.completion, names=tuple(names)), "prompt")


class SplitRow(NamedTuple):
    """The prompt of a constraints row with all of its constraints, and without any; see `constraints.split_text`."""

    full: Prompt
    bare: Prompt
    holds_some: bool = False
    obstacle: str = ""


def split_row(row: dict[str, Any], options: DataOptions = DEFAULTS) -> SplitRow:
    """Separate the prompt of a constraints row from the constraints that stand in it. `full_prompt` is not read.

    The bare prompt means nothing beside an obstacle. A prompt that holds no constraint is the bare one.
    """
    value, _, column = _request(row, "constraints")
    prompt, constraints = check_prompt(value, column), constraints_of(row)
    if not constraints:
        return SplitRow(prompt, prompt)
    if isinstance(prompt, list) and prompt[-1]["role"] != "user":
        raise ValueError(
            f"Got constraints beside a prompt in column {column!r} whose last turn has role {prompt[-1]['role']!r:.200}, expected "
            "role 'user': constraints are added to the last turn. Fix: end the prompt with the user's turn that they belong to, or "
            "empty the row's constraints."
        )
    text, end = _instruction(prompt, options.response_template)
    bare, missing, obstacle = split_text(text, constraints)
    full = with_constraints(prompt, missing, options.response_template)
    return SplitRow(full, _with_instruction(prompt, bare + end), len(missing) < len(constraints), obstacle)


def with_constraints(prompt: Prompt, constraints: list[str], response_template: str | None) -> Prompt:
    """The prompt with constraints after its instruction."""
    text, end = _instruction(prompt, response_template)
    return _with_instruction(prompt, add_constraints(text, constraints) + end)


def _instruction(prompt: Prompt, response_template: str | None) -> tuple[str, str]:
    """The text that constraints are added to, and what follows it: the response template of plain text."""
    if isinstance(prompt, list):
        if not isinstance(prompt[-1].get("content"), str):
            raise wrong_type(
                prompt[-1], "prompt", "its last message to have text content, which constraints are added to"
            )
        return prompt[-1]["content"], ""
    at = prompt.rfind(response_template) if response_template else -1
    text = prompt[:at].rstrip() if at >= 0 else prompt
    return text, prompt[len(text) :]


def _with_instruction(prompt: Prompt, text: str) -> Prompt:
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


def _request(row: dict[str, Any], kind: str) -> tuple[Any, Any, str]:
    """The prompt and the completion of a row, unchecked, and the column of the prompt: their columns, or its messages."""
    if not is_conversation(kind, row):
        return row.get("prompt"), row.get("completion"), "prompt"
    messages = to_messages(row)
    while messages and not (messages[-1]["role"] == "assistant" and has_content(messages[-1])):
        messages.pop()  # turns after the last answer
    if not messages:
        raise RowDropped("no output: the conversation has no answer")
    return messages[:-1], messages[-1:], "messages"


def _given_contexts(row: dict[str, Any], full: ContextRow) -> ContextRow:
    """The contexts of the `contexts` column with their weights, the full context moved to the front."""
    contexts = [check_prompt(context, "contexts") for context in list_column(row, "contexts", (str, list))]
    if not contexts:
        return full
    weights = context_weights_of(row, len(contexts))
    names = [f"context {i}" for i in range(1, len(contexts) + 1)]
    comparable = list(map(without_nulls, contexts))
    full_context = without_nulls(full.contexts[0])
    if full_context in comparable:
        index = comparable.index(full_context)
        contexts.insert(0, contexts.pop(index))
        names = ["full", *names[:index], *names[index + 1 :]]
        if weights:
            weights.insert(0, weights.pop(index))
    return _check_same_kind(ContextRow(contexts, full.completion, weights, names=tuple(names)), "contexts")


def _without_repeats(contexts: list[Prompt], names: list[str]) -> tuple[list[Prompt], list[str]]:
    kept: list[Prompt] = []
    kept_names: list[str] = []
    comparable: list[Prompt] = []
    for context, name in zip(contexts, names, strict=True):
        key = without_nulls(context)
        if key not in comparable:
            kept.append(context)
            kept_names.append(name)
            comparable.append(key)
    return kept, kept_names


def _with_completion(context: Prompt, completion: Any, column: str) -> ContextRow:
    """A row of one context from `column` and a completion that begins with an assistant turn."""
    completion = check_prompt(completion, "completion")
    if isinstance(completion, list) and completion[0]["role"] != "assistant":
        raise ValueError(
            f"Got a turn of role {completion[0]['role']!r:.200} first in column 'completion', expected role 'assistant', whose turn "
            "the model learns to write. Fix: correct the role, or move the turn to the prompt."
        )
    return _check_same_kind(ContextRow([context], completion), column)


def _check_same_kind(row: ContextRow, column: str) -> ContextRow:
    """Return `row`. Raises ValueError if some of its values are strings and others messages."""
    for context in row.contexts:
        if isinstance(context, str) != isinstance(row.completion, str):
            raise ValueError(
                f"Got a {type(context).__name__} in column {column!r} beside a completion (in column 'completion') that is a "
                f"{type(row.completion).__name__}, expected all of a row's prompts, contexts and completion to be strings, or all lists of "
                "messages. Fix: convert one to the other."
            )
    return row
