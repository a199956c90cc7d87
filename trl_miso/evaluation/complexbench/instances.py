"""ComplexBench's instances: instructions, and the questions and rules that responses are scored by."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_miso.evaluation.complexbench.rules import Rule, parse_rule
from trl_miso.evaluation.responses import load_responses
from trl_miso.evaluation.rows import read_rows

logger = logging.getLogger(__name__)

# Of the instruction and the questions, by language.
_SUFFIXES = {"zh": "", "en": "_en"}
LANGUAGES = tuple(_SUFFIXES)
_CATEGORY = re.compile(r"(And|Chain|Selection|Selection_and_Chain)(?:_(\d+))?")


@dataclass(frozen=True)
class Question:
    """What a response is scored by: a judge's answer if there is no rule, else the rule on what a judge extracts.

    Attributes:
        dependencies: Positions, from 0, of the questions of this instance that have to pass for this one to.
    """

    text: str
    rule: Rule | None
    dependencies: tuple[int, ...]


@dataclass(frozen=True)
class Instance:
    """An instruction with its questions.

    Attributes:
        category: As the benchmark has it, "Selection_2": how constraints are composed, and how deeply.
    """

    main_id: int
    instruction: str
    category: str
    questions: tuple[Question, ...]

    @property
    def composition(self) -> tuple[str, int]:
        """The category's name and depth: ("Selection", 2)."""
        name, depth = _CATEGORY.fullmatch(self.category).groups()  # type: ignore[union-attr]
        return name, int(depth or 1)


def load_instances(file: str | Path, language: str) -> list[Instance]:
    """The instances of the benchmark's `data_final.json`, all of whose rules are known.

    As in the published scores a question's number is its position, from 0; warns where its `point_id` is another.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not the benchmark's, or has a rule of no known kind.
    """
    try:
        rows = json.loads(Path(file).read_bytes())
    except ValueError as error:
        raise ValueError(f"Got {file}, which is no JSON: {error}. {_DATA}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"Got {file} without a list of instances. {_DATA}")
    instances = [_instance(row, f"element {at} of {file}", _SUFFIXES[language]) for at, row in enumerate(rows)]
    seen: set[int] = set()
    for instance in instances:
        if instance.main_id in seen:
            raise ValueError(f"Got main_id {instance.main_id} twice in {file}. {_DATA}")
        seen.add(instance.main_id)
    others = [
        row["main_id"]
        for row in rows
        if any(each.get("point_id") != number for number, each in enumerate(row["scoring_questions"]))
    ]
    if others:
        logger.warning(
            "Questions of %d instances have a point_id that is not their position, main_id %d the first: `dep` is read as positions, "
            "as the published scores read it.",
            len(others),
            others[0],
        )
    return instances


_DATA = "Expected ComplexBench's data_final.json, a list of instances. Fix: take the file from its repository, or correct it."


def _instance(row: Any, where: str, suffix: str) -> Instance:
    main_id, instruction = _field(row, "main_id", int, where), _field(row, f"instruction{suffix}", str, where)
    category, asked = _field(row, "category", str, where), _field(row, "scoring_questions", list, where)
    if not _CATEGORY.fullmatch(category) or not asked:
        raise ValueError(f"Got {where} with category {category!r} and {len(asked)} questions. {_DATA}")
    questions = []
    for point, question in enumerate(asked):
        here = f"question {point} of main_id {main_id}"
        rule, text = _field(question, "rule", str | None, here), _field(question, f"question{suffix}", str, here)
        dependencies = _field(question, "dep", list, here)
        if not all(isinstance(at, int) and 0 <= at < len(asked) for at in dependencies):
            raise ValueError(f"Got {here} with dep={dependencies}, of which there are {len(asked)}. {_DATA}")
        try:
            parsed = None if rule is None else parse_rule(rule)
        except ValueError as error:
            raise ValueError(f"In {here}: {error}") from error
        questions.append(Question(text, parsed, tuple(dependencies)))
    return Instance(main_id, instruction, category, tuple(questions))


def _field(row: Any, name: str, kind: Any, where: str) -> Any:
    """`row[name]`, of that type."""
    if not isinstance(row, dict) or name not in row or not isinstance(row[name], kind):
        got = row.get(name, "nothing") if isinstance(row, dict) else row
        raise ValueError(f"Got {where} with {name}={got!r}. {_DATA}")
    return row[name]


def load_answers(file: str | Path, instances: list[Instance]) -> list[str]:
    """A response to each instance, in their order.

    Rows with `generated` are the benchmark's own (`llm_generations/`) and joined by their `main_id`, of which there may be more; rows
    with `response` are joined by their number. No text at all, `null` in the benchmark's own, is the empty response.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If an instance has no response, or more than one.
    """
    rows = read_rows(file, {})
    if not all("generated" in row for row in rows) or not rows:
        return load_responses(file, [instance.instruction for instance in instances])
    found: dict[int, str] = {}
    for number, row in enumerate(rows, start=1):
        main_id, text = row.get("main_id"), row["generated"]
        if not isinstance(main_id, int) or not isinstance(text, str | None) or main_id in found:
            raise ValueError(
                f"Got line {number} of {file} with main_id={main_id!r} and a {type(text).__name__} generated, expected each main_id "
                "once, with text. Fix: correct the line."
            )
        found[main_id] = text or ""
    missing = [instance.main_id for instance in instances if instance.main_id not in found]
    if missing:
        raise ValueError(
            f"Got no response in {file} to main_id {missing[0]} and {len(missing) - 1} others, expected one to each instance. Fix: add "
            "them, or leave these instances out of the data."
        )
    return [found[instance.main_id] for instance in instances]
