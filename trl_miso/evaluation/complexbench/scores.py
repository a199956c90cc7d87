"""Scores of ComplexBench: dependencies, and DRFR, the share of questions that pass, by the columns of the paper's Table 3."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from trl_miso.evaluation.complexbench.instances import Instance

# Of a category's name and depth: whether its questions are the column's. "Selection Avg." is of every category that begins with
# Selection, as the published averages are and as the paper's have to be: MISO-succ's is below all three of Selection's own columns.
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
    "Sel.: Selection; its Avg. includes S&C, Selection & Chain, as in the benchmark's own scores. Last three lines: the paper's, Table 3 of arXiv "
    "2505.11922 (Llama-3-8B; judge qwen-plus-2025-04-28). A judge and its prompt are part of a score: compare your own lines, judged "
    "alike."
)


@dataclass(frozen=True)
class Count:
    """How many questions pass for sure, how many depend on a verdict that is missing, and of how many."""

    passed: int
    unjudged: int
    questions: int

    def bounds(self) -> tuple[float, float] | None:
        """DRFR in percent if all that is unjudged failed, and if it passed; None without a question."""
        if not self.questions:
            return None
        return 100 * self.passed / self.questions, 100 * (self.passed + self.unjudged) / self.questions


def outcomes(instance: Instance, passed: Mapping[tuple[int, int], bool]) -> list[bool | None]:
    """Of each question whether it and all of its dependencies passed; None where this depends on a missing verdict.

    One hop: a dependency counts by its own verdict, whatever it depends on itself, as in the published scores.
    """
    own = [passed.get((instance.main_id, number)) for number in range(len(instance.questions))]
    decisive = (
        [verdict, *(own[at] for at in question.dependencies)]
        for verdict, question in zip(own, instance.questions, strict=True)
    )
    return [False if False in verdicts else None if None in verdicts else True for verdicts in decisive]


def counts(instances: Sequence[Instance], passed: Mapping[tuple[int, int], bool]) -> dict[str, Count]:
    """Of each column; questions are pooled, so that an instance weighs by their number."""
    pooled: dict[str, list[bool | None]] = {column: [] for column in COLUMNS}
    for instance in instances:
        found = outcomes(instance, passed)
        for column, has in COLUMNS.items():
            pooled[column] += found if has(*instance.composition) else []
    return {column: Count(found.count(True), found.count(None), len(found)) for column, found in pooled.items()}


def complexbench_table(name: str, scored: Mapping[str, Count], note: str) -> Table:
    """The scores above the paper's: one line, or, where verdicts are missing, the least and the most that they can be."""
    # In 80 columns, uncut.
    made = Table(title="ComplexBench (%)", box=SIMPLE, padding=0, caption=Text(f"{note} {_CITED}"))
    made.add_column("model", overflow="fold", min_width=12)
    for column in COLUMNS:
        group, _, depth = column.rpartition(" ")
        group = group.replace("Selection & Chain", "S&C").replace("Selection", "Sel.")
        made.add_column(f"{group}\n{depth}", justify="right", no_wrap=True, min_width=5)
    bounds = [count.bounds() for count in scored.values()]
    if scored["All Avg."].unjudged:
        made.add_row(Text(f"{name}, at least"), *_cells([each and each[0] for each in bounds]), style="bold")
        name = f"{name}, at most"
    made.add_row(Text(name), *_cells([each and each[1] for each in bounds]), style="bold", end_section=True)
    for method, percentages in PAPER.items():
        made.add_row(method, *_cells(percentages))
    return made


def _cells(percentages: Sequence[float | None]) -> list[str]:
    return ["-" if value is None else f"{value:.1f}" for value in percentages]
