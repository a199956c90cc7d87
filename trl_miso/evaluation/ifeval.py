"""IFEval (arXiv 2311.07911): its prompts, and lm-eval's verdicts on responses.

Whether a response follows an instruction is asked of lm-eval's copy of the published checkers, nothing is decided here. Two of the
541 prompts, keys 1122 and 1129, ask for a letter that is none, for which those checkers draw one: by the key here, so that
a score is the same every time, but it says nothing about these two.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from datasets import load_dataset

from trl_miso.evaluation.rows import read_rows

DATASET = "google/IFEval"
RANDOM_KEYS = (1122, 1129)
_COLUMNS = {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list}

Prompt = dict[str, Any]
Scorer = Callable[[Prompt, str], "Verdict"]


@dataclass(frozen=True)
class Verdict:
    """Which instructions of a prompt a response follows: as it is (strict), or in the best of eight readings of it (loose)."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


@dataclass(frozen=True)
class Counts:
    """How many prompts (all their instructions) and instructions are followed, of how many."""

    strict_prompt: int
    strict_instruction: int
    loose_prompt: int
    loose_instruction: int
    prompts: int
    instructions: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Counts":
        return cls(
            strict_prompt=sum(all(verdict.strict) for verdict in verdicts),
            strict_instruction=sum(sum(verdict.strict) for verdict in verdicts),
            loose_prompt=sum(all(verdict.loose) for verdict in verdicts),
            loose_instruction=sum(sum(verdict.loose) for verdict in verdicts),
            prompts=len(verdicts),
            instructions=sum(len(verdict.strict) for verdict in verdicts),
        )

    def percentages(self) -> tuple[float, float, float, float]:
        """[S]P, [S]I, [L]P, [L]I of the paper's Table 1."""
        return (
            100 * self.strict_prompt / self.prompts,
            100 * self.strict_instruction / self.instructions,
            100 * self.loose_prompt / self.prompts,
            100 * self.loose_instruction / self.instructions,
        )


def load_prompts(file: str | Path | None) -> list[Prompt]:
    """IFEval's prompts in their order, from its `input_data.jsonl`; without a file, from the Hub.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the Hub cannot be reached, there are no rows, or one is not IFEval's.
    """
    if file is not None:
        prompts = read_rows(file, _COLUMNS)
    else:
        try:
            prompts = list(load_dataset(DATASET, split="train"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Got no data set {DATASET} from the Hub: {error}. Expected it there. Fix: try again with a connection, or give "
                "--data with IFEval's input_data.jsonl."
            ) from error
    if not prompts:
        raise ValueError(
            f"Got no prompts in {file or DATASET}, expected IFEval's. Fix: take its input_data.jsonl in full."
        )
    for number, prompt in enumerate(prompts, start=1):
        names, options = prompt["instruction_id_list"], prompt["kwargs"]
        if not names or len(names) != len(options):
            raise ValueError(
                f"Got row {number} of the data (key {prompt['key']}) with {len(names)} instructions and {len(options)} kwargs, "
                "expected as many of both, and at least one. Fix: take IFEval's own input_data.jsonl."
            )
    return prompts


def without(prompts: Sequence[Prompt], keys: Iterable[int]) -> list[int]:
    """The numbers, from 0, of the rows whose keys are not among `keys`."""
    left_out = set(keys)
    unknown = sorted(left_out - {prompt["key"] for prompt in prompts})
    kept = [number for number, prompt in enumerate(prompts) if prompt["key"] not in left_out]
    if unknown or not kept:
        got = f"keys {unknown} to leave out that the data do not have" if unknown else "all keys to leave out"
        raise ValueError(f"Got {got}, expected some of its keys. Fix: correct --exclude_keys.")
    return kept


def load_checkers() -> tuple[dict[str, Any], Callable[[Prompt, list[str]], dict[str, Any]]]:
    """lm-eval's checkers by the names of their instructions, and its `process_results`; languages are found alike in every run.

    Raises:
        ValueError: If lm-eval, or the tokenizer that two kinds of instruction need, is not installed.
    """
    try:
        langdetect, _, nltk = map(import_module, ("langdetect", "lm_eval", "nltk"))
    except ImportError as error:
        raise ValueError(
            f"Got no package {error.name!r}, expected lm-eval with the packages that IFEval needs. Fix: pip install 'trl-miso[eval]'."
        ) from error
    try:
        # Asked before lm-eval is: importing its checkers would try to download it.
        nltk.data.find("tokenizers/punkt_tab/english/")
    except (LookupError, OSError, BadZipFile) as error:
        found = "no" if isinstance(error, LookupError) else f"unreadable ({error})"
        raise ValueError(
            f"Got {found} NLTK data 'punkt_tab' in {nltk.data.path}, expected it there: sentences cannot be counted without. Fix: run "
            "`python -m nltk.downloader punkt_tab`; for a machine without network, on one that has it with `-d FOLDER`, and set the "
            "environment variable NLTK_DATA to a copy of that folder."
        ) from error
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    from lm_eval.tasks.ifeval.utils import process_results

    langdetect.DetectorFactory.seed = 0
    return INSTRUCTION_DICT, process_results


def check_known(prompt: Prompt, checkers: dict[str, Any]) -> None:
    """Refuse an instruction that lm-eval has no checker of."""
    unknown = sorted(set(prompt["instruction_id_list"]) - checkers.keys())
    if unknown:
        raise ValueError(
            f"Got instructions {unknown} (key {prompt['key']}), which lm-eval {version('lm_eval')} does not know. Expected IFEval's "
            "own. Fix: take its input_data.jsonl."
        )


def load_scorer() -> Scorer:
    """lm-eval's `process_results`, made the same in every run.

    Raises:
        ValueError: As `load_checkers`.
    """
    checkers, process_results = load_checkers()

    def score(prompt: Prompt, response: str) -> Verdict:
        check_known(prompt, checkers)
        state = random.getstate()
        random.seed(prompt["key"])
        try:
            said = process_results(prompt, [response])
        finally:
            random.setstate(state)
        return Verdict(tuple(said["inst_level_strict_acc"]), tuple(said["inst_level_loose_acc"]))

    return score
