"""A readout as plain data: each reading beside standard inference, with paired intervals over rows, and what they say in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trl_miso.readout.losses import STANDARD, RowLoss
from trl_miso.readout.rows import PreparedRow, SampledRows
from trl_miso.report.relation import LEAST

_RESAMPLES = 2000


def compare(values: Mapping[str, Sequence[float]], totals: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Compare readings with standard inference by values summed over rows.

    A reading's value is `sum(values) / sum(totals)`: each token, or each constraint, counts the same. The 95 % interval of its
    difference to standard inference is a bootstrap over rows: rows are drawn with replacement 2,000 times with a fixed seed, each
    time the same rows for both readings (hence paired), and the interval has the 2.5 and 97.5 percentiles of the differences.

    Args:
        values: By reading one value per row, `"standard"` among them.
        totals: The tokens or constraints of each row.

    Returns:
        By reading `value`, `difference`, and `interval`, which is None below 10 rows; the last two are None for `"standard"`.
    """
    total = np.asarray(totals, dtype=float)
    rows = len(total)
    draws = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=_RESAMPLES)
    drawn_totals = draws @ total
    base = np.asarray(values[STANDARD], dtype=float)
    compared = {}
    for name, by_row in values.items():
        value = np.asarray(by_row, dtype=float)
        line: dict[str, Any] = {"value": float(value.sum() / total.sum()), "difference": None, "interval": None}
        if name != STANDARD:
            change = value - base
            line["difference"] = float(change.sum() / total.sum())
            if rows >= LEAST:
                line["interval"] = np.quantile(draws @ change / drawn_totals, [0.025, 0.975]).tolist()
        compared[name] = line
    return compared


def summarize(
    sampled: SampledRows,
    rows: Sequence[PreparedRow],
    losses: dict[str, list[RowLoss]],
    refused: dict[str, str],
    verdicts: dict[str, list[list[bool]]] | None = None,
    refused_answers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The readout as plain data, JSON-compatible.

    Args:
        losses, refused: From `losses.read_answers`.
        verdicts: By reading and row one verdict per constraint on the model's own answer; None if none were generated.
        refused_answers: The readings under which none could be generated, with the reason.
    """
    tokens = [loss.tokens for loss in losses[STANDARD]]
    by_reading = {name: [loss.nll for loss in of_rows] for name, of_rows in losses.items()}
    correct = {name: [loss.correct for loss in of_rows] for name, of_rows in losses.items()}
    left_out = {}
    for reason, numbers in sampled.left_out.items():
        left_out[reason] = {"rows": len(numbers), "first_row": min(numbers)}
    data: dict[str, Any] = {
        "rows": {"looked_at": sampled.read, "read": len(rows), "left_out": left_out},
        "contexts": float(np.mean([len(row.parallel.contexts) for row in rows])),
        "tokens": sum(tokens),
        "loss": compare(by_reading, tokens),
        "accuracy": compare(correct, tokens),
        "refused": refused,
        "followed": None,
        "refused_answers": refused_answers or {},
        "by_row": {
            "row": [row.number for row in rows],
            "contexts": [len(row.parallel.contexts) for row in rows],
            "tokens": tokens,
            "nll": by_reading,
            "correct": correct,
        },
    }
    if verdicts is not None:
        constraints = [len(of_row) for of_row in verdicts[STANDARD]]
        followed = {name: [sum(of_row) for of_row in of_rows] for name, of_rows in verdicts.items()}
        data["constraints"] = sum(constraints)
        data["followed"] = compare(followed, constraints)
        data["by_row"] |= {"constraints": constraints, "followed": followed}
    data["in_words"] = in_words(data)
    return data


def in_words(data: dict[str, Any]) -> str:
    """One sentence on a readout. It claims a difference only where the interval excludes 0."""
    if data["rows"]["read"] < LEAST:
        return f"With {data['rows']['read']} rows, fewer than {LEAST}, no difference to standard inference is claimed."
    clauses = [f"the loss of the rows' answers is {_groups(data['loss'])}"]
    if data["followed"]:
        subject = "the number of constraints that the model's own answers follow is"
        clauses.append(f"{subject} {_groups(data['followed'])}")
    return f"Compared with standard inference, on rows like these, {'; '.join(clauses)}."


def _groups(compared: dict[str, dict[str, Any]]) -> str:
    """The readings by where their interval lies: below 0, above 0, or around it."""
    groups: dict[str, list[str]] = {"lower": [], "higher": [], "not clearly different": []}
    for name, line in compared.items():
        if line["interval"] is None:
            continue
        low, high = line["interval"]
        if high < 0:
            groups["lower"].append(name)
        elif low > 0:
            groups["higher"].append(name)
        else:
            groups["not clearly different"].append(name)
    return _listed([f"{what} under {_listed(names)}" for what, names in groups.items() if names])


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
