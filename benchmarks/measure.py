"""What the benchmarks share: the machine in a line, a ceiling, peak memory, tables."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from rich.console import Console
from rich.table import Table

WIDTH = 132


def machine(device: str) -> str:
    """The command, versions, device and date of a run."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl))
    return f"`python {' '.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}`\n{versions}; {name}; {date.today()}"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds that `work()` takes, on the device too."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    return statistics.median(values)


def ceiling(device: str, dtype: torch.dtype, size: int = 2048, repeats: int = 7) -> float:
    """FLOP/s of a product of two square matrices: what a step is compared with."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device) for _ in range(repeats)]
    return 2 * size**3 / median(seconds[1:])


@contextmanager
def peak_memory(device: str) -> Iterator[list[float]]:
    """Bytes that the block adds to what was held before it, at its worst, in a list that is filled at its end.

    On a CPU the process's resident set (Linux): run with `MALLOC_MMAP_THRESHOLD_` set, so that freed tensors are given back.
    """
    peak: list[float] = []
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.append(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = _resident("VmRSS")
    yield peak
    peak.append(_resident("VmHWM") - before)


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(float(line.split()[1]) for line in lines if line.startswith(name))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left", box=None)
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=WIDTH).print(table)


def write_json(file: Path | None, figures: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n")
