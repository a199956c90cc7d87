"""Responses to prompts, joined by row number: the n-th row answers the n-th prompt."""

import logging
from collections.abc import Sequence
from pathlib import Path

from trl_miso.evaluation.rows import read_rows

logger = logging.getLogger(__name__)


def load_responses(file: str | Path, prompts: Sequence[str]) -> list[str]:
    """The `response` of every row of a JSONL file; warns where a row has another `prompt` than the one it is taken to answer.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If there are not as many rows as prompts, or a row has no text as its response.
    """
    rows = read_rows(file, {"response": str})
    if len(rows) != len(prompts):
        raise ValueError(
            f"Got {len(rows)} responses in {file} to {len(prompts)} prompts, expected as many: they are joined by row number. Fix: "
            "give a row for every prompt of the data, in its order, also for one that is left out of the score."
        )
    differ = [
        number
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), start=1)
        if row.get("prompt", prompt) != prompt
    ]
    if differ:
        shown = ", ".join(str(number) for number in differ[:5]) + (", ..." if len(differ) > 5 else "")
        logger.warning(
            "%d of %d responses in %s were given to another prompt than the data have in their row: rows %s (from 1).",
            len(differ),
            len(rows),
            file,
            shown,
        )
    return [row["response"] for row in rows]
