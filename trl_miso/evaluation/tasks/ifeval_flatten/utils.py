"""The functions of `ifeval_flatten.yaml`."""

from functools import cache
from typing import Any

from datasets import Dataset

from trl_miso.evaluation.ifeval import load_prompts, load_scorer

_scorer = cache(load_scorer)


def load_rows(rows: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The file that `trl-miso eval ifeval_flatten --write_rows` wrote, given as `rows` in lm-eval's metadata; also asks, before any
    model is, whether it can be scored."""
    if rows is None:
        raise ValueError(
            "Got no rows for ifeval_flatten, expected the file that `trl-miso eval ifeval_flatten --write_rows FILE` wrote. Fix: add "
            "`--metadata rows=FILE`."
        )
    load_scorer()
    return {"test": Dataset.from_list(load_prompts(rows))}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """The verdict on the one instruction of a row, strict and loose."""
    verdict = _scorer()(doc, results[0])
    return {"inst_level_strict_acc": verdict.strict[0], "inst_level_loose_acc": verdict.loose[0]}
