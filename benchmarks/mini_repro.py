"""
The paper's comparison of methods in miniature: which of them teaches a small model to satisfy several constraints?

    python benchmarks/mini_repro.py --quick --markdown FILE             # about 10 minutes on 2 cores
    python benchmarks/mini_repro.py --markdown FILE --figure FILE.png   # hours; killed, it goes on where it was
    python benchmarks/mini_repro.py --device cuda --size 30m --markdown FILE

A Llama is pretrained on a small language (`mini/language.py`) in which constraints can be checked, fine-tuned by each method
with `MISOSFTTrainer`, and asked by standard inference: one context, greedy. SFT is `context_mode="single"`, which makes the
same steps as TRL's SFTTrainer (`tests/test_benchmarks.py`) on the batches that the other methods see. Each method's learning
rate is chosen on a dev split; the test split is then examined once, with that rate. On a CPU the tables are the same, bit for
bit, whenever and with however many processes they are made; seconds are not and stand apart.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from measure import machine, print_table, write_json
from mini.grid import METHODS, SFT, Grid, Ledger, Study, Workshop, alone, start_worker
from mini.pretraining import Pretraining
from mini.report import Report, digest, markdown
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ALL = tuple(METHODS)
FULL = Study(
    pretraining=Pretraining("1m", steps=8200, batch=64),
    learning_rates=(7.5e-4, 1.5e-3, 3e-3),
    seeds=5,
    rows=1000,
    epochs=3,
    batch=32,
    dev=(300, 150),
    test=(600, 300),
    methods={"mix": ALL, "no mix": ALL},
)
QUICK = replace(
    FULL,
    pretraining=Pretraining("quick", steps=2000, batch=32),
    learning_rates=(7.5e-4, 2e-3),
    seeds=2,
    rows=300,
    dev=(60, 30),
    test=(300, 150),
    methods={"mix": ALL, "no mix": (SFT, "MISO-para", "MISO-fid")},
)
LARGE = replace(
    FULL, pretraining=replace(FULL.pretraining, size="30m", learning_rate=1e-3), learning_rates=(1e-4, 3e-4, 6e-4)
)
SMOKE = replace(
    QUICK,
    pretraining=Pretraining("smoke", steps=20, batch=16),
    learning_rates=(1.5e-3,),
    seeds=1,
    rows=16,
    epochs=1,
    dev=(9, 5),
    test=(9, 5),
    methods={"mix": ALL},
    resamples=100,
)


def run(study: Study, options: argparse.Namespace) -> Report:
    """Whatever of the study is not in the folder yet, and its report."""
    workshop = Workshop(study, options.folder, options.device)
    ledger = Ledger(options.folder / "ledger.jsonl")
    runs = sum(map(len, study.groups().values()))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {
            "pretraining": progress.add_task("pretraining steps", total=study.pretraining.steps),
            "dev": progress.add_task("fine-tunings", total=runs),
            "test": progress.add_task("test examinations", total=1 + len(study.groups()) * study.seeds),
        }
        grid = Grid(workshop, ledger, options.workers, lambda name: progress.advance(tasks[name]))
        grid.run()
    return Report(grid)


def write(report: Report, study: Study, options: argparse.Namespace, seconds: float) -> None:
    tables, costs = report.tables(), report.costs()
    for title, columns, rows in tables + costs:
        print_table(title, columns, rows)
    told = f"tables: {digest(tables)}"
    print(f"{told}; {seconds / 60:.0f} minutes in this process")
    if options.markdown:
        about = machine(options.device).replace("\n", "; ")
        options.markdown.write_text(f"{markdown(tables)}\n{told}\n\n{markdown(costs)}\n{about}\n")
    write_json(options.json, {"tables": digest(tables), "mixes": report.numbers()})
    if options.figure:
        report.draw(options.figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="a smaller model, fewer rows, two seeds, one learning rate")
    scale.add_argument("--smoke", action="store_true", help="everything once, in seconds; its accuracies mean nothing")
    scale.add_argument("--size", choices=("1m", "30m"), default="1m", help="parameters of the model (default: 1m)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, help="processes that fine-tune (default: the cores; on cuda 1)")
    parser.add_argument(
        "--folder", type=Path, default=Path.home() / ".cache" / "trl-miso" / "mini_repro", help="keeps what is finished"
    )
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path, help="a PNG; needs matplotlib")
    options = parser.parse_args(arguments)
    options.workers = options.workers or (len(os.sched_getaffinity(0)) if options.device == "cpu" else 1)
    study = SMOKE if options.smoke else QUICK if options.quick else LARGE if options.size == "30m" else FULL
    start_worker()
    start = time.perf_counter()
    try:
        with alone(options.folder):
            report = run(study, options)
    except ValueError as error:
        sys.exit(str(error))
    write(report, study, options, time.perf_counter() - start)


if __name__ == "__main__":
    main()
