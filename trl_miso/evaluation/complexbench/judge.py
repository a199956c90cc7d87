"""Questions to a judge, and its verdicts: a line each, written as they come."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from trl_miso.evaluation.complexbench.instances import Instance, Question
from trl_miso.evaluation.complexbench.prompts import judge_prompt, read_answer
from trl_miso.evaluation.writing import exclusive_writer

# Of a question: how often it is asked in all, if there is no answer or one that is neither yes nor no.
ATTEMPTS = 3
# Of questions: after so many failures without a verdict in between, no other is asked.
GIVE_UP = 20

# What a line begins with, by which the end of a killed run's file is told from a file of something else.
_BEGINNING = b'{"judge": '

Key = tuple[int, int]
AskAll = Callable[[Iterable[Sequence[dict[str, str]]]], Iterator[tuple[int, str | ValueError]]]


@dataclass(frozen=True)
class Task:
    """A question about a response, as a judge is asked it.

    Attributes:
        key: main_id and number of the question.
    """

    key: Key
    question: Question
    response: str
    prompt: str

    def fingerprint(self, judge: str) -> str:
        """Of all that a verdict is of: the judge, what it is asked, the rule, the response."""
        rule = self.question.rule and self.question.rule.text
        return sha256(json.dumps([judge, self.prompt, rule, self.response]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of a file by their questions' keys, and whose they are (None of an empty file)."""

    judge: str | None
    passed: dict[Key, bool]


def judge_tasks(instances: Sequence[Instance], responses: Sequence[str], language: str) -> list[Task]:
    """Every question about every response, in the order of the data."""
    return [
        Task((instance.main_id, number), question, response, judge_prompt(instance, question, response, language))
        for instance, response in zip(instances, responses, strict=True)
        for number, question in enumerate(instance.questions)
    ]


def read_verdicts(file: Path, tasks: Sequence[Task], judge: str | None) -> Verdicts:
    """The verdicts that `file` has on `tasks`, each once; what a killed run wrote of another is left out.

    Args:
        judge: Whose verdicts they have to be; None for those of whoever gave the first.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it has anything else: another judge's verdicts, or on other questions or responses.
    """
    asked = {task.key: task for task in tasks}
    passed: dict[Key, bool] = {}
    *lines, rest = file.read_bytes().split(b"\n") if file.exists() else [b""]
    if rest[: len(_BEGINNING)] != _BEGINNING[: len(rest)]:
        raise ValueError(_refusal(file, len(lines) + 1, "which is no verdict"))
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            of, key, said = row["judge"], (int(row["main_id"]), int(row["point_id"])), row["fingerprint"]
            verdict = {True: True, False: False}[row["verdict"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(_refusal(file, number, "which is no verdict")) from error
        judge = judge or of
        if of != judge:
            raise ValueError(_refusal(file, number, f"a verdict of {of!r}, not of {judge!r}"))
        if key not in asked or said != asked[key].fingerprint(judge):
            other = f"a verdict on another question {key[1]} of main_id {key[0]}, or on another response to it"
            raise ValueError(_refusal(file, number, other))
        passed.setdefault(key, verdict)
    return Verdicts(judge, passed)


def _refusal(file: Path, number: int, got: str) -> str:
    return (
        f"Got line {number} of {file}, {got}. Expected verdicts of one judge on these responses to these data. Fix: give --verdicts "
        "another file, or the judge, data, responses and language that this one was written with."
    )


@dataclass(frozen=True)
class Estimate:
    """What asking a judge will take: requests, and tokens of what is asked and, at most, of the answers."""

    requests: int
    input_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, tasks: Iterable[Task], max_tokens: int) -> "Estimate":
        """Of one request each, not counting what is asked again.

        No tokenizer is asked, since a judge's is seldom at hand: a character of three bytes, as Chinese has, is taken for a token, and
        so are four other characters.
        """
        prompts = [task.prompt for task in tasks]
        characters, size = sum(map(len, prompts)), sum(len(prompt.encode("utf-8", "replace")) for prompt in prompts)
        wide = (size - characters) // 2
        return cls(len(prompts), wide + (characters - wide) // 4, len(prompts) * max_tokens)

    def cost(self, input_price: float, output_price: float) -> tuple[float, float]:
        """Without any answer and with the longest, at prices per million tokens."""
        least = self.input_tokens * input_price / 1e6
        return least, least + self.output_tokens * output_price / 1e6


def ask_judge(tasks: Sequence[Task], judge: str, ask_all: AskAll, file: Path) -> dict[Key, str]:
    """Append to `file` the verdicts that it lacks; returns why the tasks that stay without have none.

    A verdict is written whole and flushed when it comes, so that a run that was killed goes on where it was. What gets no answer, or one
    that is neither yes nor no, is asked again when all others have been, `ATTEMPTS` times in all.

    Args:
        ask_all: As `Endpoint.ask_all`, which may ask no more after a failure.

    Raises:
        OSError, ValueError: As `read_verdicts`, and as `exclusive_writer`.
    """
    in_a_row = 0
    with exclusive_writer(file) as written, Progress(console=Console(stderr=True)) as progress:
        had = read_verdicts(file, tasks, judge).passed
        _cut_unfinished(file)
        waiting = [task for task in tasks if task.key not in had]
        failures: dict[Key, list[str]] = {task.key: [] for task in waiting}
        shown = progress.add_task("Judging", total=len(tasks), completed=len(had))
        while waiting and in_a_row < GIVE_UP:
            left = dict(enumerate(waiting))
            again = []
            for number, answer in ask_all(_messages(task) for task in waiting if in_a_row < GIVE_UP):
                task = left.pop(number)
                verdict, failure = _read(task, answer)
                if verdict is None:
                    in_a_row += 1
                    failures[task.key].append(failure)
                    again += [task] * (len(failures[task.key]) < ATTEMPTS)
                    continue
                in_a_row = 0
                del failures[task.key]
                written.write(_line(task, judge, verdict, str(answer)))
                written.flush()
                progress.advance(shown)
            waiting = [*left.values(), *again]
    stopped = f"not asked, after {in_a_row} failures in a row"
    return {key: said[-1] if said else stopped for key, said in failures.items()}


def _messages(task: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.prompt}]


def _read(task: Task, answer: str | ValueError) -> tuple[bool | None, str]:
    """The verdict, or None and why there is none."""
    if isinstance(answer, ValueError):
        # The endpoint knows its options by the names that they have for a model's responses.
        return None, re.sub(r"--(base_url|concurrency)\b", r"--judge_\1", str(answer))
    wanted = "<answer> with yes or no" if task.question.rule is None else "<extract> with its end"
    shown = answer if len(answer) <= 200 else "... " + answer[-200:]
    return read_answer(task.question, task.response, answer), f"Got answer {shown!r}, expected an {wanted}."


def _line(task: Task, judge: str, verdict: bool, answer: str) -> bytes:
    row: dict[str, Any] = {
        "judge": judge,
        "main_id": task.key[0],
        "point_id": task.key[1],
        "fingerprint": task.fingerprint(judge),
        "question": task.question.text,
        "rule": task.question.rule and task.question.rule.text,
        "verdict": verdict,
        "answer": answer,
    }
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _cut_unfinished(file: Path) -> None:
    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
