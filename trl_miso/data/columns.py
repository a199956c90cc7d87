"""Columns that a dataset has and that its format does not read: told once, with the name that may have been meant."""

import logging
from collections.abc import Sequence
from difflib import get_close_matches

from accelerate.logging import get_logger

from trl_miso.data.schema import TEMPLATE_COLUMNS, TOKEN_COLUMNS, is_conversation, row_format

logger = get_logger(__name__)

_MESSAGES = ("messages", "conversations")
_COMPLETIONS = ("completion", "completions")
# The columns that each format reads besides the common ones; `text` also reads the text field.
_READ: dict[str, tuple[str, ...]] = {
    "contexts": ("contexts", "context_weights", "prompt", *_COMPLETIONS),
    "constraints": ("prompt", "constraints", "full_prompt", *_COMPLETIONS),
    "prompt": ("prompt", *_COMPLETIONS),
    "messages": _MESSAGES,
    "text": (),
    "tokenized": (*TOKEN_COLUMNS, "attention_mask"),
}
_COMMON = (*TEMPLATE_COLUMNS, "train_turns")  # of rows with prompts
# Other forms of the same rows, which data sets often have beside each other.
_ALTERNATIVES = {"prompt", "completion", "text", *_MESSAGES}
_NAMES = {*_COMMON, *TOKEN_COLUMNS}.union(*_READ.values()) - {"seq_lengths"}
_SYNONYMS = {
    "prompt": ("instruction", "instructions", "question", "query", "input", "problem"),
    "completion": ("response", "answer", "output", "target", "chosen", "solution"),
    "contexts": ("passages", "documents"),
    "constraints": ("requirements", "restrictions"),
    "context_weights": ("weights",),
    "messages": ("dialog", "dialogue", "chat", "turns"),
    "tools": ("tool", "functions"),
}
_MEANT = {synonym: name for name, synonyms in _SYNONYMS.items() for synonym in synonyms}


def unread_columns(columns: Sequence[str], kind: str, text_field: str) -> list[str]:
    """The columns that rows of format `kind` do not read, without the trainer's own (`miso_...`)."""
    read = {*_READ[kind], text_field} if kind == "text" else set(_READ[kind])
    if kind not in ("text", "tokenized"):
        read.update(_COMMON)
    if is_conversation(kind, columns):
        read = read - {"prompt", *_COMPLETIONS} | set(_MESSAGES)
    return [name for name in columns if name not in read and not name.startswith("miso_")]


def read_beside(columns: Sequence[str], text_field: str) -> set[str]:
    """The names that are not among these columns and would be read if they were."""
    names = set()
    for name in _NAMES.difference(columns):
        extended = [*columns, name]
        try:
            if name not in unread_columns(extended, row_format(extended, text_field), text_field):
                names.add(name)
        except ValueError:  # no format, with this column or without
            continue
    return names


def meant_column(name: str, columns: Sequence[str]) -> str | None:
    """The name that a column's name may be a variant of, if the dataset has no such column; or None."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    close = get_close_matches(plain, sorted(_NAMES), n=1, cutoff=0.9)
    meant = _MEANT.get(plain) or next(iter(close), None)
    return None if meant in columns else meant


def report_unread(columns: Sequence[str], kind: str, text_field: str, name: str) -> None:
    """Log the columns that are not read: as a warning if one may be meant to be."""
    unread, notes = unread_columns(columns, kind, text_field), []
    for column in unread:
        if meant := meant_column(column, columns):
            notes.append(f"{column!r} may be meant as {meant!r}: rename it then")
        elif column in _NAMES - _ALTERNATIVES:
            notes.append(f"{column!r} has no effect on rows in the {kind!r} format")
    if unread:
        level = logging.WARNING if notes else logging.INFO
        explained = f" ({'; '.join(notes)})" if notes else ""
        logger.log(level, f"{name} dataset: columns {unread} are not read{explained}.")
