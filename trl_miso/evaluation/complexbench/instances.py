"""Instances of ComplexBench: instructions with the questions and rules that score a response."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_miso.evaluation.complexbench.rules import Rule, parse_rule
from trl_miso.evaluation.jsonl import read_jsonl
from trl_miso.evaluation.responses import Questions, load_responses

logger = logging.getLogger(__name__)

# Suffix of the columns of instruction and question, per language.
_SUFFIXES = {"zh": "", "en": "_en"}
LANGUAGES = tuple(_SUFFIXES)
_CATEGORY = re.compile(r"(And|Chain|Selection|Selection_and_Chain)(?:_(\d+))?")


@dataclass(frozen=True)
class Question:
    """A question about a response. Without a rule a judge answers it; with a rule the rule checks the parts that a judge extracts.

    Attributes:
        dependencies: Positions, from 0, of the instance's questions that have to pass for this question to pass.
    """

    text: str
    rule: Rule | None
    dependencies: tuple[int, ...]


@dataclass(frozen=True)
class Instance:
    """An instruction with its questions.

    Attributes:
        category: How constraints are composed, and how deeply, as the benchmark writes it: "Selection_2".
    """

    main_id: int
    instruction: str
    category: str
    questions: tuple[Question, ...]

    @property
    def composition(self) -> tuple[str, int]:
        """Name and depth of the category: ("Selection", 2)."""
        name, depth = _CATEGORY.fullmatch(self.category).groups()  # type: ignore[union-attr]
        return name, int(depth or 1)


def load_instances(file: str | Path, language: str) -> list[Instance]:
    """Read the instances of the benchmark's `data_final.json`, and parse their rules.

    As in the published scores, the number of a question is its position, from 0. A `point_id` that differs is warned of.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file does not have the benchmark's format, or a rule is of an unknown kind.
    """
    try:
        rows = json.loads(Path(file).read_bytes())
    except ValueError as error:
        raise ValueError(f"Got {file}, which is not JSON: {error}. {_EXPECTED}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"Got {file} without a list of instances. {_EXPECTED}")
    instances: dict[int, Instance] = {}
    renumbered = []
    for index, row in enumerate(rows):
        instance = _instance(row, f"element {index} of {file}", _SUFFIXES[language])
        if instance.main_id in instances:
            raise ValueError(f"Got main_id {instance.main_id} twice in {file}. {_EXPECTED}")
        instances[instance.main_id] = instance
        point_ids = [question.get("point_id") for question in row["scoring_questions"]]
        if point_ids != list(range(len(point_ids))):
            renumbered.append(instance.main_id)
    if renumbered:
        logger.warning(
            "%d instances, the first with main_id %d, have questions whose point_id is not their position: `dep` is read as positions, as "
            "in the published scores.",
            len(renumbered),
            renumbered[0],
        )
    return list(instances.values())


_EXPECTED = "Expected ComplexBench's data_final.json, a list of instances. Fix: take the file from its repository, or correct it."


def _instance(row: Any, where: str, suffix: str) -> Instance:
    main_id = _field(row, "main_id", int, where)
    instruction = _field(row, f"instruction{suffix}", str, where)
    category = _field(row, "category", str, where)
    rows = _field(row, "scoring_questions", list, where)
    if not _CATEGORY.fullmatch(category) or not rows:
        raise ValueError(f"Got {where} with category {category!r} and {len(rows)} questions. {_EXPECTED}")
    questions = []
    for number, question in enumerate(rows):
        questions.append(_question(question, f"question {number} of main_id {main_id}", suffix, len(rows)))
    return Instance(main_id, instruction, category, tuple(questions))


def _question(row: Any, where: str, suffix: str, total: int) -> Question:
    rule = _field(row, "rule", str | None, where)
    text = _field(row, f"question{suffix}", str, where)
    dependencies = _field(row, "dep", list, where)
    if not all(isinstance(number, int) and 0 <= number < total for number in dependencies):
        raise ValueError(f"Got {where} with dep={dependencies}, but the instance has {total} questions. {_EXPECTED}")
    try:
        parsed = None if rule is None else parse_rule(rule)
    except ValueError as error:
        raise ValueError(f"In {where}: {error}") from error
    return Question(text, parsed, tuple(dependencies))


def _field(row: Any, name: str, kind: Any, where: str) -> Any:
    """Return `row[name]`, checked to be of that type."""
    if not isinstance(row, dict) or name not in row or not isinstance(row[name], kind):
        got = row.get(name, "nothing") if isinstance(row, dict) else row
        raise ValueError(f"Got {where} with {name}={got!r}. {_EXPECTED}")
    return row[name]


def questions_of(instances: Sequence[Instance]) -> Questions:
    """What responses are joined by."""
    prompts = [instance.instruction for instance in instances]
    return Questions(prompts, [instance.main_id for instance in instances], "main_id")


def load_answers(file: str | Path, instances: list[Instance]) -> list[str]:
    """Read one response per instance, in the order of the instances.

    If all rows have `generated`, the file is one of the benchmark's own (`llm_generations/`): rows are joined by `main_id`, and may
    answer further instances. A `generated` of null is an empty response. Otherwise rows have `response`: see `load_responses`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If an instance has no response, or several.
    """
    rows = read_jsonl(file, {})
    if not all("generated" in row for row in rows) or not rows:
        return load_responses(file, questions_of(instances))
    responses: dict[int, str] = {}
    for number, row in enumerate(rows, start=1):
        main_id, text = row.get("main_id"), row["generated"]
        if not isinstance(main_id, int) or not isinstance(text, str | None) or main_id in responses:
            raise ValueError(
                f"Got line {number} of {file} with main_id={main_id!r} and a {type(text).__name__} generated, expected each main_id "
                "once, with a text or null. Fix: correct the line."
            )
        responses[main_id] = text or ""
    missing = [instance.main_id for instance in instances if instance.main_id not in responses]
    if missing:
        raise ValueError(
            f"Got no response in {file} to main_id {missing[0]} and {len(missing) - 1} others, expected one response per instance. "
            "Fix: add the responses, or leave these instances out of the data."
        )
    return [responses[instance.main_id] for instance in instances]
