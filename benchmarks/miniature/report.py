"""The study's tables, as Markdown and as numbers, and its figure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.statistics import Resamples, Sample, instruction_level, prompt_level, with_constraints
from benchmarks.common.tables import Table
from benchmarks.miniature.evaluate import SETS
from benchmarks.miniature.grid import Grid
from benchmarks.miniature.study import BASE, METHODS, SFT
from benchmarks.miniature.training import Run

LEVELS = {
    "IFE I": ("IFE", instruction_level),
    "IFE P": ("IFE", prompt_level),
    "Flat": ("Flat", instruction_level),
    "Dense I": ("Dense", instruction_level),
    "Dense P": ("Dense", prompt_level),
}
COUNTS = range(1, 8)
REFERENCES = (SFT, "SFT, twice the epochs")


@dataclass
class Result:
    """A method's runs at its learning rate and their records on the test split, one per seed; for the base model one record."""

    runs: list[Run]
    records: list[dict[str, Any]]
    works: list[dict[str, float]]
    dev: dict[float, float]  # dev score by learning rate; the base model counts as rate 0
    quickest: dict[str, float]  # the quickest work over all learning rates, which all cost the same

    def verdicts(self, name: str) -> list[list[str]]:
        return [record["sets"][name]["verdicts"] for record in self.records]

    def level(self, level: str) -> Sample:
        name, reading = LEVELS[level]
        return reading(self.verdicts(name))

    def counted(self, count: int) -> Sample:
        """Constraints satisfied in the IFE and Dense prompts with `count` constraints."""
        both = [few + dense for few, dense in zip(self.verdicts("IFE"), self.verdicts("Dense"), strict=True)]
        return instruction_level(with_constraints(both, count))

    def malformed(self, name: str) -> Sample:
        flags = [record["sets"][name]["malformed"] for record in self.records]
        return Sample(np.array([[int(c) for c in seed] for seed in flags]), np.ones(len(flags[0]), dtype=int))

    def mass(self, name: str) -> list[float]:
        return [record["sets"][name]["mass"] for record in self.records]


class Report:
    """The results of a finished grid, as tables, numbers and a figure."""

    def __init__(self, grid: Grid):
        study = grid.workshop.study
        self.resamples, self.seeds = study.resamples, study.seeds
        self.base = Result([], [grid.record(None, "test")], [], {0.0: grid.dev_score(None)}, {})
        self.mixes: dict[str, dict[str, Result]] = {mix: {} for mix in study.methods}
        for (mix, method), runs in study.groups().items():
            best = grid.chosen(runs)
            records = [grid.record(run, "test") for run in best]
            works = [grid.record(run, "dev")["work"] for run in best]
            quickest = min((grid.record(run, "dev")["work"] for run in runs), key=lambda work: work["seconds"])
            self.mixes[mix][method] = Result(best, records, works, grid.dev_scores(runs), quickest)

    def interval(self, sample: Sample, other: Sample | None = None) -> tuple[float, float]:
        return Resamples.draw(self.resamples, self.seeds, len(sample.totals)).interval(sample, other)

    def tables(self) -> list[Table]:
        """The tables that are equal, bit for bit, in every run of a study on the same machine."""
        tables = []
        for mix, methods in self.mixes.items():
            rows = {BASE: self.base} | methods
            tables.append(_accuracies(f"Accuracy, %, {mix}", rows))
            tables.append(_counts(f"Constraints satisfied, %, by their number in the prompt, {mix}", rows))
            tables.append(_behaviour(f"Malformed answers, %, and attention on the constraints, %, {mix}", rows))
            for reference in REFERENCES:
                if reference in methods:
                    title = f"Difference to {reference}, points, with 95 % intervals, {mix}"
                    tables.append(self._differences(title, rows, reference))
            tables.append(_choices(f"Mean of dev IFE I and Dense I, %, by learning rate, {mix}", rows))
        return tables

    def costs(self) -> list[Table]:
        """Tables of seconds, which differ between runs. A method's quickest run is the one that other work disturbed least."""
        tables = []
        for mix, methods in self.mixes.items():
            rows = []
            for method, result in methods.items():
                seconds, tokens = result.quickest["seconds"], result.quickest["tokens"]
                rows.append([method, f"{seconds:.1f}", f"{1e6 * seconds / tokens:.0f}"])
            title = f"Seconds of training, a method's quickest run, {mix}"
            tables.append((title, ["", "seconds", "ms/1000 tokens"], rows))
        return tables

    def _differences(self, title: str, rows: dict[str, Result], reference: str) -> Table:
        lines = []
        for method, result in rows.items():
            if method == reference:
                continue
            cells = []
            for level in LEVELS:
                ours, theirs = result.level(level), rows[reference].level(level)
                low, high = self.interval(ours, theirs)
                cells.append(f"{100 * (ours.accuracy - theirs.accuracy):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
            lines.append([method, *cells])
        return title, ["", *LEVELS], lines

    def numbers(self) -> dict[str, Any]:
        """All figures of the tables and the picture, unrounded."""
        numbers: dict[str, Any] = {}
        for mix, methods in self.mixes.items():
            rows = {BASE: self.base} | methods
            numbers[mix] = {method: self._numbers(result, methods.get(SFT)) for method, result in rows.items()}
        return numbers

    def _numbers(self, result: Result, reference: Result | None) -> dict[str, Any]:
        samples = {level: result.level(level) for level in LEVELS}
        samples |= {f"{count} constraints": result.counted(count) for count in COUNTS}
        samples |= {f"malformed {name}": result.malformed(name) for name in SETS}
        differences = None
        if reference:
            differences = {level: self._difference(samples[level], reference.level(level)) for level in LEVELS}
        return {
            "learning_rate": result.runs[0].learning_rate if result.runs else None,
            "dev": result.dev,
            "accuracy": {name: self._sample(sample) for name, sample in samples.items()},
            "difference_to_sft": differences,
            "mass": {name: result.mass(name) for name in SETS},
            "work": result.works,
        }

    def _sample(self, sample: Sample) -> dict[str, Any]:
        error = sample.standard_error
        return {
            "mean": sample.accuracy,
            "by_seed": sample.by_seed.tolist(),
            "standard_error": None if np.isnan(error) else error,
            "interval": self.interval(sample),
        }

    def _difference(self, sample: Sample, other: Sample) -> dict[str, Any]:
        return {"mean": sample.accuracy - other.accuracy, "interval": self.interval(sample, other)}

    def draw(self, file: Path) -> None:
        """Draw accuracy by number of constraints with 95 % intervals, one panel per mix. Needs matplotlib."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, panels = pyplot.subplots(
            1, len(self.mixes), figsize=(7.5 * len(self.mixes), 5), sharey=True, squeeze=False
        )
        for panel, (mix, methods) in zip(panels[0], self.mixes.items(), strict=True):
            rows = {BASE: self.base} | methods
            for i, (method, result) in enumerate(rows.items()):
                samples = [result.counted(count) for count in COUNTS]
                means = np.array([sample.accuracy for sample in samples])
                bounds = np.array([self.interval(sample) for sample in samples]).T
                color = "black" if method == BASE else pyplot.get_cmap("tab20")(list(METHODS).index(method))
                panel.errorbar(
                    np.array(COUNTS) + 0.04 * (i - len(rows) / 2),
                    100 * means,
                    yerr=100 * np.abs(bounds - means),
                    color=color,
                    marker="o",
                    markersize=3,
                    linewidth=1.2,
                    elinewidth=0.6,
                    label=method,
                )
            panel.set(title=mix, xlabel="constraints in the prompt", ylabel="satisfied, %")
            panel.legend(fontsize=7, ncols=2)
        figure.tight_layout()
        figure.savefig(file, dpi=130, metadata={"Software": None})
        pyplot.close(figure)


def _accuracies(title: str, rows: dict[str, Result]) -> Table:
    lines = []
    for method, result in rows.items():
        rate = f"{result.runs[0].learning_rate:.2g}" if result.runs else ""
        tokens = f"{_mean(result.works, 'tokens') / 1e3:.0f}" if result.works else ""
        lines.append([method, rate, *(_percent(result.level(level)) for level in LEVELS), tokens])
    return title, ["", "lr", *LEVELS, "1000 tokens"], lines


def _counts(title: str, rows: dict[str, Result]) -> Table:
    lines = [[method, *(_percent(result.counted(count)) for count in COUNTS)] for method, result in rows.items()]
    return title, ["", *map(str, COUNTS)], lines


def _behaviour(title: str, rows: dict[str, Result]) -> Table:
    lines = []
    for method, result in rows.items():
        malformed = [_percent(result.malformed(name)) for name in SETS]
        attention = [f"{100 * sum(result.mass(name)) / len(result.mass(name)):.1f}" for name in SETS]
        lines.append([method, *malformed, *attention])
    return title, ["", *(f"malformed {name}" for name in SETS), *(f"attention {name}" for name in SETS)], lines


def _choices(title: str, rows: dict[str, Result]) -> Table:
    rates = sorted({rate for result in rows.values() for rate in result.dev})
    lines = []
    for method, result in rows.items():
        lines.append([method, *(f"{100 * result.dev[rate]:.1f}" if rate in result.dev else "" for rate in rates)])
    return title, ["", *(f"{rate:.2g}" for rate in rates)], lines


def _percent(sample: Sample) -> str:
    error = sample.standard_error
    return f"{100 * sample.accuracy:.1f}" + ("" if np.isnan(error) else f" ± {100 * error:.1f}")


def _mean(works: list[dict[str, float]], name: str) -> float:
    return sum(work[name] for work in works) / len(works)
