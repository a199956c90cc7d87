"""Responses to prompts, joined by row number: the n-th row answers the n-th prompt."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_miso.evaluation.rows import read_rows

logger = logging.getLogger(__name__)


def load_responses(file: str | Path, prompts: Sequence[str]) -> list[str]:
    """The `response` of every row of a JSONL file; warns where a row has another `prompt` than the one it is taken to answer.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If there are not as many rows as prompts, a row has no text as its response, or more than half of those
            with a `prompt` have another.
    """
    rows = read_rows(file, {"response": str})
    if len(rows) != len(prompts):
        raise ValueError(
            f"Got {len(rows)} responses in {file} to {len(prompts)} prompts, expected as many: they are joined by row number. Fix: "
            "give a row for every prompt of the data, in its order, also for one that is left out of the score."
        )
    with_prompt, differ = _to_other_prompts(rows, prompts)
    if 2 * len(differ) > with_prompt:
        raise ValueError(
            f"Got {len(differ)} of {with_prompt} responses in {file} to another prompt than the data have in their row, expected the data's "
            "order: they are joined by row number. Fix: put the rows into the order of the data, or give the data that were answered."
        )
    if differ:
        shown = ", ".join(str(number) for number in differ[:5]) + (", ..." if len(differ) > 5 else "")
        logger.warning("%s Rows %s (from 1) of %s.", _said(differ, rows), shown, file)
    return [row["response"] for row in rows]


def note_of(file: str | Path, prompts: Sequence[str]) -> str:
    """What a table of these scores has to say of responses to other prompts: nothing, or a sentence with a space before it."""
    rows = read_rows(file, {})
    if any("generated" in row for row in rows):  # ComplexBench's own, which are not joined by their order
        return ""
    _, differ = _to_other_prompts(rows, prompts)
    return f" {_said(differ, rows)}" if differ else ""


def _to_other_prompts(rows: Sequence[dict[str, Any]], prompts: Sequence[str]) -> tuple[int, list[int]]:
    """How many rows have a prompt, and the numbers, from 1, of those that have another than the data."""
    asked = [(number, row["prompt"]) for number, row in enumerate(rows, start=1) if "prompt" in row]
    return len(asked), [number for number, prompt in asked if prompt != prompts[number - 1]]


def _said(differ: Sequence[int], rows: Sequence[object]) -> str:
    return f"{len(differ)} of {len(rows)} responses were given to another prompt than the data have in their row."
