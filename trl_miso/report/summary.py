"""The measurements of one model, added up as they arrive, as plain data for the report."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from trl_miso.report.measure import Measurement
from trl_miso.report.prompt_parts import KINDS
from trl_miso.report.relation import paired_difference, relation


class Summary:
    """Summary of one model.

    Kept per row: the mean over the answer by layer, head and part, and the means of the row's constraints and contexts.
    """

    def __init__(self, name: str):
        self.name = name
        self.by_row: dict[int, np.ndarray] = {}  # (L, H, P) float32
        self._rows: list[dict[str, Any]] = []
        self._heads: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
        self._dilution: dict[int, list[dict[str, float | None]]] = defaultdict(list)

    def add(self, measured: Measurement, followed: Sequence[bool | None]) -> None:
        """Add a row.

        Args:
            measured: The row's measurement.
            followed: One verdict per constraint, None where unknown.
        """
        sample, parts = measured.sample, measured.sample.prompted.parts
        self.by_row[sample.index] = measured.parts.astype(np.float32)
        kinds = np.array([part.kind for part in parts])
        for kind, heads in self._heads.items():
            heads.append(measured.parts[..., kinds == kind].sum(-1))
        self._rows.append(
            {
                "row": sample.index,
                "answer": sample.text,
                "parts": _described_parts(measured, followed),
                "mixed": _described_contexts(measured),
            }
        )
        for n, line in measured.dilution.items():
            self._dilution[n].append(line)

    def report(self) -> dict[str, Any]:
        """The summary as values that JSON can hold."""
        masses, densities, followed, rows = [], [], [], []
        for row in self._rows:
            for part in row["parts"]:
                if part["followed"] is not None:
                    masses.append(part["mass"])
                    densities.append(part["mass"] / max(1, part["tokens"]))
                    followed.append(part["followed"])
                    rows.append(row["row"])
        layers = {kind: np.mean(heads, axis=0) for kind, heads in self._heads.items()}  # (L, H)
        return {
            "name": self.name,
            "kinds": {kind: float(np.nanmean(heads)) for kind, heads in layers.items()},
            "layers": {kind: _without_nan(heads) for kind, heads in layers.items()},
            "by_constraints": self._by_constraints(),
            "relation": {
                "mass": relation(masses, followed, rows),
                "mass_per_token": relation(densities, followed, rows),
            },
            "contexts": self._contexts(),
            "dilution": self._dilution_lines(),
            "rows": self._rows,
        }

    def masses(self, kind: str) -> dict[int, float]:
        """The mass of all parts of one kind, by row."""
        return {row["row"]: sum(p["mass"] for p in row["parts"] if p["kind"] == kind) for row in self._rows}

    def _by_constraints(self) -> list[dict[str, Any]]:
        """One line per number of constraints.

        A line has the number of rows; the mean mass of all constraints of a row, of each, of one that is alone in its prompt,
        and of the output; the number of constraints with a verdict (`known`) and of those that are followed.
        """
        groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in self._rows:
            groups[sum(p["kind"] == "constraint" for p in row["parts"])].append(row)
        lines = []
        for count, rows in sorted(groups.items()):
            constraints = [p for row in rows for p in row["parts"] if p["kind"] == "constraint"]
            verdicts = [p["followed"] for p in constraints if p["followed"] is not None]
            mass = sum(p["mass"] for p in constraints) / len(rows)
            mass_alone = sum(p["alone"] for p in constraints) / len(constraints) if count else None
            lines.append(
                {
                    "constraints": count,
                    "rows": len(rows),
                    "mass": mass,
                    "mass_each": mass / count if count else None,
                    "mass_alone": mass_alone,
                    "output": sum(row["parts"][0]["mass"] for row in rows) / len(rows),
                    "known": len(verdicts),
                    "followed": sum(verdicts),
                }
            )
        return lines

    def _contexts(self) -> dict[str, Any] | None:
        """The mean mass by sort of context (full, constraint, bare, other) and the output's mean share; None without such rows."""
        rows = [row["mixed"] for row in self._rows if row["mixed"]]
        if not rows:
            return None
        groups: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            for context in row["contexts"]:
                groups[context["name"].split()[0]].append(context["mass"])
        mass = {name: sum(values) / len(values) for name, values in groups.items()}
        return {"rows": len(rows), "mass": mass, "output_share": sum(row["output_share"] for row in rows) / len(rows)}

    def _dilution_lines(self) -> list[dict[str, Any]]:
        """One line per number of contexts: means over the rows that have so many."""
        lines = []
        for n, rows in sorted(self._dilution.items()):
            line: dict[str, Any] = {"contexts": n, "rows": len(rows)}
            for name in rows[0]:
                shares = [share for row in rows if (share := row[name]) is not None]
                line[name] = sum(shares) / len(shares) if shares else None
            lines.append(line)
        return lines


def compare_summaries(before: Summary, after: Summary) -> dict[str, Any]:
    """The change of each kind's mass over the rows that both models have (a generated answer may not fit)."""
    changes = {}
    for kind in KINDS:
        first, second = before.masses(kind), after.masses(kind)
        common = [row for row in first if row in second]
        changes[kind] = paired_difference([first[row] for row in common], [second[row] for row in common])
    return changes


def _described_parts(measured: Measurement, followed: Sequence[bool | None]) -> list[dict[str, Any]]:
    """One entry per part: its kind, text, number of tokens, mean mass; for a constraint also its mass alone and verdict."""
    sample = measured.sample
    mass = np.nanmean(measured.parts, (0, 1))
    tokens = np.bincount(sample.prompted.owners, minlength=len(sample.prompted.parts))
    tokens[0] += len(sample.answer)  # the answer belongs to the output, the first part
    verdicts, alone = iter(followed), iter(measured.alone)
    entries = []
    for part, size, share in zip(sample.prompted.parts, tokens, mass, strict=True):
        is_constraint = part.kind == "constraint"
        entries.append(
            {
                "kind": part.kind,
                "text": part.text,
                "tokens": int(size),
                "mass": float(share),
                "alone": next(alone) if is_constraint else None,
                "followed": next(verdicts) if is_constraint else None,
            }
        )
    return entries


def _described_contexts(measured: Measurement) -> dict[str, Any] | None:
    """The mean mass of each context and the output's share; None for a row with one context."""
    if measured.branches is None or measured.output is None:
        return None
    masses = np.nanmean(measured.branches, (0, 1)).tolist()
    contexts = [{"name": name, "mass": mass} for name, mass in zip(measured.sample.names, masses, strict=True)]
    return {"contexts": contexts, "output_share": float(np.nanmean(measured.output))}


def _without_nan(heads: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(x) else float(x) for x in layer] for layer in heads]
