"""Shared by the benchmarks: description of the machine, timing, matrix-product rate, peak memory, tables."""

import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
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
    """Command, versions, device and date of a run, for the head of its output."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl))
    module = ".".join(Path(os.path.relpath(sys.argv[0])).with_suffix("").parts).removesuffix(".__main__")
    return f"`python -m {' '.join([module, *sys.argv[1:]])}`\n{versions}; {name}; {date.today()}"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of `work()`, including the device's part of it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    return statistics.median(values)


def ceiling(device: str, dtype: torch.dtype, size: int = 2048, repeats: int = 7) -> float:
    """FLOP/s of a product of two `size` x `size` matrices, the rate that other figures are compared with."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device) for _ in range(repeats)]
    return 2 * size**3 / median(seconds[1:])


def peak_memory(work: Callable[[], Any], device: str) -> int | None:
    """Peak memory of `work()` above what is in use before it, in bytes.

    On CUDA torch's own count; elsewhere resident memory, measured on Linux with glibc only.

    Returns:
        The bytes, or None where they cannot be measured (`work()` runs all the same).
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    libc, reset = ctypes.CDLL(None), Path("/proc/self/clear_refs")
    if not (hasattr(libc, "mallopt") and reset.exists()):
        work()
        return None

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    # Return freed blocks to the system at once. Otherwise the run would reuse resident ones, and these would not count.
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    libc.mallopt(mmap_threshold, 1 << 16)
    libc.malloc_trim(0)
    reset.write_text("5")  # resets VmHWM to the current VmRSS
    before = resident("VmRSS")
    work()
    peak = resident("VmHWM") - before
    libc.mallopt(mmap_threshold, 1 << 25)  # the value that glibc adapts to when large blocks come and go
    libc.mallopt(trim_threshold, 1 << 26)
    return peak


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
