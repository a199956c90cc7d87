"""Rows to answers: every turn of a conversation, or every completion of a prompt, that is trained."""

from typing import Any

from trl_miso.data.contexts import ContextRow
from trl_miso.data.options import DataOptions
from trl_miso.data.schema import RowDropped, has_content, wrong_type

TRAIN_TURNS = ("auto", "all", "last")


def trains_all_turns(row: dict[str, Any], kind: str, options: DataOptions) -> bool:
    """Whether the earlier answers of a row are trained too.

    With `train_turns="auto"` the row's own column `train_turns` decides, if it has one. Without it, all answers of
    conversations (format `messages`) are trained, and the completion alone in every other format, as in TRL.
    """
    if options.train_turns != "auto":
        return options.train_turns == "all"
    own = row.get("train_turns")
    if own not in (None, *TRAIN_TURNS):
        raise wrong_type(own, "train_turns", f"one of {', '.join(TRAIN_TURNS)}, or null")
    return kind == "messages" if own in (None, "auto") else own == "all"


def earlier_answers(row: dict[str, Any], kind: str, options: DataOptions, full: ContextRow) -> list[ContextRow]:
    """The assistant turns of the full context that are trained, each with the turns before it as its one context.

    A turn without content, or without content before it, is no answer.
    """
    prompt = full.contexts[0]
    if isinstance(prompt, str) or not trains_all_turns(row, kind, options):
        return []
    answers = []
    for i, message in enumerate(prompt):
        if message["role"] == "assistant" and has_content(message) and any(map(has_content, prompt[:i])):
            answers.append(ContextRow([prompt[:i]], [message]))
    return answers


def each_completion(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each of its `completions`, several answers to one prompt; the row itself if it has none."""
    completions = row.get("completions")
    if completions is None or row.get("completion") is not None:
        return [row]
    if not isinstance(completions, list):
        raise wrong_type(completions, "completions", "a list of completions, each a string or a list of messages")
    if not completions:
        raise RowDropped("no output: the completions column is empty")
    others = {name: value for name, value in row.items() if name != "completions"}
    return [others | {"completion": completion} for completion in completions]
