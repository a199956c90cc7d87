"""Responses to prompts, joined by row number: row n answers prompt n."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_miso.evaluation.jsonl import read_jsonl

logger = logging.getLogger(__name__)


def load_responses(file: str | Path, prompts: Sequence[str]) -> list[str]:
    """Read the `response` of every row of a JSONL file; warn of rows whose `prompt` is not the one with their number.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the number of rows is not that of the prompts, a row's response is not text, or more than half of the rows
            with a `prompt` have another than the data.
    """
    rows = read_jsonl(file, {"response": str})
    if len(rows) != len(prompts):
        raise ValueError(
            f"Got {len(rows)} responses in {file} to {len(prompts)} prompts, expected one response per prompt: they are joined by row "
            "number. Fix: give one row per prompt of the data, in the order of the data, also for prompts that are left out of the score."
        )
    with_prompt, differing = _to_other_prompts(rows, prompts)
    if 2 * len(differing) > with_prompt:
        raise ValueError(
            f"Got {len(differing)} of {with_prompt} responses in {file} to another prompt than the data have in that row, expected the "
            "order of the data: responses are joined by row number. Fix: put the rows into that order, or give the data that were answered."
        )
    if differing:
        shown = ", ".join(str(number) for number in differing[:5]) + (", ..." if len(differing) > 5 else "")
        logger.warning("%s Rows %s (from 1) of %s.", _sentence(differing, rows), shown, file)
    return [row["response"] for row in rows]


def note_of(file: str | Path, prompts: Sequence[str]) -> str:
    """Return the note that a score table needs if responses answer other prompts: a space and a sentence, or nothing."""
    rows = read_jsonl(file, {})
    if any("generated" in row for row in rows):  # ComplexBench's own responses, which are joined by main_id
        return ""
    _, differing = _to_other_prompts(rows, prompts)
    return f" {_sentence(differing, rows)}" if differing else ""


def _to_other_prompts(rows: Sequence[dict[str, Any]], prompts: Sequence[str]) -> tuple[int, list[int]]:
    """Count the rows with a prompt, and number (from 1) those whose prompt is not the data's."""
    with_prompt, differing = 0, []
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=False), start=1):
        if "prompt" in row:
            with_prompt += 1
            if row["prompt"] != prompt:
                differing.append(number)
    return with_prompt, differing


def _sentence(differing: Sequence[int], rows: Sequence[object]) -> str:
    return f"{len(differing)} of {len(rows)} responses were given to another prompt than the data have in that row."
