"""Do constraints that are followed have more attention? With how much certainty, and when there is too little to say."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LEAST = 10  # of followed constraints, of others, and of rows: with fewer an interval would promise too much
_DRAWS = 1000


def relation(values: Sequence[float], followed: Sequence[bool], rows: Sequence[int]) -> dict[str, Any]:
    """How well a value tells constraints that are followed from those that are not.

    `auc` is the probability that a followed constraint has the larger value (ties count half): 0.5 is no relation. `auc_in_row`
    compares constraints of the same row only, so that neither the row's difficulty nor its number of constraints counts.
    Each with the 95 % interval of a bootstrap over rows (percentiles of 1,000 draws, the same every time).

    Args:
        values: Of each constraint, all of which are known to be followed or not.
        rows: The row that each is of.

    Returns:
        The numbers of `constraints`, of those `followed`, and of `rows`; `mean_followed`, `mean_others` (none where there are
        none); `auc`, `auc_in_row` as `[value, low, high]`, or None where there are too few (`LEAST`).
    """
    value, true = np.asarray(values, dtype=float), np.asarray(followed, dtype=bool)
    numbers, row = np.unique(np.asarray(rows, dtype=int), return_inverse=True)
    _, rank = np.unique(value, return_inverse=True)

    def all_pairs(counts: np.ndarray) -> tuple[float, float]:
        weight = counts[row]
        return _concordant(rank, weight * true, weight * ~true)

    in_row = np.array(
        [_concordant(rank[row == r], 1.0 * true[row == r], 1.0 * ~true[row == r]) for r in range(len(numbers))]
    )
    both = int((in_row.reshape(-1, 2)[:, 1] > 0).sum())
    enough = min(true.sum(), (~true).sum(), len(numbers)) >= LEAST
    return {
        "constraints": len(value),
        "followed": int(true.sum()),
        "rows": len(numbers),
        "rows_with_both": both,
        "mean_followed": float(value[true].mean()) if true.any() else None,
        "mean_others": float(value[~true].mean()) if (~true).any() else None,
        "auc": _bootstrap(all_pairs, len(numbers)) if enough else None,
        "auc_in_row": _bootstrap(lambda counts: tuple(counts @ in_row), len(numbers)) if both >= LEAST else None,
    }


def paired_difference(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Mean of `after - before` over rows, with the 95 % interval of a bootstrap over them, None for fewer than `LEAST`."""
    change = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)

    def mean(counts: np.ndarray) -> tuple[float, float]:
        return float(counts @ change), float(counts.sum())

    interval = _bootstrap(mean, len(change))[1:] if len(change) >= LEAST else None
    return {"rows": len(change), "mean": float(change.mean()), "interval": interval}


def _concordant(rank: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """(pairs in which the positive one ranks higher, pairs), weighted."""
    above = np.bincount(rank, positive, rank.max(initial=0) + 1)
    below = np.bincount(rank, negative, rank.max(initial=0) + 1)
    lower = below.cumsum() - below
    return float((above * (lower + below / 2)).sum()), float(positive.sum() * negative.sum())


def _bootstrap(ratio: Callable[[np.ndarray], tuple[float, float]], rows: int) -> list[float]:
    """[value, low, high] of numerator / denominator; draws without a pair to compare say nothing and are left out."""
    generator = np.random.default_rng(0)
    drawn = (np.bincount(generator.integers(rows, size=rows), minlength=rows).astype(float) for _ in range(_DRAWS))
    found = [top / bottom for top, bottom in map(ratio, drawn) if bottom]
    top, bottom = ratio(np.ones(rows))
    return [float(x) for x in (top / bottom, *np.percentile(found, [2.5, 97.5]))]
