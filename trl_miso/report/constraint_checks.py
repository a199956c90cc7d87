"""Programs that check whether an answer follows each constraint; rows without such a program stay unchecked."""

import json
from collections.abc import Sequence
from typing import Any

from trl_miso.evaluation.ifeval import Scorer, load_scorer
from trl_miso.report.samples import ConstraintCheck
from trl_miso.sources.synthetic import check_constraints


def ifeval_check() -> ConstraintCheck:
    """A check for rows with IFEval's columns: lm-eval's strict verdicts.

    A row needs `instruction_id_list` and `kwargs` (a list, or that list as JSON), with one item per constraint. For all other
    rows the check returns None.

    Raises:
        ImportError: By the check, at the first row with these columns, if lm-eval is not installed.
    """
    scorer: Scorer | None = None

    def check(row: dict[str, Any], answer: str) -> Sequence[bool] | None:
        nonlocal scorer
        names, options = row.get("instruction_id_list"), row.get("kwargs")
        options = json.loads(options) if isinstance(options, str) else options
        if not names or not options or not len(names) == len(options) == len(row["constraints"]):
            return None
        if scorer is None:
            scorer = load_scorer()
        prompt = {
            "key": row.get("key", 0),
            "prompt": str(row.get("full_prompt") or row.get("prompt")),
            "instruction_id_list": names,
            "kwargs": options,
        }
        return scorer(prompt, answer).strict

    return check


def synthetic_check(row: dict[str, Any], answer: str) -> Sequence[bool]:
    """The check of the generated rows (`trl_miso.sources.synthetic`)."""
    return check_constraints(row["constraints"], answer)
