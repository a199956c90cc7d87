"""Accuracies over seeds and prompts, with intervals by a bootstrap of both."""

from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True)
class Sample:
    """Points reached, `hits` (seeds, prompts), of the points possible, `totals` (prompts,)."""

    hits: np.ndarray
    totals: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.hits.sum() / (len(self.hits) * self.totals.sum()))

    @property
    def by_seed(self) -> np.ndarray:
        return self.hits.sum(1) / self.totals.sum()

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over seeds; nan for one seed."""
        seeds = len(self.hits)
        return float(self.by_seed.std(ddof=1) / seeds**0.5) if seeds > 1 else float("nan")


@dataclass(frozen=True)
class Resamples:
    """How often each resample drew each seed (resamples, seeds) and each prompt (resamples, prompts), with replacement."""

    seeds: np.ndarray
    prompts: np.ndarray

    @classmethod
    @cache
    def draw(cls, count: int, seeds: int, prompts: int, seed: int = 0) -> "Resamples":
        rng = np.random.default_rng(seed)
        return cls(*(rng.multinomial(n, np.full(n, 1 / n), size=count) for n in (seeds, prompts)))

    def accuracies(self, sample: Sample) -> np.ndarray:
        """The accuracy per resample. A sample of one seed, as the base model's, is repeated for every seed."""
        hits = sample.hits if len(sample.hits) > 1 else np.repeat(sample.hits, self.seeds.shape[1], 0)
        reached = ((self.seeds @ hits) * self.prompts).sum(1)
        return reached / (self.seeds.sum(1) * (self.prompts @ sample.totals))

    def interval(self, sample: Sample, other: Sample | None = None) -> tuple[float, float]:
        """95 % interval of the accuracy, or of its difference to the `other` sample's, paired by seed and prompt."""
        values = self.accuracies(sample) - (0.0 if other is None else self.accuracies(other))
        low, high = np.quantile(values, [0.025, 0.975])
        return float(low), float(high)


def instruction_level(verdicts: list[list[str]]) -> Sample:
    """Constraints satisfied, of all constraints. `verdicts[seed][prompt]` has one character, 0 or 1, per constraint."""
    hits = [[prompt.count("1") for prompt in seed] for seed in verdicts]
    return Sample(np.array(hits), np.array([len(prompt) for prompt in verdicts[0]]))


def prompt_level(verdicts: list[list[str]]) -> Sample:
    """Prompts with all constraints satisfied, of all prompts."""
    hits = [["0" not in prompt for prompt in seed] for seed in verdicts]
    return Sample(np.array(hits, dtype=int), np.ones(len(verdicts[0]), dtype=int))


def with_constraints(verdicts: list[list[str]], count: int) -> list[list[str]]:
    """The verdicts on prompts with `count` constraints."""
    return [[prompt for prompt in seed if len(prompt) == count] for seed in verdicts]
