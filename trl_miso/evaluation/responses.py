"""Responses to prompts, joined by prompt or by id: a file in any order gives each prompt the same response.

Rows with neither are joined by row number: row n answers prompt n.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from trl_miso.evaluation.jsonl import read_jsonl

logger = logging.getLogger(__name__)

_SAME_PROMPT = 0.9  # IFEval's first version of key 2785, which published responses were given to, is alike by 0.98
_ORDER_OF_DATA = "Fix: give one row per prompt of the data, also for prompts that are left out of the score"


@dataclass(frozen=True)
class Questions:
    """The prompts of a benchmark, in the order of the data, with the ids by which the data name them."""

    prompts: Sequence[str]
    keys: Sequence[int]
    key_name: str = "key"

    def ids(self, columns: Sequence[str]) -> list[tuple[str, ...]]:
        """What these columns (`prompt`, `key_name`) hold for each prompt."""
        return list(zip(*({"prompt": self.prompts, self.key_name: map(str, self.keys)}[name] for name in columns)))


def load_responses(file: str | Path, questions: Questions) -> list[str]:
    """Read the `response` to every prompt, in the order of the prompts, from a JSONL file whose rows have any order.

    Rows are joined by their `prompt`; rows without by their id (`questions.key_name`); rows with neither by number. Of several equal
    prompts the id tells which is meant, or else the order of their rows.

    One row may have a prompt that was edited since: it is joined to the only prompt left over if their texts are nearly the same,
    which is warned of.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a prompt has no response or several, a row's prompt or id is not of the data, or a response is not text.
    """
    rows = read_jsonl(file, {"response": str})
    order, edited = _join(file, rows, questions)
    if edited is not None:
        logger.warning("%s Row %d (from 1) of %s.", _sentence(rows), edited, file)
    return [rows[at]["response"] for at in order]
