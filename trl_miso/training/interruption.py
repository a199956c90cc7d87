"""Stop before a NaN or infinite loss reaches the weights, and checkpoint on SIGTERM and Ctrl-C."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object
from transformers import TrainerCallback, TrainerControl

logger = get_logger(__name__)

# Every process holds all weights, and one process alone can save them.
UNSHARDED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite. Raised before it changes the weights."""


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C outside of a step. No `except Exception` of a callback or a scorer may swallow it."""


class TrainingGuard(TrainerCallback):
    """Let all ranks agree on whether a loss is not finite, and on whether a rank received SIGTERM or Ctrl-C (SIGINT).

    After a signal the current step is finished, a checkpoint is saved and training stops, with `ending` set. Before the first step, and in
    evaluations, there is no step to finish: `Interrupted` is raised at once. With several ranks, an evaluation ends at the next batch, on
    all ranks together. A second Ctrl-C ends the process at once.

    Attributes:
        ending: The number of the signal that ends training, once all ranks know; 0 for none.
        has_stepped: Whether a step has begun.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._rows: list[torch.Tensor | None] = []  # numbers of the raw rows in each batch of the current step
        self._received = 0  # the signal that this process received
        self._handles = False
        self._may_raise = False
        self.ending = 0
        self.has_stepped = False
        self._has_gradients = False  # or it was said that they are zero

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT within the block instead of ending the process.

        Does nothing for a signal that the script handles itself, or outside the main thread, where Python allows no handlers.
        """
        self._received = self.ending = 0
        self.has_stepped = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        defaults: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
        ours = [number for number, default in defaults.items() if signal.getsignal(number) is default]
        process = os.getpid()

        def receive(number: int, frame: Any) -> None:
            if os.getpid() != process or (number == signal.SIGINT and self._received):
                # A data worker inherits this handler when it is forked, and has to end. So has a process that is told twice.
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._received = number
            self._raise_if_received()
            again = " A second Ctrl-C ends at once." if number == signal.SIGINT else ""
            logger.warning(
                f"Received {signal.Signals(number).name}: finishing the step, then saving a checkpoint.{again}"
            )

        for number in ours:
            signal.signal(number, receive)
        self._handles = self._may_raise = True
        try:
            yield
        finally:
            self._handles = self._may_raise = False
            for number in ours:
                signal.signal(number, defaults[number])
        if self._received and not self.ending:  # after the last step, which was the last to check
            os.kill(process, self._received)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Raise `Interrupted` as soon as a signal comes within the block. With several ranks, see `leave_if_told`."""
        if not self._handles or self._accelerator.num_processes > 1:
            yield
            return
        before, self._may_raise = self._may_raise, True
        try:
            self._raise_if_received()
            yield
        finally:
            self._may_raise = before

    def _raise_if_received(self) -> None:
        if self._received and self._may_raise and not self.ending:
            self.ending = self._received
            raise Interrupted

    def _agree(self) -> bool:
        """Whether some rank received a signal. All ranks have to call this together."""
        received = self._received
        if self._accelerator.num_processes > 1:
            every = self._accelerator.gather(torch.tensor([received], device=self._accelerator.device))
            received = int(every.max())
        self.ending = self.ending or received
        return bool(self.ending)

    def check_loss(self, loss: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Check a batch before its backward pass. `rows` are the numbers of its raw rows, if known.

        Raises:
            NonFiniteError: On all ranks, if the loss of one rank is not finite.
        """
        self._rows.append(rows)
        non_finite = ~loss.detach().isfinite().all()
        if self._accelerator.num_processes > 1:
            non_finite = self._accelerator.reduce(non_finite.float(), reduction="sum")
        if non_finite:
            is_own = bool(~loss.detach().isfinite().all())
            got = f"a loss of {loss.item()}" if is_own else "a non-finite loss"
            raise NonFiniteError(self._message(got, is_own, self._rows[-1:]))

    def check_gradients(self, norm: Any) -> None:
        """Raise NonFiniteError if the norm of all ranks' gradients is not finite."""
        if norm is None:
            return
        if not self._has_gradients and not torch.as_tensor(norm).any():
            logger.warning(
                "The gradients of the first step are all zero: it changes no weight. Look at which parameters require a gradient, "
                "and at the labels (trl-miso preview)."
            )
        self._has_gradients = True
        if not torch.isfinite(torch.as_tensor(norm)).all():
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

    def on_train_begin(
        self, args: Any, state: Any, control: TrainerControl, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Raise ValueError for an optimizer that would change nothing. Sharded, it holds parameters of its own."""
        if self._accelerator.distributed_type not in UNSHARDED or optimizer is None:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(p.requires_grad and id(p) in held for p in model.parameters()):
            raise ValueError(
                "Got an optimizer that holds none of the parameters to train, expected some: nothing would be trained. Fix: make the "
                "optimizer from trainer.model.parameters(), after the adapters are added."
            )

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._may_raise = False
        self.has_stepped = True
        self._rows = []

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self._agree():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be no time for it

    def on_prediction_step(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.leave_if_told()

    def leave_if_told(self) -> None:
        """Raise `Interrupted` on all ranks if one of several received a signal. All ranks have to call this together."""
        if self._handles and self._accelerator.num_processes > 1 and self._agree():
            raise Interrupted

    def on_save(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self._agree():
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.ending:  # saved already, at the end of the step
            control.should_save = control.should_evaluate = False
