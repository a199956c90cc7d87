"""Scores of ComplexBench: DRFR, the share of questions that pass with their dependencies, per column of the paper's Table 3."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from trl_miso.evaluation.complexbench.instances import Instance

# Per column: whether it counts the questions of a category (name, depth). "Selection Avg." counts every category that begins with
# Selection, as the published averages do. The paper's must too: MISO-succ's average is below all three of its Selection columns.
COLUMNS: dict[str, Callable[[str, int], bool]] = {
    "And 1": lambda name, depth: name == "And",
    "Chain 1": lambda name, depth: name == "Chain" and depth == 1,
    "Chain 2": lambda name, depth: name == "Chain" and depth == 2,
    "Chain Avg.": lambda name, depth: name == "Chain",
    "Selection 1": lambda name, depth: name == "Selection" and depth == 1,
    "Selection 2": lambda name, depth: name == "Selection" and depth == 2,
    "Selection ≥3": lambda name, depth: name == "Selection" and depth >= 3,
    "Selection Avg.": lambda name, depth: name.split("_")[0] == "Selection",
    "Selection & Chain 2": lambda name, depth: name == "Selection_and_Chain" and depth == 2,
    "Selection & Chain ≥3": lambda name, depth: name == "Selection_and_Chain" and depth >= 3,
    "All Avg.": lambda name, depth: True,
}

# Table 3 of arXiv 2505.11922, as printed, in the order of COLUMNS.
PAPER = {
    "Base": (23.0, 10.7, 13.4, 12.7, 12.4, 12.2, 16.2, 12.2, 7.6, 10.6, 16.3),
    "SFT": (60.9, 36.1, 40.0, 39.1, 32.6, 40.6, 37.7, 36.3, 42.7, 22.9, 46.0),
    "MISO-succ": (64.5, 39.3, 42.9, 42.1, 37.3, 39.2, 38.1, 36.5, 42.0, 24.4, 48.2),
}
_CITED = (
    "Sel.: Selection. S&C: Selection & Chain, which the Avg. of Sel. includes, as in the benchmark's own scores. Last three lines: the paper's, "
    "Table 3 of arXiv 2505.11922 (Llama-3-8B; judge qwen-plus-2025-04-28). Scores depend on the judge and its prompt: compare only "
    "lines of your own that have the same judge."
)


@dataclass(frozen=True)
class Count:
    """Numbers of questions that pass, of questions that depend on a missing verdict, and of all questions."""

    passed: int
    unjudged: int
    questions: int

    def bounds(self) -> tuple[float, float] | None:
        """Return DRFR in percent if all unjudged questions failed, and if all passed; None if there is no question."""
        if not self.questions:
            return None
        return 100 * self.passed / self.questions, 100 * (self.passed + self.unjudged) / self.questions


def outcomes(instance: Instance, passed: Mapping[tuple[int, int], bool]) -> list[bool | None]:
    """Return per question whether it and its dependencies passed; None if that depends on a missing verdict.

    Dependencies go one step, as in the published scores: a dependency counts by its own verdict, not by its own dependencies.

    Args:
        passed: Verdicts by main_id and number of the question.
    """
    verdicts = [passed.get((instance.main_id, number)) for number in range(len(instance.questions))]
    results: list[bool | None] = []
    for verdict, question in zip(verdicts, instance.questions, strict=True):
        decisive = [verdict] + [verdicts[number] for number in question.dependencies]
        if False in decisive:
            results.append(False)
        elif None in decisive:
            results.append(None)
        else:
            results.append(True)
    return results


def counts(instances: Sequence[Instance], passed: Mapping[tuple[int, int], bool]) -> dict[str, Count]:
    """Count the outcomes per column. Questions are pooled: an instance weighs by its number of questions."""
    pooled: dict[str, list[bool | None]] = {column: [] for column in COLUMNS}
    for instance in instances:
        results = outcomes(instance, passed)
        for column, counts_category in COLUMNS.items():
            if counts_category(*instance.composition):
                pooled[column] += results
    return {column: Count(results.count(True), results.count(None), len(results)) for column, results in pooled.items()}


def complexbench_table(name: str, scored: Mapping[str, Count], note: str) -> Table:
    """Lay out the scores above the paper's rows: one row, or, if verdicts are missing, two rows with their bounds."""
    # Without padding the table fits into 80 columns.
    table = Table(title="ComplexBench (%)", box=SIMPLE, padding=0, caption=Text(f"{note} {_CITED}"))
    table.add_column("model", overflow="fold", min_width=12)
    for column in COLUMNS:
        group, _, depth = column.rpartition(" ")
        group = group.replace("Selection & Chain", "S&C").replace("Selection", "Sel.")
        table.add_column(f"{group}\n{depth}", justify="right", no_wrap=True, min_width=5)
    bounds = [count.bounds() for count in scored.values()]
    least = [None if bound is None else bound[0] for bound in bounds]
    most = [None if bound is None else bound[1] for bound in bounds]
    if scored["All Avg."].unjudged:
        table.add_row(Text(f"{name}, at least"), *_cells(least), style="bold")
        name = f"{name}, at most"
    table.add_row(Text(name), *_cells(most), style="bold", end_section=True)
    for method, percentages in PAPER.items():
        table.add_row(method, *_cells(percentages))
    return table


def _cells(percentages: Sequence[float | None]) -> list[str]:
    return ["-" if value is None else f"{value:.1f}" for value in percentages]
