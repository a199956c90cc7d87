"""All runs of a study, over several processes, and the ledger of finished runs from which a killed study resumes."""

import hashlib
import json
import multiprocessing
import shutil
import sys
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

from benchmarks.common.ledger import Ledger
from benchmarks.common.statistics import instruction_level
from benchmarks.common.workers import start_worker
from benchmarks.miniature import evaluate, language, pretraining, training
from benchmarks.miniature.evaluate import examination, examine
from benchmarks.miniature.pretraining import pretrain
from benchmarks.miniature.study import Study
from benchmarks.miniature.training import Run, finetune


@cache
def _code() -> dict[str, str]:
    """Hashes of the code behind a base model, and of all code that a run uses, with every imported module of `trl_miso`."""
    base = [Path(module.__file__) for module in (language, pretraining)]
    rest = [Path(module.__file__) for module in (training, evaluate)]
    package = [Path(module.__file__) for name, module in sys.modules.items() if name.partition(".")[0] == "trl_miso"]
    return {"base": _hash(base), "all": _hash([*base, *rest, *sorted(package)])}


def _hash(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@dataclass(frozen=True)
class Workshop:
    """Trains and examines models in `folder`. Pickled and sent to worker processes."""

    study: Study
    folder: Path
    device: str
    code: dict[str, str] = field(default_factory=_code)

    def weights(self, run: Run | None) -> Path:
        """The checkpoint folder of a run; None: of the base model."""
        if run is None:
            return self.folder / f"base-{self._digest(asdict(self.study.pretraining), self.code['base'])}"
        return self.folder / f"run-{self.key(run, 'dev')}"

    def key(self, run: Run | None, split: str) -> str:
        """Key of the record of an examination: a hash of everything that determines the record."""
        exam = getattr(self.study, split)
        return self._digest(split, exam, self.weights(None).name, asdict(run) if run else None, self.code["all"])

    def _digest(self, *parts: Any) -> str:
        device = torch.cuda.get_device_name() if self.device == "cuda" else torch.backends.cpu.get_cpu_capability()
        versions = [module.__version__ for module in (torch, transformers, trl, tokenizers)]
        text = json.dumps([device, torch.get_num_threads(), versions, *parts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def train(self, run: Run) -> dict[str, Any]:
        """Fine-tune; return the record of the run on the dev split."""
        work = finetune(self.weights(None), run, self.weights(run), self.device)
        return self.examine("dev", run) | {"work": work}

    def examine(self, split: str, run: Run | None) -> dict[str, Any]:
        """The record of a model on a split; None: of the base model."""
        if not self.weights(run).exists():  # checkpoints are removed once their group is done
            finetune(self.weights(None), run, self.weights(run), self.device)
        sets = examine(self.weights(run), examination(split, *getattr(self.study, split)), self.device)
        record = {"key": self.key(run, split), "split": split}
        if run:
            record |= {"method": run.method, "plain": run.plain, "learning_rate": run.learning_rate, "seed": run.seed}
        return record | {"sets": sets}


class Grid:
    """All runs of a study. Runs in the ledger are not repeated.

    Args:
        advance: Called after every unit of work with its kind: "pretraining", "dev" or "test".
    """

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
        """The share of constraints satisfied on dev, mean of the sets IFE and Dense."""
        sets = self.record(run, "dev")["sets"]
        return sum(instruction_level([sets[name]["verdicts"]]).accuracy for name in ("IFE", "Dense")) / 2

    def dev_scores(self, runs: list[Run]) -> dict[float, float]:
        """The mean dev score over seeds, per learning rate."""
        scores: dict[float, list[float]] = {}
        for run in runs:
            scores.setdefault(run.learning_rate, []).append(self.dev_score(run))
        return {rate: sum(values) / len(values) for rate, values in scores.items()}

    def chosen(self, runs: list[Run]) -> list[Run]:
        """The runs with the learning rate that scores best on dev; of equal scores the smallest rate."""
        scores = self.dev_scores(runs)
        best = max(sorted(scores), key=scores.__getitem__)
        return [run for run in runs if run.learning_rate == best]


@contextmanager
def _pool(workers: int) -> Iterator[Callable[[Callable, Iterable], Iterable]]:
    """A `map` over `workers` processes that keeps the order of its inputs."""
    if workers == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        yield pool.map
