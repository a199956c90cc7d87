"""IFEval-Flatten: every instruction of an IFEval prompt alone.

The paper's authors made their version by hand and have not released it. This one is composed: the base instruction, which is the prompt
without its constraints, and lm-eval's description of one instruction. The bases are those of "Improving Instruction-Following in
Language Models through Activation Steering" (arXiv 2410.12877), mended by `bases.json` where they kept words of a constraint, or
lost what it is about.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

from trl_miso.evaluation.ifeval import Prompt, check_known, load_checkers
from trl_miso.evaluation.rows import read_rows

NOTE = "Not the paper's IFEval-Flatten, which was never released: composed of base instructions and lm-eval's descriptions."

# Two prompts ask for a "letter" that is none: their own words, and the checker that counts it.
_SIGNS = {
    "#": "Include at least {let_frequency} hashtags, starting with '#'.",
    "!": 'Contain {let_frequency} or more exclamation marks "!" in your response.',
}


def load_bases(file: str | Path) -> dict[int, str]:
    """The base instructions by their prompts' keys, from microsoft/llm-steer-instruct's `ifeval_wo_instructions.jsonl`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a row has no `key` or no `model_output`.
    """
    return {row["key"]: row["model_output"] for row in read_rows(file, {"key": int, "model_output": str})}


def flatten_rows(prompts: Sequence[Prompt], bases: Mapping[int, str]) -> list[Prompt]:
    """A row for every instruction of every prompt, in their order: base, space, description; of IFEval's columns.

    The instruction `repeat_prompt` asks for the base. Nothing is drawn: an instruction that leaves something to chance is refused.

    Raises:
        ValueError: If lm-eval is not installed, a prompt has no base, or an instruction is unknown or incomplete.
    """
    checkers, _ = load_checkers()
    mends = json.loads(files("trl_miso.evaluation").joinpath("bases.json").read_text(encoding="utf-8"))["mends"]
    rows = []
    for prompt in prompts:
        key = prompt["key"]
        check_known(prompt, checkers)
        if key not in bases:
            raise ValueError(
                f"Got no base instruction for key {key}, expected one for every prompt. Fix: take both files in full, IFEval's "
                "input_data.jsonl and ifeval_wo_instructions.jsonl of microsoft/llm-steer-instruct."
            )
        base = _mended(bases[key].strip(), prompt["prompt"], *mends.get(str(key), ("", "")))
        for name, given in zip(prompt["instruction_id_list"], prompt["kwargs"], strict=True):
            # As lm-eval's scorer takes them: from the Hub every instruction has all options of all others, as null.
            options = {option: deepcopy(value) for option, value in given.items() if value}
            if name == "combination:repeat_prompt":
                options["prompt_to_repeat"] = base
            name, options, described = _described(key, name, options, checkers)
            rows.append(
                {"key": key, "prompt": f"{base} {described}", "instruction_id_list": [name], "kwargs": [options]}
            )
    return rows


def _mended(base: str, prompt: str, wrong: str, right: str) -> str:
    """`base` with what is wrong in it put right, unless its owner has done so, and with the prompt's line breaks that it lost."""
    if wrong in base and not (wrong in right and right in base):
        base = base.replace(wrong, right, 1)
    for gap, line in re.findall(r"(\s*\n\s*)(\S.{2,20})", prompt):
        at = base.find(line)
        if at > 0 and not base[at - 1].isspace():
            base = base[:at] + gap + base[at:]
    return base


def _described(
    key: int, name: str, options: dict[str, Any], checkers: Mapping[str, Any]
) -> tuple[str, dict[str, Any], str]:
    """The instruction, its options, and what it says."""
    if name == "keywords:letter_frequency" and options.get("letter") in _SIGNS:
        described = _SIGNS[options["letter"]].format(**options)
        counted = {
            "keyword": options["letter"],
            "frequency": options["let_frequency"],
            "relation": options["let_relation"],
        }
        return "keywords:frequency", counted, described
    state = random.getstate()
    described = checkers[name](name).build_description(**deepcopy(options))
    if random.getstate() != state:
        random.setstate(state)
        raise ValueError(
            f"Got instruction {name!r} (key {key}) with the options {options}, which leave something to chance. Expected all that it "
            "needs. Fix: take IFEval's own input_data.jsonl, or complete its kwargs."
        )
    return name, options, described
