"""Where a stream resumes: the pass and the step within it, and the gradient that a pass leaves to the next one.

transformers does not know how long a stream is, and resumes as if all steps were made in its first pass. But the `epoch` of
a checkpoint is `pass + steps in the pass / max_steps`, which tells both.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState


def position(state: TrainerState) -> tuple[int, int]:
    """The pass over a stream in which training continues from a checkpoint's state, and the steps made in that pass."""
    epoch = state.epoch or 0.0
    passes = math.floor(epoch)
    if epoch == passes and state.global_step >= state.max_steps:  # all steps of the run were made in one pass
        return max(passes - 1, 0), state.max_steps if passes else 0
    return passes, round((epoch - passes) * state.max_steps)


class StreamPasses(TrainerCallback):
    """Keep a run's state such that `position` is right also between two passes over a stream.

    A pass that ends with a step counts as over, also in a checkpoint of its end: its evaluation is not made twice. Batches
    after the last step of a pass (fewer than `gradient_accumulation_steps`) belong to the next pass's first step. No
    checkpoint holds their gradient, so a resumed run computes it again, with the random numbers that it was made with.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._before_step: list[Any] | None = None  # random numbers; None unless a step has begun and not ended

    @property
    def is_stream(self) -> bool:
        return isinstance(self._trainer.train_dataset, IterableDataset)

    @contextmanager
    def random_state(self) -> Iterator[None]:
        """Within the block, random numbers are as they were before the batches whose step is still to come, if any."""
        if self._before_step is None:
            yield
            return
        now = _random_state()
        _set_random_state(self._before_step)
        try:
            yield
        finally:
            _set_random_state(now)

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._before_step = None

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_stream and self._before_step is None and args.gradient_accumulation_steps > 1:
            self._before_step = _random_state()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._before_step = None

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_stream and self._before_step is None and not control.should_training_stop:
            state.epoch = float(math.floor(state.epoch or 0.0) + 1)


def _random_state() -> list[Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda]


def _set_random_state(state: list[Any]) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
