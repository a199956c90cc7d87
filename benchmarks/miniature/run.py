"""A study from its first step to the written report: estimate, run with progress bars, print and write."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.common.ledger import Ledger
from benchmarks.common.measure import machine, print_table, write_json
from benchmarks.common.tables import digest, markdown
from benchmarks.miniature.grid import Grid, Workshop
from benchmarks.miniature.pretraining import pretrain
from benchmarks.miniature.report import Report
from benchmarks.miniature.study import Study, describe

# Costs on a CPU, in units of a pretraining step on 32 exchanges: a fine-tuning step on 32 rows (mean over the methods), and the
# examination of a prompt.
TUNING_STEP, PROMPT = 3.5, 0.05


def estimate_seconds(study: Study, device: str, workers: int) -> float:
    """Estimate the seconds of the whole study from four steps of its pretraining, timed now."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(study.pretraining, steps=5)
        pretrain(settings, Path(folder) / "base", device, lambda: ends.append(time.perf_counter()))
    groups = study.groups().values()
    tunings = sum((run.rows + run.plain) * run.epochs / run.batch for runs in groups for run in runs)
    dev, test = (
        3 * study.dev[0] + study.dev[1],
        3 * study.test[0] + study.test[1],
    )  # one IFE prompt gives two Flat prompts
    prompts = sum(len(runs) * dev + study.seeds * test for runs in groups)
    after = (TUNING_STEP * tunings * study.batch + PROMPT * prompts * 32) / study.pretraining.batch
    return (study.pretraining.steps + after / workers) * (ends[-1] - ends[0]) / 4


def run_study(study: Study, folder: Path, device: str, workers: int) -> Report:
    """Run what the folder does not hold yet; return the report on all of the study."""
    workshop = Workshop(study, folder, device)
    ledger = Ledger(folder / "ledger.jsonl")
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
        grid = Grid(workshop, ledger, workers, lambda name: progress.advance(tasks[name]))
        grid.run()
    return Report(grid)


def write_report(
    report: Report,
    study: Study,
    device: str,
    seconds: float,
    markdown_file: Path | None,
    json_file: Path | None,
    figure_file: Path | None,
) -> None:
    """Print the tables; write the files that are given."""
    tables, costs = report.tables(), report.costs()
    for title, columns, rows in tables + costs:
        print_table(title, columns, rows)
    summary = f"tables: {digest(tables)}"
    print(f"{summary}; {seconds / 60:.0f} minutes in this process")
    if markdown_file:
        setting = machine(device).replace("\n", "; ")
        parts = [describe(study) + "\n", markdown(tables), summary + "\n", markdown(costs), setting + "\n"]
        markdown_file.write_text("\n".join(parts))
    write_json(json_file, {"tables": digest(tables), "mixes": report.numbers()})
    if figure_file:
        report.draw(figure_file)
