"""Ask a model many questions until their answers can be read, and estimate what this costs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.progress import Progress, TaskID

# How often a question is asked in total, if there is no answer or the answer cannot be read.
ATTEMPTS = 3
# After this many failures in a row no other question is asked.
GIVE_UP = 20

Task = TypeVar("Task")
Value = TypeVar("Value")
AskAll = Callable[[Iterable[Sequence[dict[str, str]]]], Iterator[tuple[int, str | ValueError]]]


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of asking: requests, input tokens, and the most output tokens."""

    requests: int
    input_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, prompts: Sequence[str], max_tokens: int) -> "Estimate":
        """Estimate one request per prompt. Questions that have to be asked again are not counted.

        Tokens are estimated from characters, since a server's tokenizer is seldom at hand: one token per character of three UTF-8
        bytes (such as Chinese), and one per four other characters.
        """
        characters = sum(len(prompt) for prompt in prompts)
        size = sum(len(prompt.encode("utf-8", "replace")) for prompt in prompts)
        wide = (size - characters) // 2  # a character of three bytes exceeds its count by two
        return cls(len(prompts), wide + (characters - wide) // 4, len(prompts) * max_tokens)

    def cost(self, input_price: float, output_price: float) -> tuple[float, float]:
        """Return the cost of the questions alone, and with answers of the greatest length. Prices are per million tokens."""
        least = self.input_tokens * input_price / 1e6
        return least, least + self.output_tokens * output_price / 1e6

    def priced(self, message: str, prices: tuple[float, float] | None) -> str:
        """Return the message as a sentence, with the cost at these prices if there are any."""
        if not prices:
            return f"{message}."
        least, most = self.cost(*prices)
        return f"{message}; at these prices about {least:.2f} plus the cost of the answers, at most {most:.2f}."


def ask_until_read(
    tasks: Sequence[Task],
    prompt_of: Callable[[Task], str],
    ask_all: AskAll,
    read: Callable[[Task, str | ValueError], tuple[Value | None, str]],
    keep: Callable[[Task, Value, str], None],
    progress: Progress,
    bar: TaskID,
    attempts: int = ATTEMPTS,
) -> dict[int, str]:
    """Ask one question per task; return the reason per number of a task (from 0) that stays without a value.

    A question without a readable answer is asked again after all others, `attempts` times in total.

    Args:
        ask_all: As `Endpoint.ask_all`, which may stop asking after a failure.
        read: Returns the value in an answer; or None, with the reason.
        keep: Called with a task, its value and the answer, as soon as it comes.
    """
    failures_in_a_row = 0
    waiting = list(range(len(tasks)))
    failures: dict[int, list[str]] = {number: [] for number in waiting}
    while waiting and failures_in_a_row < GIVE_UP:
        unanswered = dict(enumerate(waiting))
        retry = []
        # The condition is checked as conversations are sent: it stops the round after too many failures.
        conversations = (
            [{"role": "user", "content": prompt_of(tasks[number])}] for number in waiting if failures_in_a_row < GIVE_UP
        )
        for place, answer in ask_all(conversations):
            number = unanswered.pop(place)
            value, failure = read(tasks[number], answer)
            if value is None:
                failures_in_a_row += 1
                failures[number].append(failure)
                if len(failures[number]) < attempts:
                    retry.append(number)
                continue
            failures_in_a_row = 0
            del failures[number]
            keep(tasks[number], value, str(answer))
            progress.advance(bar)
        waiting = [*unanswered.values(), *retry]
    not_asked = f"not asked, after {failures_in_a_row} failures in a row"
    return {number: messages[-1] if messages else not_asked for number, messages in failures.items()}
