"""IFEval-Flatten: one prompt per instruction of an IFEval prompt.

The paper's authors (arXiv 2505.11922) made their version by hand and have not released it. Here a prompt is composed of the base
instruction, which is IFEval's prompt without its constraints, and lm-eval's description of one instruction. The base instructions are
those of "Improving Instruction-Following in Language Models through Activation Steering" (arXiv 2410.12877). `bases.json` corrects
base instructions that kept words of a constraint, or lost the text that the constraint is about.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

from trl_miso.evaluation.ifeval import IFEvalPrompt, check_known, load_checkers
from trl_miso.evaluation.jsonl import read_jsonl

NOTE = "Not the paper's IFEval-Flatten, which was never released: prompts are composed of base instructions and lm-eval's descriptions."

# Two prompts ask for a "letter" that is a punctuation mark. For these the description is the original prompt's wording, and
# keywords:frequency counts the mark, since the checker of letters would draw a random letter.
_MARKS = {
    "#": "Include at least {let_frequency} hashtags, starting with '#'.",
    "!": 'Contain {let_frequency} or more exclamation marks "!" in your response.',
}


def load_bases(file: str | Path) -> dict[int, str]:
    """Read the base instructions, by prompt key, from `ifeval_wo_instructions.jsonl` of microsoft/llm-steer-instruct.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a row has no `key` or no `model_output`, or two rows have one key.
    """
    bases: dict[int, str] = {}
    for number, row in enumerate(read_jsonl(file, {"key": int, "model_output": str}), start=1):
        if row["key"] in bases:
            raise ValueError(
                f"Got line {number} of {file} with key {row['key']}, which an earlier line has. Expected one base instruction per key. "
                "Fix: remove one of the lines."
            )
        bases[row["key"]] = row["model_output"]
    return bases


def flatten_rows(prompts: Sequence[IFEvalPrompt], bases: Mapping[int, str]) -> list[IFEvalPrompt]:
    """Compose one row per instruction of every prompt, in order, with IFEval's columns.

    A row's prompt is `f"{base} {description}"`. For the instruction `repeat_prompt` the base is also the text to repeat.

    Raises:
        ImportError: If lm-eval is not installed.
        ValueError: If a prompt has no base, an instruction is unknown, or its options are incomplete, so that lm-eval would draw the rest.
    """
    checkers, _ = load_checkers()
    corrections = json.loads(files("trl_miso.evaluation").joinpath("bases.json").read_text(encoding="utf-8"))["mends"]
    rows = []
    for prompt in prompts:
        key = prompt["key"]
        check_known(prompt, checkers)
        if key not in bases:
            raise ValueError(
                f"Got no base instruction for key {key}, expected one per prompt. Fix: take both files in full, IFEval's "
                "input_data.jsonl and ifeval_wo_instructions.jsonl of microsoft/llm-steer-instruct."
            )
        wrong, right = corrections.get(str(key), ("", ""))
        base = _corrected(bases[key].strip(), wrong, right)
        base = _with_line_breaks(base, prompt["prompt"])
        for name, given in zip(prompt["instruction_id_list"], prompt["kwargs"], strict=True):
            # As lm-eval's scorer does: in the Hub's data set every instruction has the options of all others, as null.
            options = {option: deepcopy(value) for option, value in given.items() if value}
            if name == "combination:repeat_prompt":
                options["prompt_to_repeat"] = base
            name, options, description = _describe(key, name, options, checkers)
            rows.append(
                {"key": key, "prompt": f"{base} {description}", "instruction_id_list": [name], "kwargs": [options]}
            )
    return rows


def _corrected(base: str, wrong: str, right: str) -> str:
    """Replace `wrong` by `right`, unless the base instruction was corrected at its source."""
    already_right = wrong in right and right in base
    if wrong in base and not already_right:
        return base.replace(wrong, right, 1)
    return base


def _with_line_breaks(base: str, prompt: str) -> str:
    """Restore line breaks of the prompt that the base instruction lost."""
    for gap, line in re.findall(r"(\s*\n\s*)(\S.{2,20})", prompt):
        start = base.find(line)
        if start > 0 and not base[start - 1].isspace():
            base = base[:start] + gap + base[start:]
    return base


def _describe(
    key: int, name: str, options: dict[str, Any], checkers: Mapping[str, Any]
) -> tuple[str, dict[str, Any], str]:
    """Return the instruction's name, its options, and its description."""
    if name == "keywords:letter_frequency" and options.get("letter") in _MARKS:
        description = _MARKS[options["letter"]].format(**options)
        counted = {
            "keyword": options["letter"],
            "frequency": options["let_frequency"],
            "relation": options["let_relation"],
        }
        return "keywords:frequency", counted, description
    state = random.getstate()
    description = checkers[name](name).build_description(**deepcopy(options))
    if random.getstate() != state:
        random.setstate(state)
        raise ValueError(
            f"Got instruction {name!r} (key {key}) with the options {options}, which leave something to chance. Expected all options that "
            "it needs. Fix: take IFEval's own input_data.jsonl, or complete the kwargs."
        )
    return name, options, description
