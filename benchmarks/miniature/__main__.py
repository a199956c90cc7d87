"""
The paper's comparison of methods in miniature: which of them teaches a small model to satisfy several constraints?

    python -m benchmarks.miniature --quick --markdown FILE             # 4 minutes on 2 cores, 14 if they are busy
    python -m benchmarks.miniature --markdown FILE --figure FILE.png   # hours; killed, it goes on where it was
    python -m benchmarks.miniature --device cuda --size 30m --markdown FILE

A Llama is pretrained on a small language (`mini/language.py`) in which constraints can be checked, fine-tuned by each method
with `MISOSFTTrainer`, and asked by standard inference: one context, greedy. SFT is `context_mode="single"`, which makes the
same steps as TRL's SFTTrainer (`tests/test_benchmarks.py`) on the rows that the other methods see, in their order. Each method's learning
rate is chosen on a dev split; the test split is then examined once, with that rate. On a CPU the tables are the same, bit for
bit, whenever and with however many processes they are made; seconds are not and stand apart.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.common.measure import machine, print_table, write_json
from benchmarks.miniature.grid import METHODS, MIXES, SFT, Grid, Ledger, Study, Workshop, alone, start_worker
from benchmarks.miniature.pretraining import Pretraining, build_model, pretrain
from benchmarks.miniature.report import Report, digest, markdown

ALL = tuple(METHODS)
FULL = Study(
    pretraining=Pretraining("1m", steps=2000, batch=64),
    learning_rates=(1.875e-4, 3.75e-4, 7.5e-4, 1.5e-3, 3e-3),
    seeds=5,
    rows=1000,
    epochs=3,
    batch=32,
    dev=(300, 150),
    test=(600, 300),
    methods={"mix": ALL, "no mix": (SFT, "MISO-para", "MISO-fid")},
)
QUICK = replace(
    FULL,
    pretraining=Pretraining("quick", steps=1200, batch=32),
    learning_rates=(7.5e-4, 2e-3),
    seeds=2,
    rows=300,
    dev=(60, 30),
    test=(300, 150),
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
    batch=8,
    dev=(9, 5),
    test=(9, 5),
    methods={"mix": ALL},
    resamples=100,
)


# A step of fine-tuning on 32 rows (the methods' mean), and a prompt's examination, in steps of pretraining on 32 exchanges: as a CPU had them.
TUNING_STEP, PROMPT = 3.5, 0.05


def estimate(study: Study, device: str, workers: int) -> float:
    """Seconds that the whole study may take, from those of four steps of its pretraining, made now."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(study.pretraining, steps=5)
        pretrain(settings, Path(folder) / "base", device, lambda: ends.append(time.perf_counter()))
    groups = study.groups().values()
    tunings = sum((run.rows + run.plain) * run.epochs / run.batch for runs in groups for run in runs)
    dev, test = 3 * study.dev[0] + study.dev[1], 3 * study.test[0] + study.test[1]  # an IFE prompt is two Flat ones
    prompts = sum(len(runs) * dev + study.seeds * test for runs in groups)
    after = (TUNING_STEP * tunings * study.batch + PROMPT * prompts * 32) / study.pretraining.batch
    return (study.pretraining.steps + after / workers) * (ends[-1] - ends[0]) / 4


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
            "dev": progress.add_task("fine-tuned, examined on dev", total=1 + runs),
            "test": progress.add_task("examined on test", total=1 + len(study.groups()) * study.seeds),
        }
        grid = Grid(workshop, ledger, options.workers, lambda name: progress.advance(tasks[name]))
        grid.run()
    return Report(grid)


def describe(study: Study) -> str:
    base = study.pretraining
    parameters = build_model(base.size, base.seed).num_parameters() / 1e6
    return (
        f"A Llama of {parameters:.2f}M parameters, pretrained on {base.steps} batches of {base.batch} exchanges with 0 to 3 "
        f"constraints; fine-tuned for {study.epochs} epochs on {study.rows} rows with 3 to 7 (mix: and as many without any), "
        f"batches of {study.batch}; {study.seeds} seeds of rows and order, one base model; {study.test[0]} IFE and "
        f"{study.test[1]} Dense prompts. I, P: constraints, prompts; ±: standard error over seeds; intervals: bootstrap of "
        f"seeds and prompts, {study.resamples} resamples; attention: of the texts' tokens, mean over layers and heads."
    )


def write(report: Report, study: Study, options: argparse.Namespace, seconds: float) -> None:
    tables, costs = report.tables(), report.costs()
    for title, columns, rows in tables + costs:
        print_table(title, columns, rows)
    told = f"tables: {digest(tables)}"
    print(f"{told}; {seconds / 60:.0f} minutes in this process")
    if options.markdown:
        about = machine(options.device).replace("\n", "; ")
        parts = [describe(study) + "\n", markdown(tables), told + "\n", markdown(costs), about + "\n"]
        options.markdown.write_text("\n".join(parts))
    write_json(options.json, {"tables": digest(tables), "mixes": report.numbers()})
    if options.figure:
        report.draw(options.figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument(
        "--quick", action="store_true", help="a smaller model, fewer rows, two seeds, two learning rates"
    )
    scale.add_argument("--smoke", action="store_true", help="everything once, in seconds; its accuracies mean nothing")
    scale.add_argument("--size", choices=("1m", "30m"), default="1m", help="parameters of the model (default: 1m)")
    parser.add_argument(
        "--mixes", nargs="+", choices=MIXES, default=list(MIXES), help="with plain rows, without (default: both)"
    )
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
    study = replace(study, methods={mix: of for mix, of in study.methods.items() if mix in options.mixes})
    if not study.methods:
        sys.exit(
            "Got --mixes for which this study has no runs, expected 'mix' among them. Fix: leave --mixes or --smoke out."
        )
    if options.figure and find_spec("matplotlib") is None:
        sys.exit("Got --figure without matplotlib, expected it installed. Fix: pip install 'trl-miso[plots]'.")
    start_worker()
    start = time.perf_counter()
    try:
        with alone(options.folder):
            seconds = estimate(study, options.device, options.workers)
            print(
                f"estimate for all of it: {seconds / 60:.0f} minutes, at the speed of four steps made now", flush=True
            )
            report = run(study, options)
    except ValueError as error:
        sys.exit(str(error))
    write(report, study, options, time.perf_counter() - start)


if __name__ == "__main__":
    main()
