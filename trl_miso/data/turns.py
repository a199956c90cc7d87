"""Rows to answers: every turn of a conversation, or every completion of a prompt, that is trained."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from trl_miso.data.contexts import ContextRow
from trl_miso.data.options import DataOptions
from trl_miso.data.schema import TEMPLATE_ROLES, Prompt, RowDropped, has_content, is_conversation, is_given, wrong_type

TRAIN_TURNS = ("auto", "all", "last")
OPENING = "an assistant turn before the first request is read and not trained"
_INSTRUCTING = ("system", "developer")


def trains_all_turns(row: dict[str, Any], kind: str, options: DataOptions) -> bool:
    """Whether the earlier answers of a row are trained too.

    With `train_turns="auto"` the row's own column `train_turns` decides, if it has one. Without it, all answers of
    conversations are trained, and the completion alone of every other row, as in TRL.
    """
    if options.train_turns != "auto":
        return options.train_turns == "all"
    own = row.get("train_turns")
    if own not in (None, *TRAIN_TURNS):
        raise wrong_type(own, "train_turns", f"one of {', '.join(TRAIN_TURNS)}, or null")
    return is_conversation(kind, row) if own in (None, "auto") else own == "all"


def earlier_answers(row: dict[str, Any], kind: str, options: DataOptions, full: ContextRow) -> list[ContextRow]:
    """The assistant turns of the full context that are trained, each with the turns before it as its one context.

    A turn without content is no answer, and neither is one before the first request: see `opens_with_answer`.
    """
    prompt = full.contexts[0]
    if isinstance(prompt, str) or not trains_all_turns(row, kind, options):
        return []
    answers = []
    for i, message in enumerate(prompt):
        if message["role"] == "assistant" and has_content(message) and _has_request(prompt[:i]):
            answers.append(ContextRow([prompt[:i]], [message]))
    return answers


def opens_with_answer(prompt: Prompt) -> bool:
    """Whether an assistant turn stands before the first request. Some templates cannot render what precedes it by itself."""
    roles = [] if isinstance(prompt, str) else [message["role"] for message in prompt if has_content(message)]
    turns = [role for role in roles if role not in _INSTRUCTING]
    return turns[:1] == ["assistant"]


def turns_not_trained(prompt: Prompt) -> tuple[str, ...]:
    """Notes on turns of a prompt that are read and not trained although a user may take them for answers."""
    notes = [OPENING] if opens_with_answer(prompt) else []
    roles = [] if isinstance(prompt, str) else [message["role"] for message in prompt if has_content(message)]
    for role in sorted(set(roles).difference(TEMPLATE_ROLES)):  # "function_call" of ShareGPT rows, for one
        notes.append(f"a turn of role {role!r:.50} is read and not trained, as only turns of role 'assistant' are")
    return tuple(notes)


def _has_request(turns: list[dict[str, Any]]) -> bool:
    return any(has_content(turn) and turn["role"] not in (*_INSTRUCTING, "assistant") for turn in turns)


def describe_train_turns(setting: str, in_messages: bool, own_settings: Mapping[str, int]) -> str:
    """Which answers of chat rows are trained, in a line.

    Args:
        setting: `train_turns` of the config.
        in_messages: See `schema.is_conversation`.
        own_settings: How many rows have which value in their column `train_turns`.
    """
    by_row = ""
    if setting == "auto" and own_settings:
        counts = ", ".join(f"{own} {count:,}" for own, count in own_settings.items())
        by_row = f"; column train_turns overrides it (rows: {counts})"
    trains_all = setting == "all" or (setting == "auto" and in_messages)
    sentences = {
        (True, True): "every assistant turn is trained",
        (False, True): "the last assistant turn is trained, earlier ones are not",
        (True, False): "every completion is trained, and every assistant turn within the prompts",
        (False, False): "every completion is trained, assistant turns within the prompts are not",
    }
    return f"{setting}: {sentences[trains_all, in_messages]}{by_row}"


def count_own_settings(values: Iterable[Any]) -> Counter[str]:
    """How often rows have which value in their column `train_turns`, `auto` and null apart."""
    return Counter(own for own in values if own not in (None, "auto"))


def each_completion(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """A row for each of its `completions`, several answers to one prompt; the row itself if it has none.

    Raises:
        ValueError: If the row has a `completion` as well.
    """
    completions = row.get("completions")
    if completions is None or is_conversation(kind, row):  # the answers of conversations are turns
        return [row]
    if is_given(row, "completion") and is_given(row, "completions"):
        raise ValueError(
            "Got a row with a value in column 'completion' and in column 'completions', expected one of the two: each of the completions is "
            "trained. Fix: remove the column that is not to be trained, or add the completion to the completions."
        )
    if row.get("completion") is not None:
        return [row]
    if not isinstance(completions, list):
        raise wrong_type(completions, "completions", "a list of completions, each a string or a list of messages")
    if not completions:
        raise RowDropped("no output: the completions column is empty")
    others = {name: value for name, value in row.items() if name != "completions"}
    return [others | {"completion": completion} for completion in completions]
