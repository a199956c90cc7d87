"""JSONL files of one model's answers, one line per answer, flushed as it comes, so that a killed run can be resumed."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trl_miso.evaluation.file_lock import exclusive_lock

T = TypeVar("T")
Row = dict[str, Any]


class KeptAnswers(NamedTuple):
    """A kind of file: the first column of every line, which names the model; what errors call a line, and how they end."""

    model_column: str
    noun: str
    fix: str

    def read(self, file: Path, model: str | None, parse: Callable[[Row], T]) -> Iterator[tuple[int, str, T]]:
        """Yield each line's number, model and parsed row; skip the unfinished line of a killed run.

        Raises ValueError for a line that is not of this kind, also if `parse` raises ValueError, KeyError or TypeError; and for a line of
        another model than `model` (None: than that of the first line).
        """
        *lines, unfinished = file.read_bytes().split(b"\n") if file.exists() else [b""]
        start = f'{{"{self.model_column}": '.encode()
        if unfinished[: len(start)] != start[: len(unfinished)]:
            raise self.refusal(file, len(lines) + 1, f"which is not {self.noun}")
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                line_model, parsed = row[self.model_column], parse(row)
            except (ValueError, KeyError, TypeError) as error:
                raise self.refusal(file, number, f"which is not {self.noun}") from error
            model = model or line_model
            if line_model != model:
                raise self.refusal(file, number, f"{self.noun} of {line_model!r}, not of {model!r}")
            yield number, model, parsed

    def refusal(self, file: Path, number: int, got: str) -> ValueError:
        return ValueError(f"Got line {number} of {file}, {got}. {self.fix}")


@contextmanager
def appending(file: Path, read: Callable[[], T]) -> Iterator[tuple[T, Callable[[Row], None]]]:
    """Lock the file, `read` it and cut its unfinished line; yield what was read, and a function that appends a row."""
    with exclusive_lock(file) as opened:
        kept = read()
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)

        def append(row: Row) -> None:
            opened.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            opened.flush()

        yield kept, append
