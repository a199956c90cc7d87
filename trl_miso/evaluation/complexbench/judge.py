"""Ask a judge, and keep its verdicts in a file: one line per verdict, written as it comes."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from trl_miso.evaluation.asking import AskAll, ask_until_read
from trl_miso.evaluation.complexbench.instances import Instance, Question
from trl_miso.evaluation.complexbench.prompts import judge_prompt, read_answer
from trl_miso.evaluation.kept_answers import KeptAnswers, appending

_FILE = KeptAnswers(
    "judge",
    "a verdict",
    "Expected verdicts of one judge on these responses to these data. Fix: give --verdicts another file, or the judge, data, responses "
    "and language of the run that wrote this file.",
)

Key = tuple[int, int]


@dataclass(frozen=True)
class Task:
    """A question about a response, with the prompt for the judge.

    Attributes:
        key: The instance's main_id and the number of the question.
    """

    key: Key
    question: Question
    response: str
    prompt: str

    def fingerprint(self, judge: str) -> str:
        """Digest of all that a verdict depends on: the judge, its prompt, the rule, the response."""
        return sha256(json.dumps([judge, self.prompt, self.rule_text, self.response]).encode()).hexdigest()[:16]

    @property
    def rule_text(self) -> str | None:
        return None if self.question.rule is None else self.question.rule.text


@dataclass(frozen=True)
class Verdicts:
    """Verdicts of a file by the questions' keys, and the judge that gave them (None for an empty file)."""

    judge: str | None
    passed: dict[Key, bool]


def judge_tasks(instances: Sequence[Instance], responses: Sequence[str], language: str) -> list[Task]:
    """Return one task per question of every instance, in the order of the data."""
    tasks = []
    for instance, response in zip(instances, responses, strict=True):
        for number, question in enumerate(instance.questions):
            prompt = judge_prompt(instance, question, response, language)
            tasks.append(Task((instance.main_id, number), question, response, prompt))
    return tasks


def read_verdicts(file: Path, tasks: Sequence[Task], judge: str | None) -> Verdicts:
    """Read the verdicts on `tasks`, the first per question. The unfinished last line of a killed run is skipped.

    Args:
        judge: The judge that has to have given them; None for the judge of the file's first line.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file holds anything else: verdicts of another judge, or on other questions or responses.
    """
    tasks_by_key = {task.key: task for task in tasks}
    passed: dict[Key, bool] = {}
    for number, line_judge, (key, fingerprint, verdict) in _FILE.read(file, judge, _columns):
        judge = line_judge
        if key not in tasks_by_key or fingerprint != tasks_by_key[key].fingerprint(judge):
            other = f"a verdict on another question {key[1]} of main_id {key[0]}, or on another response to it"
            raise _FILE.refusal(file, number, other)
        passed.setdefault(key, verdict)
    return Verdicts(judge, passed)


def _columns(row: dict[str, Any]) -> tuple[Key, str, bool]:
    return (int(row["main_id"]), int(row["point_id"])), row["fingerprint"], {True: True, False: False}[row["verdict"]]


def ask_judge(tasks: Sequence[Task], judge: str, ask_all: AskAll, file: Path) -> dict[Key, str]:
    """Append the missing verdicts to `file`; return the reason per task that stays without a verdict.

    Every verdict is flushed when it comes, so that a killed run can be resumed. A question without a readable answer is asked again (see
    `ask_until_read`).

    Args:
        ask_all: As `Endpoint.ask_all`, which may stop asking after a failure.

    Raises:
        OSError, ValueError: As `read_verdicts`, and as `exclusive_lock`.
    """
    read = partial(read_verdicts, file, tasks, judge)
    with appending(file, read) as (kept, append), Progress(console=Console(stderr=True)) as progress:
        waiting = [task for task in tasks if task.key not in kept.passed]
        bar = progress.add_task("Judging", total=len(tasks), completed=len(kept.passed))

        def keep(task: Task, verdict: bool, answer: str) -> None:
            append(_row(task, judge, verdict, answer))

        reasons = ask_until_read(waiting, lambda task: task.prompt, ask_all, _read, keep, progress, bar)
    return {waiting[number].key: reason for number, reason in reasons.items()}


def _read(task: Task, answer: str | ValueError) -> tuple[bool | None, str]:
    """Return the verdict; or None, with the reason."""
    if isinstance(answer, ValueError):
        # The endpoint's messages name the options for responses; the judge's options have a prefix.
        return None, re.sub(r"--(base_url|concurrency)\b", r"--judge_\1", str(answer))
    expected = "<answer> with yes or no" if task.question.rule is None else "<extract> with its end"
    shown = answer if len(answer) <= 200 else "... " + answer[-200:]
    return read_answer(task.question, task.response, answer), f"Got answer {shown!r}, expected an {expected}."


def _row(task: Task, judge: str, verdict: bool, answer: str) -> dict[str, Any]:
    return {
        "judge": judge,
        "main_id": task.key[0],
        "point_id": task.key[1],
        "fingerprint": task.fingerprint(judge),
        "question": task.question.text,
        "rule": task.rule_text,
        "verdict": verdict,
        "answer": answer,
    }
