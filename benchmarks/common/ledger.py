"""Records of finished work in a file that survives a killed process."""

import json
import os
from pathlib import Path
from typing import Any


class Ledger:
    """Records by key, one JSON line each in a file. A line that was half written when a process died is cut off."""

    def __init__(self, file: Path):
        self._file = file
        content = file.read_bytes() if file.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:
            file.write_bytes(complete)
        self.records = {record["key"]: record for record in map(json.loads, complete.splitlines())}

    def add(self, record: dict[str, Any]) -> None:
        if record["key"] in self.records:
            raise ValueError(f"Got a second record {record['key']}, expected one. Fix: report this.")
        with self._file.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["key"]] = record
