"""Does an answer follow each constraint? Asked of a program where a row says which, otherwise not known."""

import json
from collections.abc import Sequence
from typing import Any

from trl_miso.evaluation.ifeval import Scorer, load_scorer
from trl_miso.report.samples import ConstraintCheck
from trl_miso.sources.synthetic import check_constraints


def ifeval_check() -> ConstraintCheck:
    """Rows with IFEval's `instruction_id_list` and `kwargs` (a list, or that list as JSON), one for each constraint: lm-eval's
    strict verdicts. Others, and rows whose instructions are not as many as their constraints, are not known.

    Raises:
        ValueError: When the first such row comes and lm-eval is not installed.
    """
    scorer: list[Scorer] = []

    def check(row: dict[str, Any], answer: str) -> Sequence[bool] | None:
        names, options = row.get("instruction_id_list"), row.get("kwargs")
        options = json.loads(options) if isinstance(options, str) else options
        if not names or not options or not len(names) == len(options) == len(row["constraints"]):
            return None
        if not scorer:
            scorer.append(load_scorer())
        prompt = {
            "key": row.get("key", 0),
            "prompt": str(row.get("full_prompt") or row.get("prompt")),
            "instruction_id_list": names,
            "kwargs": options,
        }
        return scorer[0](prompt, answer).strict

    return check


def synthetic_check(row: dict[str, Any], answer: str) -> Sequence[bool]:
    """The generated rows' own check."""
    return check_constraints(row["constraints"], answer)
