"""Whether constraints that are followed have more attention: AUC with a bootstrap interval, None where data is too little."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Fewest followed constraints, other constraints, and rows for an interval: with fewer its width would mislead.
LEAST = 10
_DRAWS = 1000


def relation(values: Sequence[float], followed: Sequence[bool], rows: Sequence[int]) -> dict[str, Any]:
    """How well a value separates constraints that are followed from those that are not.

    `auc` is the probability that a followed constraint has the larger value (ties count half): 0.5 is no relation. `auc_in_row`
    compares constraints of the same row only, which removes the influence of the row's difficulty and number of constraints.
    Both come with the 95 % interval of a bootstrap over rows (percentiles of 1,000 draws with a fixed seed).

    Args:
        values: One value per constraint.
        followed: One verdict per constraint.
        rows: The row of each constraint.

    Returns:
        The numbers of `constraints`, of those `followed`, of `rows`, and of rows with both verdicts (`rows_with_both`);
        `mean_followed` and `mean_others`, None for an empty group; `auc` and `auc_in_row` as `[value, low, high]`, None below
        `LEAST`.
    """
    value, is_followed = np.asarray(values, dtype=float), np.asarray(followed, dtype=bool)
    numbers, row = np.unique(np.asarray(rows, dtype=int), return_inverse=True)
    _, rank = np.unique(value, return_inverse=True)

    def all_pairs(counts: np.ndarray) -> tuple[float, float]:
        weight = counts[row]
        return _concordant(rank, weight * is_followed, weight * ~is_followed)

    pairs_in_row = np.zeros((len(numbers), 2))
    for r in range(len(numbers)):
        of_row = row == r
        pairs_in_row[r] = _concordant(rank[of_row], 1.0 * is_followed[of_row], 1.0 * ~is_followed[of_row])
    rows_with_both = int((pairs_in_row[:, 1] > 0).sum())
    is_enough = min(is_followed.sum(), (~is_followed).sum(), len(numbers)) >= LEAST
    auc_in_row = None
    if rows_with_both >= LEAST:
        auc_in_row = _bootstrap(lambda counts: tuple(counts @ pairs_in_row), len(numbers))
    return {
        "constraints": len(value),
        "followed": int(is_followed.sum()),
        "rows": len(numbers),
        "rows_with_both": rows_with_both,
        "mean_followed": float(value[is_followed].mean()) if is_followed.any() else None,
        "mean_others": float(value[~is_followed].mean()) if (~is_followed).any() else None,
        "auc": _bootstrap(all_pairs, len(numbers)) if is_enough else None,
        "auc_in_row": auc_in_row,
    }


def paired_difference(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Mean of `after - before` over rows, with the 95 % interval of a bootstrap over rows; the interval is None below `LEAST`."""
    change = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)

    def mean(counts: np.ndarray) -> tuple[float, float]:
        return float(counts @ change), float(counts.sum())

    interval = _bootstrap(mean, len(change))[1:] if len(change) >= LEAST else None
    return {"rows": len(change), "mean": float(change.mean()), "interval": interval}


def _concordant(rank: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """(pairs in which the positive one ranks higher, pairs), weighted; ties count half."""
    above = np.bincount(rank, positive, rank.max(initial=0) + 1)
    below = np.bincount(rank, negative, rank.max(initial=0) + 1)
    lower = below.cumsum() - below
    return float((above * (lower + below / 2)).sum()), float(positive.sum() * negative.sum())


def _bootstrap(ratio: Callable[[np.ndarray], tuple[float, float]], rows: int) -> list[float]:
    """[value, low, high] of numerator / denominator; draws with denominator 0 (no pair to compare) are left out."""
    generator = np.random.default_rng(0)
    ratios = []
    for _ in range(_DRAWS):
        counts = np.bincount(generator.integers(rows, size=rows), minlength=rows).astype(float)
        top, bottom = ratio(counts)
        if bottom:
            ratios.append(top / bottom)
    top, bottom = ratio(np.ones(rows))
    return [float(x) for x in (top / bottom, *np.percentile(ratios, [2.5, 97.5]))]
