"""What a run of many days is watched for: a loss or gradient that is no number, and SIGTERM."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl

logger = get_logger(__name__)


class NonFiniteError(FloatingPointError):
    """A loss or gradient was NaN or infinite; raised before the weights are changed by it."""


class TrainingGuard(TrainerCallback):
    """Agrees with all ranks, once a batch, on whether the loss is finite and whether one of them was told to end.

    After SIGTERM the step under way is finished, a checkpoint is saved, and training stops; `terminated` says so.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._rows: list[torch.Tensor | None] = []  # raw rows of each batch of the step
        self._signalled = False
        self.terminated = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take note of SIGTERM instead of dying of it, unless the script has a handler; Python allows one in the main thread only."""
        self._signalled = self.terminated = False
        taken = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        if taken or threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()

        def note(number: int, frame: Any) -> None:
            if os.getpid() != process:  # a data worker, forked with this handler
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._signalled = True

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._signalled and not self.terminated:  # after the last batch, when nothing asks any more
            os.kill(process, signal.SIGTERM)

    def see(self, loss: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Take note of a batch, before its backward.

        Raises:
            NonFiniteError: On every rank, if the loss of one is not finite.
        """
        self._rows.append(rows)
        flags = torch.stack([~loss.detach().isfinite().all(), torch.tensor(self._signalled, device=loss.device)])
        if self._accelerator.num_processes > 1:
            flags = self._accelerator.reduce(flags.float(), reduction="sum")
        broken, signalled = flags.tolist()
        self.terminated |= bool(signalled)
        if broken:
            own = bool(~loss.detach().isfinite().all())
            raise NonFiniteError(self._message(f"a loss of {loss.item()}" if own else "a loss", own, self._rows[-1:]))

    def check_gradients(self, norm: Any) -> None:
        """Raise NonFiniteError if the norm over all ranks' gradients is not finite."""
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)).all():
            raise NonFiniteError(self._message(f"gradients of norm {float(norm)}", True, self._rows))

    def _message(self, got: str, own: bool, rows: list[torch.Tensor | None]) -> str:
        mine = sorted({number for batch in rows if batch is not None for number in batch.tolist()}) if own else []
        numbers = sorted(set(gather_object(mine))) if self._accelerator.num_processes > 1 else mine
        which = f"from rows {numbers} of the training data" if numbers else "from rows without numbers"
        return (
            f"Got {got} {which}, expected a finite one. The weights were not changed by it. Fix: look at these rows (trl-miso "
            "preview), or lower learning_rate, raise warmup_steps or set max_grad_norm if the loss grew before."
        )

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._rows = []

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.terminated:
            logger.warning(f"SIGTERM: saving checkpoint-{state.global_step}, then ending.")
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be no time

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.terminated:
            control.should_save = control.should_evaluate = False
