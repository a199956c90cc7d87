"""Standard inference: a model's responses to prompts, one user turn each, kept in a file as they come."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import Progress

from trl_miso.evaluation.backends import BACKENDS, Answers
from trl_miso.evaluation.endpoint import Refused
from trl_miso.evaluation.source import source_of
from trl_miso.evaluation.writing import exclusive_writer
from trl_miso.cli.arguments import count_from

# What each backend can be told, and what it does when it is not.
_SETTINGS: dict[str, dict[str, Any]] = {
    "hf": {"batch_size": 8},
    "vllm": {"batch_size": 256},
    "openai": {"base_url": None, "concurrency": 16},
}

# What a row says of the run that wrote it.
_IDENTITY = ("model", "backend", "source", "max_new_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `respond` reads, the same for every benchmark."""
    group = parser.add_argument_group("asking a model for the responses that the file lacks")
    group.add_argument(
        "--model", metavar="MODEL", help="a folder or an id on the Hub; with openai the server's name for it"
    )
    group.add_argument(
        "--backend",
        choices=list(BACKENDS),
        help="hf (transformers, the default), vllm (installed by you), or openai (any OpenAI-compatible server; OPENAI_API_KEY)",
    )
    group.add_argument(
        "--max_new_tokens",
        type=count_from(1),
        default=1280,
        metavar="N",
        help="of a response (default: %(default)s)",
    )
    group.add_argument(
        "--batch_size",
        type=count_from(1),
        metavar="N",
        help="prompts at once (default: hf 8, vllm 256, which it batches itself)",
    )
    group.add_argument("--base_url", metavar="URL", help="openai: the server's (default: OPENAI_BASE_URL, or OpenAI)")
    group.add_argument("--concurrency", type=count_from(1), metavar="N", help="openai: prompts at once (default: 16)")


def responses_file(options: argparse.Namespace, benchmark: str) -> str:
    """Where the responses are: `--responses`, else a file in the working folder that is named after the benchmark and the model.

    Raises:
        ValueError: If there is neither `--responses` nor `--model`.
    """
    if options.responses is not None:
        return options.responses
    if options.model is None:
        raise ValueError(
            "Got neither --responses nor --model, expected responses to score or a model to ask for them. Fix: give one, or both to "
            "say where the model's are kept."
        )
    return f"{benchmark}-{Path(options.model).absolute().name}.jsonl"


def respond(prompts: Sequence[str], file: str | Path, options: argparse.Namespace) -> None:
    """Put the responses that `file` lacks into it, greedily decoded; afterwards it has a row a prompt, in the prompts' order.

    Without `options.model` nothing is asked. A row is on disk before the next one is waited for, and says which prompt it
    answers, since a server's come in any order. A run that was killed, or stopped by an error, goes on with the rows that are
    missing, in the batches of an unbroken run, so that the file becomes what it would have been.

    Args:
        options: What `add_arguments` parsed.

    Raises:
        OSError: If the model or the file cannot be read.
        ValueError: If the file holds anything but responses of this model (see `source_of`), backend and limit to these prompts, or
            another run writes it; if an option is not the backend's, the backend is not installed, or the model does not answer;
            if a server refuses prompts, after all others are asked.
    """
    settings = _settings(options)
    if options.model is None:
        return
    backend = options.backend or "hf"
    source = source_of(options.model, backend, options.base_url)
    beginnings = [_beginning(options, backend, source, row, prompt) for row, prompt in enumerate(prompts, start=1)]
    empty = Path(f"{file}.refused")
    with exclusive_writer(file) as written:
        kept = _kept_rows(Path(file), beginnings)
        refused: dict[int, Refused] = {}
        if missing := [number for number in range(len(prompts)) if number not in kept]:
            answers = BACKENDS[backend](options.model, prompts, missing, options.max_new_tokens, **settings)
            refused = _keep(answers, kept, beginnings, written)
        else:
            said = f"{len(kept)} of {len(prompts)} responses kept in {file}, none asked."
            Console(stderr=True).print(said, markup=False, highlight=False, soft_wrap=True)
        if list(kept) != sorted(kept):
            ordered = Path(f"{file}.ordered")
            ordered.write_bytes(b"".join(kept[number] for number in sorted(kept)))
            os.replace(ordered, file)
        empty.unlink(missing_ok=True)
        if refused:
            empty.write_bytes(b"".join(_row(beginnings[number], "") for number in sorted(refused)))
            raise _refused(refused, file, empty)


def _keep(
    answers: Answers, kept: dict[int, bytes], beginnings: Sequence[bytes], written: BinaryIO
) -> dict[int, Refused]:
    """Write the answers as they come, and add their rows to `kept`; returns those that were refused."""
    refused = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"Responding, kept in {written.name}", total=len(beginnings), completed=len(kept))
        for number, response in answers:
            if isinstance(response, Refused):
                refused[number] = response
                continue
            if number in kept:
                continue  # of a batch that was under way when the last run was killed
            kept[number] = _row(beginnings[number], response)
            written.write(kept[number])
            written.flush()
            progress.advance(task)
    return refused


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The backend's settings, given or by default."""
    given = {
        name: getattr(options, name)
        for name in ("backend", "batch_size", "base_url", "concurrency")
        if getattr(options, name) is not None
    }
    if options.model is None and given:
        raise ValueError(f"Got --{next(iter(given))} without --model, expected both or neither. Fix: give --model.")
    backend = given.pop("backend", "hf")
    known = _SETTINGS[backend]
    if foreign := given.keys() - known.keys():
        name = min(foreign)
        owners = [owner for owner, names in _SETTINGS.items() if name in names]
        raise ValueError(
            f"Got --{name} with --backend {backend}, expected one of --{', --'.join(known)}. Fix: leave it away, or use "
            f"--backend {' or '.join(owners)}."
        )
    return known | given


def _beginning(options: argparse.Namespace, backend: str, source: str | None, row: int, prompt: str) -> bytes:
    """A row up to its response: what it is a response of and to."""
    said = {
        "row": row,
        "model": options.model,
        "backend": backend,
        "source": source,
        "max_new_tokens": options.max_new_tokens,
        "prompt": prompt,
    }
    return json.dumps(said).encode()[:-1] + b', "response": '


def _row(beginning: bytes, response: str) -> bytes:
    return beginning + json.dumps(response).encode() + b"}\n"


def _refused(refused: dict[int, Refused], file: str | Path, empty: Path) -> ValueError:
    """Says how to get a score without answers to these prompts: they are empty responses only if the user says so."""
    first = min(refused)
    others = f" and {len(refused) - 1} others" if len(refused) > 1 else ""
    return ValueError(
        f"{refused[first]} This was prompt {first + 1}{others}; all that came is kept, and the same command asks again only what is "
        f"missing. To have what is refused scored as empty responses: cat {quote(str(empty))} >> {quote(str(file))}, then the same command."
    )


def _kept_rows(file: Path, beginnings: Sequence[bytes]) -> dict[int, bytes]:
    """The file's rows by their prompts' numbers, in its order; what a killed run wrote of another row is cut off."""
    if not file.exists():
        return {}
    *lines, rest = file.read_bytes().split(b"\n")
    numbers = {beginning: number for number, beginning in enumerate(beginnings)}
    kept: dict[int, bytes] = {}
    for at, line in enumerate(lines, start=1):
        beginning = line[: line.rfind(b', "response": ') + len(b', "response": ')]
        number = numbers.get(beginning)
        if number is None or number in kept:
            raise _foreign(file, at, line, beginnings)
        kept[number] = line + b"\n"
    if not any(rest[: len(beginning)] == beginning[: len(rest)] for beginning in beginnings):
        raise _foreign(file, len(lines) + 1, rest, beginnings)
    if rest:
        os.truncate(file, file.stat().st_size - len(rest))
    return kept


def _foreign(file: Path, at: int, line: bytes, beginnings: Sequence[bytes]) -> ValueError:
    """Says in what the line differs from the row that it should be, if it is one of another model's."""
    wanted = json.loads(beginnings[0] + b'""}')
    try:
        got = json.loads(line)
        differ = [name for name in _IDENTITY if name in got and got[name] != wanted[name]]
    except (ValueError, TypeError):
        differ = []
    said = "".join(f", {name} {got[name]!r} where this run has {wanted[name]!r}" for name in differ)
    if "source" in differ:
        said += " (the model's files, its commit, or the server's address are others)"
    return ValueError(
        f"Got line {at} of {file}, which is no response of this model and backend, with this max_new_tokens, to one of these "
        f"prompts{said}. Expected a new file, or the one that a run to be continued wrote. Fix: give --responses another file, or score "
        "these responses without --model."
    )
