"""The study's tables: accuracies, paired differences, faults of answers, choices of the learning rate."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measure import machine, print_table
from benchmarks.common.statistics import Resamples, Sample, instruction_level, prompt_level
from benchmarks.common.tables import Table, digest, markdown
from benchmarks.real_study.grid import Workshop
from benchmarks.real_study.study import BASE, EQUAL, SFT
from benchmarks.real_study.training import Run

LEVELS = {
    "IFEval [S]I": ("IFEval", "verdicts", instruction_level),
    "IFEval [S]P": ("IFEval", "verdicts", prompt_level),
    "IFEval [L]I": ("IFEval", "loose", instruction_level),
    "Flat [S]I": ("Flat", "verdicts", instruction_level),
    "IFBench [S]I": ("IFBench", "verdicts", instruction_level),
    "IFBench [L]P": ("IFBench", "loose", prompt_level),
    "Dense [S]I": ("Dense", "verdicts", instruction_level),
    "Dense [S]P": ("Dense", "verdicts", prompt_level),
}
FAULTS = ("unfinished", "repeating", "empty")


@dataclass
class Result:
    """The records of a method on the tests, one per seed; one for the base model."""

    records: list[dict[str, Any]]
    dev: dict[float, float]  # by learning rate; the base model counts as rate 0

    def sets(self, name: str) -> list[dict[str, Any]]:
        return [record["results"]["sets"][name] for record in self.records]

    def has(self, level: str) -> bool:
        return LEVELS[level][0] in self.records[0]["results"]["sets"]

    def level(self, level: str) -> Sample:
        name, kind, reading = LEVELS[level]
        return reading([results[kind] for results in self.sets(name)])

    def fault(self, name: str) -> Sample:
        flags = []
        for record in self.records:
            joined = "".join(results[name] for results in record["results"]["sets"].values())
            flags.append([int(c) for c in joined])
        return Sample(np.array(flags), np.ones(len(flags[0]), dtype=int))

    def mean(self, *path: str) -> float:
        values = []
        for record in self.records:
            value: Any = record
            for name in path:
                value = value[name]
            values.append(value)
        return sum(values) / len(values)


def finished_results(workshop: Workshop) -> dict[str, Result]:
    """The base model and each method all of whose runs are in the ledgers."""
    base_dev = instruction_level([workshop.base_record("dev")["results"]["verdicts"]]).accuracy
    results = {BASE: Result([workshop.base_record("test")], {0.0: base_dev})}
    for method in workshop.study.methods:
        dev, ledger = workshop.dev_scores(method), workshop.ledger(method)
        if len(dev) < len(workshop.study.learning_rates):
            continue
        rate = workshop.chosen_rate(method)
        keys = [workshop.key(Run(method, rate, seed), "test") for seed in range(workshop.study.seeds)]
        if all(key in ledger.records for key in keys):
            results[method] = Result([ledger.records[key] for key in keys], dev)
    return results


class Report:
    def __init__(self, workshop: Workshop):
        self.study = workshop.study
        self.results = finished_results(workshop)
        self.missing = [method for method in self.study.methods if method not in self.results]
        self.levels = [level for level in LEVELS if self.results[BASE].has(level)]
        self.commits = sorted({record["commit"] for result in self.results.values() for record in result.records})
        self.rows = {name: len(rows) for name, rows in workshop.splits.items()}
        self.prompts = {name: len(prompts) for name, prompts in workshop.tests.items()}

    def tables(self) -> list[Table]:
        """The tables that are equal, bit for bit, in every run of a study on the same kind of machine."""
        tables = [self._accuracies()]
        tables += [self._differences(reference) for reference in (SFT, EQUAL, BASE) if reference in self.results]
        return [*tables, self._faults(), self._choices()]

    def _accuracies(self) -> Table:
        lines = []
        for method, result in self.results.items():
            trained = method != BASE
            rate = f"{result.records[0]['learning_rate']:.2g}" if trained else ""
            tokens = f"{result.mean('work', 'tokens') / 1e3:.0f}" if trained else ""
            steps = f"{result.mean('work', 'steps'):.0f}" if trained else ""
            lines.append([method, rate, *(_percent(result.level(level)) for level in self.levels), steps, tokens])
        return "Accuracy, %", ["", "lr", *self.levels, "steps", "1000 tokens"], lines

    def _differences(self, reference: str) -> Table:
        lines = []
        for method, result in self.results.items():
            if method == reference:
                continue
            cells = []
            for level in self.levels:
                ours, theirs = result.level(level), self.results[reference].level(level)
                resamples = Resamples.draw(self.study.resamples, self.study.seeds, len(ours.totals))
                low, high = resamples.interval(ours, theirs)
                cells.append(f"{100 * (ours.accuracy - theirs.accuracy):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
            lines.append([method, *cells])
        return f"Difference to {reference}, points, with 95 % intervals", ["", *self.levels], lines

    def _faults(self) -> Table:
        lines = []
        for method, result in self.results.items():
            words = np.mean([results["words"] for name in self.prompts for results in result.sets(name)])
            attention = f"{100 * result.mean('results', 'attention'):.2f}"
            lines.append([method, *(_percent(result.fault(name)) for name in FAULTS), f"{words:.0f}", attention])
        title = "Answers at fault, %, their length, and attention on the constraints of Dense, %"
        return title, ["", *FAULTS, "words", "attention"], lines

    def _choices(self) -> Table:
        rates = sorted({rate for result in self.results.values() for rate in result.dev})
        lines = []
        for method, result in self.results.items():
            lines.append([method, *(f"{100 * result.dev[rate]:.1f}" if rate in result.dev else "" for rate in rates)])
        return (
            "Instructions of dev followed, %, by learning rate, seed 0",
            ["", *(f"{rate:.2g}" for rate in rates)],
            lines,
        )

    def describe(self) -> str:
        study, tests = self.study, ", ".join(f"{count} {name}" for name, count in self.prompts.items())
        return (
            f"{study.rows} training rows of {self.rows['train']}, {study.epochs} epochs, batches of {study.batch}; {study.seeds} seeds of "
            f"rows and order; answers: {study.answers}, at most {study.answer_tokens} tokens; tests: {tests} prompts, greedy, at most "
            f"{study.answer_tokens} tokens; dev: {self.rows['dev']} rows. ±: standard error over seeds; intervals: bootstrap of seeds and "
            f"prompts, {study.resamples} resamples. Not finished: {', '.join(self.missing) or 'none'}. Code: {', '.join(self.commits)}."
        )


def _percent(sample: Sample) -> str:
    error = sample.standard_error
    return f"{100 * sample.accuracy:.1f}" + ("" if np.isnan(error) else f" ± {100 * error:.1f}")


def write_report(workshop: Workshop, file: Path | None) -> None:
    """Print the tables of what is finished, and write them to a Markdown file."""
    report = Report(workshop)
    tables = report.tables()
    for title, columns, rows in tables:
        print_table(title, columns, rows)
    print(f"{report.describe()}\ndigest {digest(tables)}")
    if file:
        text = f"{machine(workshop.device)}\n\n{report.describe()}\n\n{markdown(tables)}\nDigest: {digest(tables)}\n"
        file.write_text(text, encoding="utf-8")
