"""Stop before a NaN or infinite loss reaches the weights, and checkpoint on SIGTERM."""

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
    """A loss or gradient is NaN or infinite. Raised before it changes the weights."""


class TrainingGuard(TrainerCallback):
    """Let all ranks agree, once per batch, on whether a loss is not finite and whether a rank received SIGTERM.

    After SIGTERM the current step is finished, a checkpoint is saved and training stops, with `terminated` set.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._rows: list[torch.Tensor | None] = []  # numbers of the raw rows in each batch of the current step
        self._signalled = False  # this process received SIGTERM
        self.terminated = False  # a rank received SIGTERM, and all ranks know

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Note SIGTERM within the block instead of ending the process.

        Does nothing if the script has a handler of its own, or outside the main thread, where Python allows no handlers.
        """
        self._signalled = self.terminated = False
        has_handler = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        if has_handler or threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()

        def note(number: int, frame: Any) -> None:
            if os.getpid() != process:  # a data worker inherits this handler when it is forked, and has to end
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._signalled = True

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._signalled and not self.terminated:  # after the last batch, which was the last to check
            os.kill(process, signal.SIGTERM)

    def check_loss(self, loss: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Check a batch before its backward pass. `rows` are the numbers of its raw rows, if known.

        Raises:
            NonFiniteError: On all ranks, if the loss of one rank is not finite.
        """
        self._rows.append(rows)
        flags = torch.stack([~loss.detach().isfinite().all(), torch.tensor(self._signalled, device=loss.device)])
        if self._accelerator.num_processes > 1:
            flags = self._accelerator.reduce(flags.float(), reduction="sum")
        non_finite, signalled = flags.tolist()
        self.terminated |= bool(signalled)
        if non_finite:
            is_own = bool(~loss.detach().isfinite().all())
            got = f"a loss of {loss.item()}" if is_own else "a non-finite loss"
            raise NonFiniteError(self._message(got, is_own, self._rows[-1:]))

    def check_gradients(self, norm: Any) -> None:
        """Raise NonFiniteError if the norm of all ranks' gradients is not finite."""
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)).all():
            raise NonFiniteError(self._message(f"gradients of norm {float(norm)}", True, self._rows))

    def _message(self, got: str, is_own: bool, rows: list[torch.Tensor | None]) -> str:
        """The message, with the row numbers of all ranks where `is_own`. All ranks have to call this together."""
        numbers: set[int] = set()
        if is_own:
            for batch in rows:
                numbers.update([] if batch is None else batch.tolist())
        if self._accelerator.num_processes > 1:
            numbers = set(gather_object(sorted(numbers)))
        source = f"from rows {sorted(numbers)} of the training data" if numbers else "from rows without numbers"
        return (
            f"Got {got} {source}, expected a finite one. It has not changed the weights. Fix: look at these rows (trl-miso preview), "
            "or, if the loss grew before, lower learning_rate, raise warmup_steps or set max_grad_norm."
        )

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._rows = []

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.terminated:
            logger.warning(f"Received SIGTERM: saving checkpoint-{state.global_step}, then ending.")
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be no time for it

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.terminated:  # saved already, at the end of the step
            control.should_save = control.should_evaluate = False
