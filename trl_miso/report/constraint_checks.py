"""Programs that check whether an answer follows each constraint; rows without such a program stay unchecked."""

from collections.abc import Sequence
from typing import Any

from trl_miso.evaluation.ifeval import Scorer, checkable, load_scorer
from trl_miso.report.samples import ConstraintCheck
from trl_miso.sources.synthetic import check_constraints


def ifeval_check() -> ConstraintCheck:
    """A check for rows with IFEval's columns: lm-eval's strict verdicts.

    A row needs `instruction_id_list` and `kwargs` (a list, or that list as JSON), with one item per constraint. A null instruction is a
    constraint without a checker: its verdict is None. For rows without a checker the check returns None.

    Raises:
        ImportError: By the check, at the first row with these columns, if lm-eval is not installed.
    """
    scorer: Scorer | None = None

    def check(row: dict[str, Any], answer: str) -> Sequence[bool | None] | None:
        nonlocal scorer
        prompt, places = checkable(row)
        count = len(row["constraints"])
        if not places or len(row["instruction_id_list"]) != count:
            return None
        if scorer is None:
            scorer = load_scorer()
        prompt = {"key": 0} | prompt | {"prompt": str(prompt["prompt"])}
        verdicts: list[bool | None] = [None] * count
        for place, followed in zip(places, scorer(prompt, answer).strict, strict=True):
            verdicts[place] = followed
        return verdicts

    return check


def synthetic_check(row: dict[str, Any], answer: str) -> Sequence[bool]:
    """The check of the generated rows (`trl_miso.sources.synthetic`)."""
    return check_constraints(row["constraints"], answer)
