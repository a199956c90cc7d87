"""The methods, and the studies that compare them at several scales."""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.miniature.pretraining import Pretraining, build_model
from benchmarks.miniature.training import Run

BASE, SFT = "base", "SFT"
METHODS: dict[str, dict[str, Any]] = {
    SFT: {"context_mode": "single"},
    "SFT, twice the epochs": {"context_mode": "single"},
    "MISO-para": {"context_mode": "para"},
    "para w.o. full": {"context_mode": "para", "include_full": False},
    "para, full 1/2": {"context_mode": "para", "full_context_weight": 0.5},
    "para, full 3/4": {"context_mode": "para", "full_context_weight": 0.75},
    "para_prob 1/4": {"context_mode": "para", "para_prob": 0.25},
    "para_prob 1/2": {"context_mode": "para", "para_prob": 0.5},
    "MISO-fid": {"context_mode": "para", "context_weighting": "fid"},
    "fid w.o. full": {"context_mode": "para", "context_weighting": "fid", "include_full": False},
    "no MISO": {"context_mode": "augment"},
    "MISO-succ": {"context_mode": "succ"},
}
MIXES = {"mix": 1, "no mix": 0}  # plain rows per row with constraints


@dataclass(frozen=True)
class Study:
    """Everything that determines the tables, except the code and the machine."""

    pretraining: Pretraining
    learning_rates: tuple[float, ...]
    seeds: int
    rows: int
    epochs: int
    batch: int
    dev: tuple[int, int]  # number of IFE and of Dense prompts
    test: tuple[int, int]
    methods: dict[str, tuple[str, ...]]  # per mix
    resamples: int = 2000

    def groups(self) -> dict[tuple[str, str], list[Run]]:
        """By mix and method, the runs among which a learning rate is chosen."""
        groups: dict[tuple[str, str], list[Run]] = {}
        for mix, methods in self.methods.items():
            for method in methods:
                runs = groups[mix, method] = []
                for rate in self.learning_rates:
                    runs += [self._run(mix, method, rate, seed) for seed in range(self.seeds)]
        return groups

    def _run(self, mix: str, method: str, rate: float, seed: int) -> Run:
        epochs = self.epochs * (2 if method == "SFT, twice the epochs" else 1)
        plain = self.rows * MIXES[mix]
        return Run(method, METHODS[method], rate, seed, self.rows, plain, epochs, self.batch)


ALL = tuple(METHODS)
FULL = Study(
    pretraining=Pretraining("1m", steps=2000, batch=64),
    learning_rates=(1.875e-4, 3.75e-4, 7.5e-4, 1.5e-3, 3e-3),
    seeds=5,
    rows=1000,
    epochs=3,
    batch=32,
    dev=(300, 150),
    test=(600, 300),
    methods={"mix": ALL, "no mix": (SFT, "MISO-para", "MISO-fid")},
)
QUICK = replace(
    FULL,
    pretraining=Pretraining("quick", steps=1200, batch=32),
    learning_rates=(7.5e-4, 2e-3),
    seeds=2,
    rows=300,
    dev=(60, 30),
    test=(300, 150),
)
LARGE = replace(
    FULL, pretraining=replace(FULL.pretraining, size="30m", learning_rate=1e-3), learning_rates=(1e-4, 3e-4, 6e-4)
)
SMOKE = replace(
    QUICK,
    pretraining=Pretraining("smoke", steps=20, batch=16),
    learning_rates=(1.5e-3,),
    seeds=1,
    rows=16,
    epochs=1,
    batch=8,
    dev=(9, 5),
    test=(9, 5),
    methods={"mix": ALL},
    resamples=100,
)


def describe(study: Study) -> str:
    """The study in a paragraph, and how to read its tables."""
    base = study.pretraining
    parameters = build_model(base.size, base.seed).num_parameters() / 1e6
    return (
        f"A Llama of {parameters:.2f}M parameters, pretrained on {base.steps} batches of {base.batch} exchanges with 0 to 3 "
        f"constraints; fine-tuned for {study.epochs} epochs on {study.rows} rows with 3 to 7 constraints (mix: and as many rows "
        f"without any), in batches of {study.batch}; {study.seeds} seeds of rows and order, one base model; {study.test[0]} IFE "
        f"and {study.test[1]} Dense prompts. I, P: per constraint, per prompt; ±: standard error over seeds; intervals: bootstrap "
        f"of seeds and prompts, {study.resamples} resamples; attention: that of the texts' tokens, mean over layers and heads."
    )
