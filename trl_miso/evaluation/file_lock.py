"""Exclusive access to a file that one run appends to for hours."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def exclusive_lock(file: str | Path) -> Iterator[BinaryIO]:
    """Open `file` with mode "ab" and lock it against other runs; delete it in the end if it is empty.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If another run holds the lock.
    """
    path = Path(file)
    with path.open("ab") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released on close, also when the process is killed
        except BlockingIOError as error:
            raise ValueError(
                f"Got {file}, which another run is writing, expected a file for this run alone. Fix: wait for that run, or give another file."
            ) from error
        try:
            yield opened
        finally:
            if not os.fstat(opened.fileno()).st_size:
                path.unlink(missing_ok=True)
