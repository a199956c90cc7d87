"""Standard inference: a model's responses to prompts (one user turn, or a conversation), appended to a file as they come."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import Progress

from trl_miso.evaluation.backends import BACKENDS, Answers, Prompt
from trl_miso.evaluation.endpoint import Refused
from trl_miso.evaluation.file_lock import exclusive_lock
from trl_miso.evaluation.model_fingerprint import model_fingerprint

# Settings per backend, with their defaults.
_SETTINGS: dict[str, dict[str, Any]] = {
    "transformers": {"batch_size": None},
    "vllm": {"batch_size": 256},
    "openai": {"base_url": None, "concurrency": 16},
}

# Columns by which a row identifies the run that wrote it.
_IDENTITY = ("model", "backend", "source", "max_new_tokens")
_RESPONSE_COLUMN = b', "response": '
_BATCH_SIZE_COLUMN = re.compile(rb', "batch_size": ([1-9]\d*)}\n$')


@dataclass(frozen=True)
class ModelRequest:
    """A model to ask, and how to ask it.

    Attributes:
        model: A folder or an id on the Hub; with "openai" the server's name for the model.
        backend: "transformers", "vllm" or "openai" (any OpenAI-compatible server).
        max_new_tokens: Limit per response, in tokens.
        batch_size: Prompts per batch, for transformers (default: as many as fit in memory, see `default_batch_size`) and vllm
            (default: 256).
        base_url: For openai: address of the server (default: OPENAI_BASE_URL, or OpenAI).
        concurrency: For openai: number of requests at once (default: 16).

    Raises:
        ValueError: If a setting is not one of the backend's.
    """

    model: str
    backend: str = "transformers"
    max_new_tokens: int = 1280
    batch_size: int | None = None
    base_url: str | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        allowed = _SETTINGS[self.backend]
        foreign = self._given().keys() - allowed.keys()
        if foreign:
            name = min(foreign)
            owners = [backend for backend, settings in _SETTINGS.items() if name in settings]
            raise ValueError(
                f"Got --{name} with --backend {self.backend}, expected one of --{', --'.join(allowed)}. Fix: remove --{name}, or use "
                f"--backend {' or '.join(owners)}."
            )

    def settings(self) -> dict[str, Any]:
        """Return the backend's settings: as given, or their defaults."""
        return _SETTINGS[self.backend] | self._given()

    def _given(self) -> dict[str, Any]:
        settings = {"batch_size": self.batch_size, "base_url": self.base_url, "concurrency": self.concurrency}
        return {name: value for name, value in settings.items() if value is not None}


def respond(prompts: Sequence[Prompt], file: str | Path, request: ModelRequest | None) -> None:
    """Complete `file` with greedy responses, to one row per prompt in the prompts' order. Without a request, do nothing.

    Every row is flushed before the next response is awaited. A row names its prompt, since a server's responses come in any order.
    A run that was killed or failed resumes with the missing rows, in the batches of an uninterrupted run, so that the finished file
    is the same, byte for byte. To this end a row of a model that is loaded here has the size of its batch, and a run that resumes without
    a given batch size continues with that of the last row.

    Raises:
        OSError: If the model or the file cannot be read.
        ImportError: If the backend's package is not installed.
        ValueError: If the file holds rows of another model (see `model_fingerprint`), backend, limit or prompt; if another run writes
            the file; if the model does not answer; after all other prompts are answered, if a server refuses some.
    """
    if request is None:
        return
    fingerprint = model_fingerprint(request.model, request.backend, request.base_url)
    # A row up to its response is known before the model answers: rows of an earlier run are recognized by it.
    row_starts = [_row_start(request, fingerprint, row, prompt) for row, prompt in enumerate(prompts, start=1)]
    refused_file = Path(f"{file}.refused")
    with exclusive_lock(file) as opened:
        rows = _read_rows(Path(file), row_starts)
        refusals: dict[int, Refused] = {}
        missing = [number for number in range(len(prompts)) if number not in rows]
        if missing:
            backend = BACKENDS[request.backend]
            settings = _resumed_settings(request, rows)
            answers = backend(request.model, prompts, missing, request.max_new_tokens, **settings)
            refusals = _write_answers(answers, rows, row_starts, opened)
        else:
            message = f"{len(rows)} of {len(prompts)} responses kept in {file}, none asked."
            Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
        if list(rows) != sorted(rows):
            ordered_file = Path(f"{file}.ordered")
            ordered_file.write_bytes(b"".join(rows[number] for number in sorted(rows)))
            os.replace(ordered_file, file)
        refused_file.unlink(missing_ok=True)
        if refusals:
            refused_file.write_bytes(b"".join(_row(row_starts[number], "") for number in sorted(refusals)))
            raise _refusal_error(refusals, file, refused_file)


def ask_local(
    request: ModelRequest, conversations: Iterable[Sequence[Mapping[str, str]]]
) -> Iterator[tuple[int, str | ValueError]]:
    """Answer conversations, as `Endpoint.ask_all` does, by a model that is loaded here."""
    prompts = list(conversations)
    backend = BACKENDS[request.backend]
    answers = backend(request.model, prompts, range(len(prompts)), request.max_new_tokens, **request.settings())
    for number, answer, _ in answers:
        yield number, answer


def _resumed_settings(request: ModelRequest, rows: dict[int, bytes]) -> dict[str, Any]:
    """Return the backend's settings, with the batch size of the last row if none is given.

    The free memory may differ from that of the killed run. The last row, in the order of answers, has the size to which that run may have
    been halved.
    """
    settings = request.settings()
    if "batch_size" in settings and request.batch_size is None and rows:
        recorded = _BATCH_SIZE_COLUMN.search(rows[next(reversed(rows))])
        if recorded:
            settings["batch_size"] = int(recorded[1])
    return settings


def _write_answers(
    answers: Answers, rows: dict[int, bytes], row_starts: Sequence[bytes], opened: BinaryIO
) -> dict[int, Refused]:
    """Append every answer when it comes, and add its row to `rows`; return the refusals."""
    refusals = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"Responding, kept in {opened.name}", total=len(row_starts), completed=len(rows))
        for number, response, batch_size in answers:
            if isinstance(response, Refused):
                refusals[number] = response
                continue
            if number in rows:
                continue  # an earlier run was killed after it wrote a part of this batch
            rows[number] = _row(row_starts[number], response, batch_size)
            opened.write(rows[number])
            opened.flush()
            progress.advance(task)
    return refusals


def _row_start(request: ModelRequest, fingerprint: str | None, row: int, prompt: Prompt) -> bytes:
    """Serialize a row up to its response: the model that answers, and the prompt."""
    columns = {
        "row": row,
        "model": request.model,
        "backend": request.backend,
        "source": fingerprint,
        "max_new_tokens": request.max_new_tokens,
        "prompt": prompt,
    }
    return json.dumps(columns).encode().removesuffix(b"}") + _RESPONSE_COLUMN


def _row(row_start: bytes, response: str, batch_size: int | None = None) -> bytes:
    ending = "" if batch_size is None else f', "batch_size": {batch_size}'
    return row_start + f"{json.dumps(response)}{ending}}}\n".encode()


def _refusal_error(refusals: Mapping[int, Refused], file: str | Path, refused_file: Path) -> ValueError:
    """Say how to get a score without these answers: they count as empty responses only if the user asks for it."""
    first = min(refusals)
    others = f" and {len(refusals) - 1} others" if len(refusals) > 1 else ""
    command = f"cat {quote(str(refused_file))} >> {quote(str(file))}"
    return ValueError(
        f"{refusals[first]} This was prompt {first + 1}{others}. All responses that came are kept, and the same command asks again for the "
        f"missing ones only. To have refused prompts scored as empty responses: {command}, then the same command."
    )


def _read_rows(file: Path, row_starts: Sequence[bytes]) -> dict[int, bytes]:
    """Read the file's rows by prompt number, in the file's order; truncate the unfinished row that a killed run left."""
    if not file.exists():
        return {}
    *lines, unfinished = file.read_bytes().split(b"\n")
    numbers = {row_start: number for number, row_start in enumerate(row_starts)}
    rows: dict[int, bytes] = {}
    for line_number, line in enumerate(lines, start=1):
        row_start = line[: line.rfind(_RESPONSE_COLUMN) + len(_RESPONSE_COLUMN)]
        number = numbers.get(row_start)
        if number is None or number in rows:
            raise _foreign_row_error(file, line_number, line, row_starts)
        rows[number] = line + b"\n"
    # The unfinished row has to be a part of one of this run's rows, before or after its response begins.
    if not any(unfinished[: len(row_start)] == row_start[: len(unfinished)] for row_start in row_starts):
        raise _foreign_row_error(file, len(lines) + 1, unfinished, row_starts)
    if unfinished:
        os.truncate(file, file.stat().st_size - len(unfinished))
    return rows


def _foreign_row_error(file: Path, line_number: int, line: bytes, row_starts: Sequence[bytes]) -> ValueError:
    """Name the columns in which the line differs from a row of this run, if it is a row of another run."""
    expected = json.loads(row_starts[0] + b'""}')
    try:
        row = json.loads(line)
        differing = [name for name in _IDENTITY if name in row and row[name] != expected[name]]
    except (ValueError, TypeError):
        differing = []
    difference = "".join(f", {name} {row[name]!r} where this run has {expected[name]!r}" for name in differing)
    if "source" in differing:
        difference += " (the model's files, its commit, or the server's address have changed)"
    return ValueError(
        f"Got line {line_number} of {file}, which is not a response of this model, backend and max_new_tokens to one of these "
        f"prompts{difference}. Expected a new file, or the file of the run to resume. Fix: give --responses another file, or score these "
        "responses without --model."
    )
