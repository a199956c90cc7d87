"""Whether the answer of a decomposed row follows its constraints, by IFEval's checkers."""

from typing import Any

from trl_miso.evaluation.ifeval import Scorer, checkable


def with_verdicts(row: dict[str, Any], score: Scorer) -> dict[str, Any]:
    """Fill the row's `answer_follows`: for each constraint with a checker whether the answer follows it (strict), else null.

    Args:
        row: A row of `rows.decompose_row`.
        score: The scorer of `trl_miso.evaluation.ifeval.load_scorer`.
    """
    prompt, places = checkable(row)
    verdicts: list[bool | None] = [None] * len(row["constraints"])
    if places:
        prompt |= {"key": 0, "prompt": row["full_prompt"][-1]["content"]}
        followed = score(prompt, row["completion"][-1]["content"]).strict
        for place, verdict in zip(places, followed, strict=True):
            verdicts[place] = verdict
    return row | {"answer_follows": verdicts}
