"""Ask a model for the constraints in instructions, and keep its answers in a file: one line per instruction, written as it comes.

A model only quotes. What it gives is looked up in the instruction (`rows.split_by_quotes`), so that it cannot invent or rewrite.
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from trl_miso.evaluation.asking import ATTEMPTS, AskAll, ask_until_read
from trl_miso.evaluation.kept_answers import KeptAnswers, appending

RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "constraints",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"constraints": {"type": "array", "items": {"type": "string"}}},
            "required": ["constraints"],
            "additionalProperties": False,
        },
    },
}
_PROMPT = """\
Below, between <instruction> and </instruction>, stands an instruction that somebody gives to an assistant. Do not carry it out. Find its \
constraints: the parts that say how the answer has to be, for example its length, format, language, tone, words, audience, order, what it has to \
contain and what it has to avoid. The request itself is no constraint, and neither is material to work on, such as a text to translate.

Quote each constraint word for word, as the shortest clause that is understood alone. Give one requirement per quotation, in the order of \
the instruction. If there is no constraint, give an empty list.

Answer with JSON alone, in this form: {"constraints": ["first quotation", "second quotation"]}

<instruction>
%s
</instruction>"""
_FILE = KeptAnswers(
    "model",
    "an answer",
    "Expected a new file, or the answers of one model. Fix: give another --answers, or the model that wrote this file.",
)
_OBJECT = re.compile(r"\{.*\}", re.DOTALL)


def question(text: str) -> str:
    """The prompt that asks for the constraints of an instruction."""
    return _PROMPT % text


def read_quotes(answer: str) -> list[str] | None:
    """The quotations in an answer; None if it is not JSON of the asked form. Text around the JSON, such as a fence, is skipped."""
    found = _OBJECT.search(answer)
    try:
        quotes = json.loads(found[0])["constraints"] if found else None
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(quotes, list) or not all(isinstance(quote, str) for quote in quotes):
        return None
    return quotes


def kept_quotes(file: Path, texts: Sequence[str], model: str, source: str | None) -> dict[str, list[str]]:
    """The quotations kept in a file by the instructions, of those among `texts`. The unfinished line of a killed run is skipped.

    Args:
        source: The fingerprint of the model's files or server (`model_fingerprint`): answers from others are not taken.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file holds anything else, or answers of another model.
    """
    texts_by_digest = {_digest(text, source): text for text in texts}
    quotes: dict[str, list[str]] = {}
    for _, _, (digest, constraints) in _FILE.read(file, model, lambda row: (row["instruction"], row["constraints"])):
        if digest in texts_by_digest:
            quotes.setdefault(texts_by_digest[digest], constraints)
    return quotes


def ask_for_quotes(
    texts: Sequence[str], model: str, source: str | None, ask_all: AskAll, file: Path, attempts: int = ATTEMPTS
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Ask for the constraints of the instructions that `file` does not have, and append the answers to it.

    Every answer is flushed when it comes, so that a killed run can be resumed. An instruction that stands in several rows is asked about
    once; without a readable answer again, `attempts` times in total.

    Returns:
        The quotations by instruction; and for each instruction without a readable answer the reason.

    Raises:
        OSError, ValueError: As `kept_quotes`, and as `exclusive_lock`.
    """
    unique = list(dict.fromkeys(texts))
    read = partial(kept_quotes, file, unique, model, source)
    with appending(file, read) as (quotes, append), Progress(console=Console(stderr=True)) as progress:
        waiting = [text for text in unique if text not in quotes]
        bar = progress.add_task(f"Asking {model}", total=len(unique), completed=len(quotes))

        def keep(text: str, found: list[str], answer: str) -> None:
            quotes[text] = found
            append({"model": model, "instruction": _digest(text, source), "constraints": found})

        reasons = ask_until_read(waiting, question, ask_all, _read, keep, progress, bar, attempts)
    return quotes, {waiting[number]: reason for number, reason in reasons.items()}


def _read(text: str, answer: str | ValueError) -> tuple[list[str] | None, str]:
    if isinstance(answer, ValueError):
        return None, str(answer)
    shown: Any = answer if len(answer) <= 200 else "... " + answer[-200:]
    return read_quotes(answer), f"Got answer {shown!r}, expected JSON with a list of constraints."


def _digest(text: str, source: str | None) -> str:
    """Digest of all that an answer depends on beside the model's name: its files or server, the prompt with the instruction."""
    return sha256(json.dumps([source, question(text)]).encode()).hexdigest()[:16]
