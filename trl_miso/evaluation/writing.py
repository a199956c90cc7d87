"""Files that runs write for hours."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def exclusive_writer(file: str | Path) -> Iterator[BinaryIO]:
    """`open(file, "ab")`, which no other run has open so; nothing stays of a file that is empty.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If another run writes it.
    """
    path = Path(file)
    with path.open("ab") as written:
        try:
            fcntl.flock(written, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, or the process ends in any way
        except BlockingIOError as error:
            raise ValueError(
                f"Got {file}, which another run is writing, expected a file for this run alone. Fix: wait for that run, or give another file."
            ) from error
        try:
            yield written
        finally:
            if not os.fstat(written.fileno()).st_size:
                path.unlink(missing_ok=True)
