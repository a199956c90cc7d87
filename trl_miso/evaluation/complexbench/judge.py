"""Ask a judge, and keep its verdicts in a file: one line per verdict, written as it comes."""

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
from trl_miso.evaluation.file_lock import exclusive_lock

# How often a question is asked in total, if there is no answer or the answer cannot be read as a verdict.
ATTEMPTS = 3
# After this many failures in a row no other question is asked.
GIVE_UP = 20

# Every line starts with these bytes: they tell the unfinished line of a killed run from a file of another kind.
_LINE_START = b'{"judge": '

Key = tuple[int, int]
AskAll = Callable[[Iterable[Sequence[dict[str, str]]]], Iterator[tuple[int, str | ValueError]]]


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
    *lines, unfinished = file.read_bytes().split(b"\n") if file.exists() else [b""]
    if unfinished[: len(_LINE_START)] != _LINE_START[: len(unfinished)]:
        raise ValueError(_refusal(file, len(lines) + 1, "which is not a verdict"))
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            line_judge, fingerprint = row["judge"], row["fingerprint"]
            key = int(row["main_id"]), int(row["point_id"])
            verdict = {True: True, False: False}[row["verdict"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(_refusal(file, number, "which is not a verdict")) from error
        judge = judge or line_judge
        if line_judge != judge:
            raise ValueError(_refusal(file, number, f"a verdict of {line_judge!r}, not of {judge!r}"))
        if key not in tasks_by_key or fingerprint != tasks_by_key[key].fingerprint(judge):
            other = f"a verdict on another question {key[1]} of main_id {key[0]}, or on another response to it"
            raise ValueError(_refusal(file, number, other))
        passed.setdefault(key, verdict)
    return Verdicts(judge, passed)


def _refusal(file: Path, number: int, got: str) -> str:
    return (
        f"Got line {number} of {file}, {got}. Expected verdicts of one judge on these responses to these data. Fix: give --verdicts "
        "another file, or the judge, data, responses and language of the run that wrote this file."
    )


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of asking a judge: requests, input tokens, and the most output tokens."""

    requests: int
    input_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, tasks: Iterable[Task], max_tokens: int) -> "Estimate":
        """Estimate one request per task. Questions that have to be asked again are not counted.

        Tokens are estimated from characters, since the judge's tokenizer is seldom at hand: one token per character of three UTF-8
        bytes (such as Chinese), and one per four other characters.
        """
        prompts = [task.prompt for task in tasks]
        characters = sum(len(prompt) for prompt in prompts)
        size = sum(len(prompt.encode("utf-8", "replace")) for prompt in prompts)
        wide = (size - characters) // 2  # a character of three bytes exceeds its count by two
        return cls(len(prompts), wide + (characters - wide) // 4, len(prompts) * max_tokens)

    def cost(self, input_price: float, output_price: float) -> tuple[float, float]:
        """Return the cost of the questions alone, and with answers of the greatest length. Prices are per million tokens."""
        least = self.input_tokens * input_price / 1e6
        return least, least + self.output_tokens * output_price / 1e6


def ask_judge(tasks: Sequence[Task], judge: str, ask_all: AskAll, file: Path) -> dict[Key, str]:
    """Append the missing verdicts to `file`; return the reason per task that stays without a verdict.

    Every verdict is flushed when it comes, so that a killed run can be resumed. A question without a readable answer is asked again
    after all others, `ATTEMPTS` times in total.

    Args:
        ask_all: As `Endpoint.ask_all`, which may stop asking after a failure.

    Raises:
        OSError, ValueError: As `read_verdicts`, and as `exclusive_lock`.
    """
    failures_in_a_row = 0
    with exclusive_lock(file) as opened, Progress(console=Console(stderr=True)) as progress:
        passed = read_verdicts(file, tasks, judge).passed
        _cut_unfinished_line(file)
        waiting = [task for task in tasks if task.key not in passed]
        failures: dict[Key, list[str]] = {task.key: [] for task in waiting}
        bar = progress.add_task("Judging", total=len(tasks), completed=len(passed))
        while waiting and failures_in_a_row < GIVE_UP:
            unanswered = dict(enumerate(waiting))
            retry = []
            # The condition is checked as conversations are sent: it stops the round after too many failures.
            conversations = (_messages(task) for task in waiting if failures_in_a_row < GIVE_UP)
            for number, answer in ask_all(conversations):
                task = unanswered.pop(number)
                verdict, failure = _read(task, answer)
                if verdict is None:
                    failures_in_a_row += 1
                    failures[task.key].append(failure)
                    if len(failures[task.key]) < ATTEMPTS:
                        retry.append(task)
                    continue
                failures_in_a_row = 0
                del failures[task.key]
                opened.write(_line(task, judge, verdict, str(answer)))
                opened.flush()
                progress.advance(bar)
            waiting = [*unanswered.values(), *retry]
    not_asked = f"not asked, after {failures_in_a_row} failures in a row"
    return {key: messages[-1] if messages else not_asked for key, messages in failures.items()}


def _messages(task: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.prompt}]


def _read(task: Task, answer: str | ValueError) -> tuple[bool | None, str]:
    """Return the verdict; or None, with the reason."""
    if isinstance(answer, ValueError):
        # The endpoint's messages name the options for responses; the judge's options have a prefix.
        return None, re.sub(r"--(base_url|concurrency)\b", r"--judge_\1", str(answer))
    expected = "<answer> with yes or no" if task.question.rule is None else "<extract> with its end"
    shown = answer if len(answer) <= 200 else "... " + answer[-200:]
    return read_answer(task.question, task.response, answer), f"Got answer {shown!r}, expected an {expected}."


def _line(task: Task, judge: str, verdict: bool, answer: str) -> bytes:
    row: dict[str, Any] = {
        "judge": judge,
        "main_id": task.key[0],
        "point_id": task.key[1],
        "fingerprint": task.fingerprint(judge),
        "question": task.question.text,
        "rule": task.rule_text,
        "verdict": verdict,
        "answer": answer,
    }
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _cut_unfinished_line(file: Path) -> None:
    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
