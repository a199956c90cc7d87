"""Measurements of a model, added up as they come, as plain data for the report."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from trl_miso.report.measure import Measurement
from trl_miso.report.prompt_parts import KINDS
from trl_miso.report.relation import paired_difference, relation


class Summary:
    """Of one model. Of each row it keeps means over the answer: by layer, head and part, and those of its constraints and contexts."""

    def __init__(self, name: str):
        self.name = name
        self.by_row: dict[int, np.ndarray] = {}  # (L, H, P) float32
        self._rows: list[dict[str, Any]] = []
        self._heads: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
        self._dilution: dict[int, list[dict[str, float | None]]] = defaultdict(list)

    def add(self, measured: Measurement, followed: Sequence[bool | None]) -> None:
        sample, parts = measured.sample, measured.sample.prompted.parts
        self.by_row[sample.index] = measured.parts.astype(np.float32)
        kinds = np.array([part.kind for part in parts])
        for kind, heads in self._heads.items():
            heads.append(measured.parts[..., kinds == kind].sum(-1))
        mass = np.nanmean(measured.parts, (0, 1))
        tokens = np.bincount(sample.prompted.owners, minlength=len(parts))
        verdicts, alone = iter(followed), iter(measured.alone)
        described: list[dict[str, Any]] = [
            {
                "kind": part.kind,
                "text": part.text,
                "tokens": int(size),
                "mass": float(share),
                "alone": next(alone) if part.kind == "constraint" else None,
                "followed": next(verdicts) if part.kind == "constraint" else None,
            }
            for part, size, share in zip(parts, tokens, mass, strict=True)
        ]
        described[0]["tokens"] += len(sample.answer)
        mixed = None
        if measured.branches is not None and measured.output is not None:
            of = np.nanmean(measured.branches, (0, 1)).tolist()
            contexts = [{"name": name, "mass": m} for name, m in zip(sample.names, of, strict=True)]
            mixed = {"contexts": contexts, "output_share": float(np.nanmean(measured.output))}
            for n, line in measured.dilution.items():
                self._dilution[n].append(line)
        self._rows.append({"row": sample.index, "answer": sample.text, "parts": described, "mixed": mixed})

    def report(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        told = [(p, row["row"]) for row in self._rows for p in row["parts"] if p["followed"] is not None]
        followed, of = [part["followed"] for part, _ in told], [row for _, row in told]
        mass = [part["mass"] for part, _ in told]
        density = [part["mass"] / max(1, part["tokens"]) for part, _ in told]
        layers = {kind: _mean(heads) for kind, heads in self._heads.items()}
        return {
            "name": self.name,
            "kinds": {kind: float(np.nanmean(heads)) for kind, heads in layers.items()},
            "layers": {kind: _plain(heads) for kind, heads in layers.items()},
            "by_constraints": self._by_constraints(),
            "relation": {"mass": relation(mass, followed, of), "mass_per_token": relation(density, followed, of)},
            "contexts": self._contexts(),
            "dilution": self._diluted(),
            "rows": self._rows,
        }

    def masses(self, kind: str) -> dict[int, float]:
        """Of a kind, by row."""
        return {row["row"]: sum(p["mass"] for p in row["parts"] if p["kind"] == kind) for row in self._rows}

    def _by_constraints(self) -> list[dict[str, Any]]:
        """By the number of constraints: rows, the mass on all of them, on one, on one that is alone, on the output; how many of
        those that are known were followed."""
        groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in self._rows:
            groups[sum(p["kind"] == "constraint" for p in row["parts"])].append(row)
        lines = []
        for count, rows in sorted(groups.items()):
            parts = [p for row in rows for p in row["parts"] if p["kind"] == "constraint"]
            known = [p["followed"] for p in parts if p["followed"] is not None]
            total = sum(p["mass"] for p in parts) / len(rows)
            line = {"constraints": count, "rows": len(rows), "mass": total}
            line["mass_each"] = total / count if count else None
            line["mass_alone"] = sum(p["alone"] for p in parts) / len(parts) if count else None
            line["output"] = sum(row["parts"][0]["mass"] for row in rows) / len(rows)
            lines.append(line | {"known": len(known), "followed": sum(known)})
        return lines

    def _contexts(self) -> dict[str, Any] | None:
        """Mean mass of the full context, of single constraints, of the bare request, of other contexts; and the output's share."""
        rows = [row["mixed"] for row in self._rows if row["mixed"]]
        groups: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            for context in row["contexts"]:
                groups[context["name"].split()[0]].append(context["mass"])
        if not rows:
            return None
        mass = {name: sum(values) / len(values) for name, values in groups.items()}
        return {"rows": len(rows), "mass": mass, "output_share": sum(row["output_share"] for row in rows) / len(rows)}

    def _diluted(self) -> list[dict[str, Any]]:
        """By number of contexts, over the rows that have as many."""
        lines = []
        for n, found in sorted(self._dilution.items()):
            known = {name: [line[name] for line in found if line[name] is not None] for name in found[0]}
            means = {name: sum(values) / len(values) if values else None for name, values in known.items()}  # type: ignore[arg-type]
            lines.append({"contexts": n, "rows": len(found)} | means)
        return lines


def compared(before: Summary, after: Summary) -> dict[str, Any]:
    """The change of each kind's mass, over the rows that both models have (an answer of their own may not fit)."""
    changes = {}
    for kind in KINDS:
        first, second = before.masses(kind), after.masses(kind)
        both = [row for row in first if row in second]
        changes[kind] = paired_difference([first[row] for row in both], [second[row] for row in both])
    return changes


def _mean(heads: list[np.ndarray]) -> np.ndarray:
    """(L, H)"""
    return np.mean(heads, axis=0)


def _plain(heads: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(x) else float(x) for x in layer] for layer in heads]
