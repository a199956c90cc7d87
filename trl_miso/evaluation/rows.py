"""Files of one JSON object a line."""

import json
from pathlib import Path
from typing import Any


def read_rows(file: str | Path, columns: dict[str, type]) -> list[dict[str, Any]]:
    """`[json.loads(line) for line in open(file)]`, every row with `columns`, each of its type.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a line is no JSON object or lacks a column; the message names the line.
    """
    wanted = ", ".join(f"{name!r} ({kind.__name__})" for name, kind in columns.items())
    rows = []
    for number, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:  # also bytes that are no text
            raise ValueError(
                f"Got line {number} of {file}, which is no JSON: {error}. Expected one JSON object a line. Fix: correct the line."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"Got line {number} of {file} with a {type(row).__name__}, expected an object with {wanted}. Fix: correct the line."
            )
        for name, kind in columns.items():
            if not isinstance(row.get(name), kind):
                raise ValueError(
                    f"Got line {number} of {file} with {name}={row.get(name)!r}, expected an object with {wanted}. Fix: rename the "
                    "columns, or correct the line."
                )
        rows.append(row)
    return rows
