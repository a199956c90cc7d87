"""Whether the answer of a decomposed row follows its constraints, by IFEval's checkers."""

import json
from typing import Any

from trl_miso.evaluation.ifeval import Scorer


def with_verdicts(row: dict[str, Any], score: Scorer) -> dict[str, Any]:
    """Fill the row's `answer_follows`: for each constraint with a checker whether the answer follows it (strict), else null.

    Args:
        row: A row of `rows.decompose_row`.
        score: The scorer of `trl_miso.evaluation.ifeval.load_scorer`.
    """
    checked = []
    for number, (name, kwargs) in enumerate(zip(row["instruction_id_list"], json.loads(row["kwargs"]), strict=True)):
        if name is not None:
            checked.append((number, name, kwargs))
    verdicts: list[bool | None] = [None] * len(row["constraints"])
    if checked:
        prompt = {
            "key": 0,
            "prompt": row["full_prompt"][-1]["content"],
            "instruction_id_list": [name for _, name, _ in checked],
            "kwargs": [kwargs for _, _, kwargs in checked],
        }
        followed = score(prompt, row["completion"][-1]["content"]).strict
        for (number, _, _), verdict in zip(checked, followed, strict=True):
            verdicts[number] = verdict
    return row | {"answer_follows": verdicts}
