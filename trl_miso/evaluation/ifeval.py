"""IFEval (arXiv 2311.07911): its prompts, and lm-eval's verdicts on responses.

All verdicts come from lm-eval's copy of the published checkers. Two of the 541 prompts, keys 1122 and 1129, ask for a "letter" that is
a punctuation mark. The checkers replace it by a random letter. Here the key seeds that draw, so that a score is reproducible, but the
verdicts on these two prompts mean nothing.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import load_dataset

from trl_miso.evaluation.jsonl import read_jsonl
from trl_miso.evaluation.nltk_data import require_nltk_data
from trl_miso.evaluation.responses import Questions

DATASET = "google/IFEval"
RANDOM_KEYS = (1122, 1129)
COLUMNS = {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list}

IFEvalPrompt = dict[str, Any]
Scorer = Callable[[IFEvalPrompt, str], "Verdict"]


@dataclass(frozen=True)
class Verdict:
    """Which of a prompt's instructions a response follows: unchanged (strict), or in the best of eight variants of it (loose)."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


@dataclass(frozen=True)
class Counts:
    """Numbers of prompts (with all their instructions) and of instructions that are followed, and the totals of both."""

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
        """Return [S]P, [S]I, [L]P, [L]I of Table 1 (arXiv 2505.11922), in percent."""
        return (
            100 * self.strict_prompt / self.prompts,
            100 * self.strict_instruction / self.instructions,
            100 * self.loose_prompt / self.prompts,
            100 * self.loose_instruction / self.instructions,
        )


def load_prompts(file: str | Path | None) -> list[IFEvalPrompt]:
    """Read IFEval's prompts, in order: from its `input_data.jsonl`, or from the Hub if `file` is None.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the Hub cannot be reached, there are no rows, or a row does not have IFEval's columns.
    """
    if file is not None:
        prompts = read_jsonl(file, COLUMNS)
    else:
        try:
            prompts = list(load_dataset(DATASET, split="train"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Got no data set {DATASET} from the Hub: {error}. Expected the Hub or its cache. Fix: try again with a connection, or give "
                "--data with IFEval's input_data.jsonl."
            ) from error
    check_prompts(prompts, file or DATASET, "IFEval's own input_data.jsonl")
    return prompts


def check_prompts(prompts: Sequence[IFEvalPrompt], source: str | Path, original: str) -> None:
    """Raise ValueError if there are no prompts, or one of them has not one dict of `kwargs` per instruction.

    Args:
        source: Where the prompts come from, for the message.
        original: The benchmark's own file, for the message.
    """
    if not prompts:
        raise ValueError(f"Got no prompts in {source}, expected the benchmark's prompts. Fix: take {original} in full.")
    for number, prompt in enumerate(prompts, start=1):
        names, options = prompt["instruction_id_list"], prompt["kwargs"]
        if not names or len(names) != len(options):
            raise ValueError(
                f"Got row {number} of the data (key {prompt['key']}) with {len(names)} instructions and {len(options)} kwargs, "
                f"expected equal numbers of both, at least one. Fix: take {original}."
            )


def questions_of(prompts: Sequence[IFEvalPrompt]) -> Questions:
    """What responses are joined by."""
    return Questions([prompt["prompt"] for prompt in prompts], [prompt["key"] for prompt in prompts])


def without(prompts: Sequence[IFEvalPrompt], keys: Iterable[int | str]) -> list[int]:
    """Return the numbers, from 0, of the prompts whose keys are not among `keys`.

    Raises:
        ValueError: If a key is not one of the prompts', or no prompt is left.
    """
    left_out = set(keys)
    unknown = sorted(left_out - {prompt["key"] for prompt in prompts})
    kept = [number for number, prompt in enumerate(prompts) if prompt["key"] not in left_out]
    if unknown:
        raise ValueError(
            f"Got keys {unknown} to leave out, which the data do not have. Expected keys of the data. Fix: correct --exclude_keys."
        )
    if not kept:
        raise ValueError("Got all keys to leave out, expected some prompts to score. Fix: correct --exclude_keys.")
    return kept


def checkable(row: Mapping[str, Any]) -> tuple[IFEvalPrompt, list[int]]:
    """A row in the benchmark's format, and the places, from 0, of the instructions that have a checker.

    Null instructions, constraints without a checker, are left out. `kwargs` may be JSON of the list. The prompt is the row's
    `full_prompt` where it has one: `prompt` is then the request without its constraints. A row with unequal numbers of instructions and
    kwargs keeps them, and has no places.
    """
    prompt = dict(row)
    if prompt.get("full_prompt"):
        prompt["prompt"] = prompt["full_prompt"]
    names, options = prompt.get("instruction_id_list"), prompt.get("kwargs")
    if isinstance(options, str):
        options = prompt["kwargs"] = json.loads(options)
    if not names or not options or len(names) != len(options):
        return prompt, []
    places = [number for number, name in enumerate(names) if name is not None]
    prompt["instruction_id_list"] = [names[number] for number in places]
    prompt["kwargs"] = [options[number] for number in places]
    return prompt, places


def load_checkers() -> tuple[dict[str, Any], Callable[[IFEvalPrompt, list[str]], dict[str, Any]]]:
    """Return lm-eval's checkers by instruction name, and its `process_results`; seed its language detection.

    Raises:
        ImportError: If lm-eval, or a package that IFEval's checkers need, is not installed.
        ValueError: If NLTK's punkt_tab, by which two kinds of instruction count sentences, is missing or unreadable.
    """
    try:
        langdetect, _, _ = map(import_module, ("langdetect", "lm_eval", "nltk"))
    except ImportError as error:
        raise ImportError(
            f"Got no package {error.name!r}, expected lm-eval with the packages that IFEval needs. Fix: pip install 'trl-miso[eval]'."
        ) from error
    # Before lm-eval's checkers are imported: their import would try to download punkt_tab.
    require_nltk_data({"punkt_tab": "by which sentences are counted"})
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    from lm_eval.tasks.ifeval.utils import process_results

    langdetect.DetectorFactory.seed = 0
    return INSTRUCTION_DICT, process_results


def check_known(prompt: IFEvalPrompt, checkers: dict[str, Any], package: str = "lm-eval") -> None:
    """Raise ValueError if the package has no checker for one of the prompt's instructions."""
    unknown = sorted(set(prompt["instruction_id_list"]) - checkers.keys())
    if unknown:
        raise ValueError(
            f"Got instructions {unknown} (key {prompt['key']}), which the installed {package} does not know. Expected instructions of "
            f"the benchmark. Fix: take the benchmark's own data, or update {package}."
        )


@contextmanager
def seeded(prompt: IFEvalPrompt) -> Iterator[None]:
    """Seed Python's random state by the prompt's key, and restore it."""
    state = random.getstate()
    random.seed(prompt["key"])
    try:
        yield
    finally:
        random.setstate(state)


def load_scorer() -> Scorer:
    """Return a scorer: lm-eval's `process_results`, with Python's random state seeded by the prompt's key and restored.

    Raises:
        ImportError, ValueError: As `load_checkers`.
    """
    checkers, process_results = load_checkers()

    def score(prompt: IFEvalPrompt, response: str) -> Verdict:
        check_known(prompt, checkers)
        with seeded(prompt):
            accuracies = process_results(prompt, [response])
        return Verdict(tuple(accuracies["inst_level_strict_acc"]), tuple(accuracies["inst_level_loose_acc"]))

    return score
