"""Accuracies over seeds and prompts, and how far others could have been: a bootstrap of both."""

from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True)
class Sample:
    """What was achieved, (seeds, prompts), of what could be, (prompts,)."""

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
        """Of the mean over seeds; nan for one seed."""
        seeds = len(self.hits)
        return float(self.by_seed.std(ddof=1) / seeds**0.5) if seeds > 1 else float("nan")


@dataclass(frozen=True)
class Resamples:
    """How often each seed (resamples, seeds) and each prompt (resamples, prompts) was drawn, both with replacement."""

    seeds: np.ndarray
    prompts: np.ndarray

    @classmethod
    @cache
    def draw(cls, count: int, seeds: int, prompts: int, seed: int = 0) -> "Resamples":
        rng = np.random.default_rng(seed)
        return cls(*(rng.multinomial(n, np.full(n, 1 / n), size=count) for n in (seeds, prompts)))

    def accuracies(self, sample: Sample) -> np.ndarray:
        """The accuracy in each resample. A sample of one seed (the base model's) has it as often as others have seeds."""
        hits = sample.hits if len(sample.hits) > 1 else np.repeat(sample.hits, self.seeds.shape[1], 0)
        reached = ((self.seeds @ hits) * self.prompts).sum(1)
        return reached / (self.seeds.sum(1) * (self.prompts @ sample.totals))

    def interval(self, sample: Sample, other: Sample | None = None) -> tuple[float, float]:
        """95 % of the accuracies, or of the differences to the `other` sample's, paired by seed and prompt."""
        values = self.accuracies(sample) - (0.0 if other is None else self.accuracies(other))
        low, high = np.quantile(values, [0.025, 0.975])
        return float(low), float(high)


def instruction_level(verdicts: list[list[str]]) -> Sample:
    """From a list a seed of strings a prompt: constraints satisfied of all constraints."""
    hits = [[prompt.count("1") for prompt in seed] for seed in verdicts]
    return Sample(np.array(hits), np.array([len(prompt) for prompt in verdicts[0]]))


def prompt_level(verdicts: list[list[str]]) -> Sample:
    """Prompts all of whose constraints are satisfied."""
    hits = [["0" not in prompt for prompt in seed] for seed in verdicts]
    return Sample(np.array(hits, dtype=int), np.ones(len(verdicts[0]), dtype=int))


def with_constraints(verdicts: list[list[str]], count: int) -> list[list[str]]:
    """The prompts with that many constraints."""
    return [[prompt for prompt in seed if len(prompt) == count] for seed in verdicts]
