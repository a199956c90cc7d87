"""JSONL files: one JSON object per line."""

import json
from pathlib import Path
from typing import Any


def read_jsonl(file: str | Path, columns: dict[str, type]) -> list[dict[str, Any]]:
    """Read `[json.loads(line) for line in open(file)]`, and check that every row has `columns` of these types.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a line is not a JSON object, or lacks a column. The message names the line.
    """
    expected = ", ".join(f"{name!r} ({kind.__name__})" for name, kind in columns.items())
    rows = []
    for number, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:  # also for bytes that are not UTF-8
            raise ValueError(
                f"Got line {number} of {file}, which is not JSON: {error}. Expected one JSON object per line. Fix: correct the line."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"Got line {number} of {file} with a {type(row).__name__}, expected an object with {expected}. Fix: correct the line."
            )
        for name, kind in columns.items():
            if not isinstance(row.get(name), kind):
                raise ValueError(
                    f"Got line {number} of {file} with {name}={row.get(name)!r}, expected an object with {expected}. Fix: rename the "
                    "columns, or correct the line."
                )
        rows.append(row)
    return rows
