"""Functions that `ifeval_flatten.yaml` names."""

from functools import cache
from typing import Any

from datasets import Dataset

from trl_miso.evaluation.ifeval import load_prompts, load_scorer

_scorer = cache(load_scorer)


def load_rows(rows: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Load the file of `trl-miso eval ifeval_flatten --write_rows`, which lm-eval's metadata name as `rows`.

    Raises:
        ImportError, ValueError: As `load_scorer`, so that a missing package is found before a model generates.
    """
    if rows is None:
        raise ValueError(
            "Got no rows for ifeval_flatten, expected the file that `trl-miso eval ifeval_flatten --write_rows FILE` writes. Fix: add "
            "`--metadata rows=FILE`."
        )
    load_scorer()
    return {"test": Dataset.from_list(load_prompts(rows))}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Return the strict and the loose verdict on a row's only instruction."""
    verdict = _scorer()(doc, results[0])
    return {"inst_level_strict_acc": verdict.strict[0], "inst_level_loose_acc": verdict.loose[0]}
