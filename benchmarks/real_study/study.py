"""Methods of the study, and everything else that determines its tables."""

from dataclasses import dataclass, replace
from typing import Any

BASE, SFT, EQUAL = "base", "SFT", "SFT, equal tokens"


@dataclass(frozen=True)
class Method:
    """MISOSFTConfig options, and a training signal of `signals.py`, if any.

    `matches`: train on as many tokens as this method does on its rows.
    """

    options: dict[str, Any]
    signal: str | None = None
    matches: str | None = None


METHODS = {
    SFT: Method({"context_mode": "single"}),
    EQUAL: Method({"context_mode": "single"}, matches="para"),
    "para": Method({"context_mode": "para"}),
    "para, full 1/2": Method({"context_mode": "para", "full_context_weight": 0.5}),
    "para, full 3/4": Method({"context_mode": "para", "full_context_weight": 0.75}),
    "para_prob 1/2": Method({"context_mode": "para", "para_prob": 0.5}),
    "fid": Method({"context_mode": "para", "context_weighting": "fid"}),
    "succ": Method({"context_mode": "succ"}),
    "no MISO": Method({"context_mode": "augment"}),
    "both": Method({"context_mode": "para"}, signal="both"),
    "distill": Method({"context_mode": "para"}, signal="distill"),
    "misses": Method({"context_mode": "para"}, signal="misses"),
    "anneal": Method({"context_mode": "para"}, signal="anneal"),
}


@dataclass(frozen=True)
class Study:
    """Sizes of a study.

    Attributes:
        answers: `"own"`: the studied model writes the training answers, at temperature 0.7. `"given"`: those of the file of prompts.
        pool: Prompts that are answered, for all splits together.
        rows: Training rows of a run, drawn from the split `train` by the run's seed.
        learning_rates: One is chosen per method, on the split `dev` with seed 0.
        dev, dense: Rows of these splits.
        ifeval, flat, ifbench: Prompts of IFEval, IFEval-Flatten and IFBench, evenly spaced; None for all, 0 for none.
        attention: Rows of `dense` on which attention on the constraints is measured.
        answer_tokens: Limit of a generated answer, in tests and in training rows, where a longer one ends at its last whole sentence.
        max_prompt_words: Longer prompts are left out.
    """

    answers: str
    pool: int
    rows: int
    batch: int
    epochs: int
    learning_rates: tuple[float, ...]
    seeds: int
    dev: int
    dense: int
    ifeval: int | None
    flat: int | None
    ifbench: int | None
    attention: int
    answer_tokens: int
    methods: tuple[str, ...] = tuple(METHODS)
    max_prompt_words: int = 60
    resamples: int = 2000


# For one large GPU: minutes.
FULL = Study(
    answers="own",
    pool=3500,
    rows=1000,
    batch=8,
    epochs=1,
    learning_rates=(5e-6, 2e-5, 1e-4),
    seeds=5,
    dev=150,
    dense=300,
    ifeval=None,
    flat=None,
    ifbench=None,
    attention=100,
    answer_tokens=320,
)
# For two CPU cores: hours.
SMALL = replace(
    FULL,
    pool=520,
    rows=96,
    batch=4,
    learning_rates=(5e-6, 5e-5),  # of SFT and para, 2e-4 was the worst on dev by 3 points
    seeds=3,
    dev=40,
    dense=72,
    ifeval=96,
    flat=64,
    ifbench=0,  # a model of this size follows hardly any
    attention=24,
    answer_tokens=112,
)
# For two CPU cores with AVX512-BF16: two methods took 44 minutes beside other work. Mostly other training rows than SMALL's.
MEDIUM = replace(SMALL, pool=1040, dense=120, ifeval=None, flat=96)
# For a look at whether everything runs: minutes.
QUICK = replace(
    SMALL,
    pool=36,
    rows=8,
    learning_rates=(1e-4,),
    seeds=1,
    dev=4,
    dense=4,
    ifeval=4,
    flat=4,
    ifbench=4,
    attention=2,
    answer_tokens=48,
    resamples=200,
)
