"""Methods, settings and runs of the study; its ledger, a line a finished run, from which a killed study goes on."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
import trl

from benchmarks.miniature import evaluate, language, pretraining, training
from benchmarks.miniature.evaluate import examination, examine
from benchmarks.miniature.pretraining import Pretraining, pretrain
from benchmarks.miniature.statistics import instruction_level
from benchmarks.miniature.training import Run, finetune, silence

BASE, SFT = "base", "SFT"
METHODS: dict[str, dict[str, Any]] = {
    SFT: {"context_mode": "single"},
    "SFT, twice the epochs": {"context_mode": "single"},
    "MISO-para": {"context_mode": "para"},
    "para w.o. full": {"context_mode": "para", "include_full": False},
    "para, full 1/2": {"context_mode": "para", "full_context_weight": 0.5},
    "para, full 3/4": {"context_mode": "para", "full_context_weight": 0.75},
    "para_prob 1/4": {"context_mode": "para", "para_prob": 0.25},
    "para_prob 1/2": {"context_mode": "para", "para_prob": 0.5},
    "MISO-fid": {"context_mode": "para", "context_weighting": "fid"},
    "fid w.o. full": {"context_mode": "para", "context_weighting": "fid", "include_full": False},
    "no MISO": {"context_mode": "augment"},
    "MISO-succ": {"context_mode": "succ"},
}
MIXES = {"mix": 1, "no mix": 0}  # plain rows for each row with constraints


@dataclass(frozen=True)
class Study:
    """Everything that determines the tables, but for the code and the machine."""

    pretraining: Pretraining
    learning_rates: tuple[float, ...]
    seeds: int
    rows: int
    epochs: int
    batch: int
    dev: tuple[int, int]  # prompts of IFE and of Dense
    test: tuple[int, int]
    methods: dict[str, tuple[str, ...]]  # of each mix
    resamples: int = 2000

    def groups(self) -> dict[tuple[str, str], list[Run]]:
        """The runs among which a learning rate is chosen, by mix and method."""
        return {
            (mix, method): [
                self._run(mix, method, rate, seed) for rate in self.learning_rates for seed in range(self.seeds)
            ]
            for mix, methods in self.methods.items()
            for method in methods
        }

    def _run(self, mix: str, method: str, rate: float, seed: int) -> Run:
        epochs = self.epochs * (2 if method == "SFT, twice the epochs" else 1)
        plain = self.rows * MIXES[mix]
        return Run(method, METHODS[method], rate, seed, self.rows, plain, epochs, self.batch)


class Ledger:
    """Records in a file, a JSON line each, under keys; what was half written when a process died is cut off."""

    def __init__(self, file: Path):
        self._file = file
        content = file.read_bytes() if file.exists() else b""
        kept = content[: content.rfind(b"\n") + 1]
        if kept != content:
            file.write_bytes(kept)
        self.records = {record["key"]: record for record in map(json.loads, kept.splitlines())}

    def add(self, record: dict[str, Any]) -> None:
        if record["key"] in self.records:
            raise ValueError(f"Got a second record {record['key']}, expected one. Fix: report this.")
        with self._file.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["key"]] = record


@cache
def _code() -> dict[str, str]:
    """Hashes of the code that makes a base model, and of all that a run uses: what of `trl_miso` is imported by then."""
    base = [Path(module.__file__) for module in (language, pretraining)]
    rest = [Path(module.__file__) for module in (training, evaluate)]
    package = [Path(module.__file__) for name, module in sys.modules.items() if name.partition(".")[0] == "trl_miso"]
    return {"base": _hash(base), "all": _hash([*base, *rest, *sorted(package)])}


def _hash(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@dataclass(frozen=True)
class Workshop:
    """Trains and examines in `folder`. Passed to other processes."""

    study: Study
    folder: Path
    device: str
    code: dict[str, str] = field(default_factory=_code)

    def weights(self, run: Run | None) -> Path:
        """Where the checkpoint is, of the base model for None."""
        if run is None:
            return self.folder / f"base-{self._digest(asdict(self.study.pretraining), self.code['base'])}"
        return self.folder / f"run-{self.key(run, 'dev')}"

    def key(self, run: Run | None, split: str) -> str:
        """Of the record of an examination: a hash of all that determines it."""
        exam = getattr(self.study, split)
        return self._digest(split, exam, self.weights(None).name, asdict(run) if run else None, self.code["all"])

    def _digest(self, *parts: Any) -> str:
        device = torch.cuda.get_device_name() if self.device == "cuda" else torch.backends.cpu.get_cpu_capability()
        versions = [module.__version__ for module in (torch, transformers, trl, tokenizers)]
        said = json.dumps([device, torch.get_num_threads(), versions, *parts])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def train(self, run: Run) -> dict[str, Any]:
        """The record of a run on the dev split."""
        work = finetune(self.weights(None), run, self.weights(run), self.device)
        return self.examine("dev", run) | {"work": work}

    def examine(self, split: str, run: Run | None) -> dict[str, Any]:
        if not self.weights(run).exists():  # removed when its group was done
            finetune(self.weights(None), run, self.weights(run), self.device)
        found = examine(self.weights(run), examination(split, *getattr(self.study, split)), self.device)
        about = (
            {"method": run.method, "plain": run.plain, "learning_rate": run.learning_rate, "seed": run.seed}
            if run
            else {}
        )
        return {"key": self.key(run, split), "split": split, **about, "sets": found}


class Grid:
    """All runs of a study, those in the ledger not again. `advance` is called after every step of work, with its name."""

    def __init__(self, workshop: Workshop, ledger: Ledger, workers: int, advance: Callable[[str], None]):
        self.workshop, self.ledger, self.advance = workshop, ledger, advance
        self.workers = workers

    def run(self) -> None:
        workshop, settings = self.workshop, self.workshop.study.pretraining
        step = partial(self.advance, "pretraining")
        if workshop.weights(None).exists():
            for _ in range(settings.steps):
                step()
        else:
            pretrain(settings, workshop.weights(None), workshop.device, step)
        with _pool(self.workers) as mapped:
            for split in ("dev", "test"):
                self._add(split, [None], map, partial(workshop.examine, split))
            for runs in workshop.study.groups().values():
                self._add("dev", runs, mapped, workshop.train)
                self._add("test", self.chosen(runs), mapped, partial(workshop.examine, "test"))
                for run in runs:
                    shutil.rmtree(workshop.weights(run), ignore_errors=True)

    def _add(self, split: str, runs: list[Run | None], mapped: Callable, work: Callable) -> None:
        missing = [run for run in runs if self.workshop.key(run, split) not in self.ledger.records]
        for _ in range(len(runs) - len(missing)):
            self.advance(split)
        for record in mapped(work, missing):
            self.ledger.add(record)
            self.advance(split)

    def record(self, run: Run | None, split: str) -> dict[str, Any]:
        return self.ledger.records[self.workshop.key(run, split)]

    def dev_score(self, run: Run | None) -> float:
        """The share of satisfied constraints, mean of the sets IFE and Dense."""
        sets = self.record(run, "dev")["sets"]
        return sum(instruction_level([sets[name]["verdicts"]]).accuracy for name in ("IFE", "Dense")) / 2

    def dev_scores(self, runs: list[Run]) -> dict[float, float]:
        """For each learning rate the mean over seeds."""
        scores: dict[float, list[float]] = {}
        for run in runs:
            scores.setdefault(run.learning_rate, []).append(self.dev_score(run))
        return {rate: sum(values) / len(values) for rate, values in scores.items()}

    def chosen(self, runs: list[Run]) -> list[Run]:
        """The runs with the learning rate that is best on the dev split; of equal ones the smallest."""
        scores = self.dev_scores(runs)
        best = max(sorted(scores), key=scores.__getitem__)
        return [run for run in runs if run.learning_rate == best]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuses a folder that another process works in."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Got {folder}, which another run works in, expected it free. Fix: wait, or give another --folder."
            ) from None
        yield


@contextmanager
def _pool(workers: int) -> Iterator[Callable[[Callable, Iterable], Iterable]]:
    """A map in as many processes, in the order of what it is given."""
    if workers == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        yield pool.map


def start_worker() -> None:
    """One thread: results do not depend on how many processes there are, and small models run best so."""
    torch.set_num_threads(1)
    silence()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
