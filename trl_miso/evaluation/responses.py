"""Responses to prompts, joined by prompt or by id: whatever the order of the rows, each prompt has the same response.

Rows with neither are joined by row number: row n answers prompt n.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from trl_miso.evaluation.endpoint import Conversation
from trl_miso.evaluation.jsonl import read_jsonl

logger = logging.getLogger(__name__)

_EDITED = 0.9  # how alike two texts are of which one is the other's edition: 0.98 for the one that IFEval has edited, key 2785
_FIX = "Fix: give one row per prompt of the data, also for prompts that are left out of the score"

Row = dict[str, Any]
Identity = tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """The prompts of a benchmark, in the order of the data, and the ids that its data give them in a column `key_name`."""

    prompts: Sequence[str | Conversation]
    keys: Sequence[int | str]
    key_name: str = "key"

    def identities(self, columns: Sequence[str]) -> list[Identity]:
        """What the columns hold for each prompt, of `prompt` and `key_name`."""
        values = {"prompt": [str(prompt) for prompt in self.prompts], self.key_name: [str(key) for key in self.keys]}
        return list(zip(*(values[name] for name in columns), strict=True))


def load_responses(file: str | Path, questions: Questions) -> list[str]:
    """Read the `response` to every prompt, in the order of the prompts, from a JSONL file with rows in any order.

    Rows are joined by their `prompt`; rows without by their id; rows with neither by number. Of equal prompts the id tells which is
    meant, or else the order of their rows. One row may have a prompt that the data have edited: if a single prompt is left over and
    its text is nearly that, they are joined, and a warning says so.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a prompt has no response or several, a row's prompt or id is not of the data, or a response is not text.
    """
    rows = read_jsonl(file, {"response": str})
    order, edited = _join(file, rows, questions)
    if edited is not None:
        logger.warning("%s Row %d (from 1) of %s.", _SENTENCE, edited + 1, file)
    return [rows[at]["response"] for at in order]


_SENTENCE = "1 response was given to another edition of its prompt than the data have."


def note_of(file: str | Path, questions: Questions) -> str:
    """Return the note that a score table needs if a response answers another edition of a prompt: a space and a sentence, or nothing."""
    rows = read_jsonl(file, {})
    if any("generated" in row for row in rows):  # ComplexBench's own responses, which are joined by main_id
        return ""
    return "" if _join(file, rows, questions)[1] is None else f" {_SENTENCE}"


def _join(file: str | Path, rows: Sequence[Row], questions: Questions) -> tuple[list[int], int | None]:
    """Return the index of each prompt's row, and the index of the row whose prompt the data have edited."""
    columns = _identity_columns(file, rows, questions)
    if not columns:
        if len(rows) != len(questions.prompts):
            raise ValueError(
                f"Got {len(rows)} responses in {file} to {len(questions.prompts)} prompts, expected one response per prompt: rows without "
                f"prompt or {questions.key_name} are joined by number. {_FIX}, in the order of the data."
            )
        return list(range(len(rows))), None
    expected = questions.identities(columns)
    found = [tuple(str(row[name]) for name in columns) for row in rows]
    if "prompt" not in columns and len(set(expected)) < len(expected) and found != expected:
        raise ValueError(
            f"Got responses in {file} whose {questions.key_name} are not those of the data row by row, expected the order of the data, "
            f"where several prompts have the same {questions.key_name}. Fix: give each row its prompt, or put the rows into that order."
        )
    return _match(file, found, expected, columns)


def _identity_columns(file: str | Path, rows: Sequence[Row], questions: Questions) -> tuple[str, ...]:
    """Return the columns to join by: those that tell all prompts apart, if the rows have them."""
    having = []
    for name in ("prompt", questions.key_name):
        without = [number for number, row in enumerate(rows, start=1) if row.get(name) is None]
        if not without:
            having.append(name)
        elif len(without) < len(rows) and "prompt" not in having:
            raise ValueError(
                f"Got line {without[0]} of {file} without {name}, which other lines have. Expected it in every line, or in none. Fix: "
                f"complete the line, or leave {name} out of every line, so that responses are joined by another column or by number."
            )
    for columns in (tuple(having[:1]), tuple(having)):
        if len(set(questions.identities(columns))) == len(questions.prompts):
            return columns
    return tuple(having[:1])


def _match(
    file: str | Path, found: Sequence[Identity], expected: Sequence[Identity], columns: Sequence[str]
) -> tuple[list[int], int | None]:
    """As `_join`, by what the columns hold in each row and for each prompt. Of equals the first goes to the first."""
    waiting: dict[Identity, deque[int]] = defaultdict(deque)
    for number, identity in enumerate(expected):
        waiting[identity].append(number)
    order: dict[int, int] = {}
    unknown = []
    for at, identity in enumerate(found):
        if identity not in waiting:
            unknown.append(at)
        elif waiting[identity]:
            order[waiting[identity].popleft()] = at
        else:
            raise ValueError(
                f"Got line {at + 1} of {file} with {_shown(columns, identity)}, which an earlier line has. Expected one response per "
                f"prompt. {_FIX}, and none twice."
            )
    missing = [number for number in range(len(expected)) if number not in order]
    edited = None
    if len(unknown) == len(missing) == 1 and columns[0] == "prompt":
        texts = found[unknown[0]][0], expected[missing[0]][0]
        if SequenceMatcher(None, *texts, autojunk=False).ratio() >= _EDITED:
            edited = order[missing.pop()] = unknown.pop()
    if unknown:
        raise ValueError(
            f"Got line {unknown[0] + 1} of {file} with {_shown(columns, found[unknown[0]])}, which the data do not have"
            f"{_others(unknown)}. Expected responses to the prompts of the data. Fix: give the data that were answered, or correct "
            f"the line; without {' and '.join(columns)} in every line, responses are joined by another column or by number."
        )
    if missing:
        raise ValueError(
            f"Got {len(found)} responses in {file} to {len(expected)} prompts, and none to {_shown(columns, expected[missing[0]])} (row "
            f"{missing[0] + 1} of the data){_others(missing)}. Expected one response per prompt. {_FIX}."
        )
    return [order[number] for number in range(len(expected))], edited


def _shown(columns: Sequence[str], identity: Identity) -> str:
    texts = (text if len(text) <= 80 else f"{text[:80]}..." for text in identity)
    return " and ".join(f"{name} {text!r}" for name, text in zip(columns, texts, strict=True))


def _others(items: Sequence[int]) -> str:
    return f", and {len(items) - 1} others" if len(items) > 1 else ""
