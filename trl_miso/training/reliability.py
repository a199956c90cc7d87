"""A Trainer layer for long runs: resuming, signals, NaN, and streams. It knows nothing of MISO."""

import os
import signal
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import IterableDataset
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from trl_miso.data.mapping import UnshardedStream
from trl_miso.training.checkpoints import AtomicCheckpoints, how_to_continue, resumable
from trl_miso.training.interruption import UNSHARDED, Interrupted, NonFiniteError, TrainingGuard
from trl_miso.training.kept_settings import changed_settings, settings_of
from trl_miso.training.streams import StreamPasses, position

logger = get_logger(__name__)


class ReliableTrainer(AtomicCheckpoints):
    """Mixin for a Trainer: a run that is interrupted loses no more than the steps since its last checkpoint.

    It stands before the Trainer and before all mixins that extend `_save_checkpoint`, `_push_from_checkpoint` or
    `compute_loss`, since it wraps what they do: a checkpoint is complete before it is pushed, and a loss is checked after
    it is computed.

    Attributes:
        terminated: Whether training stops because of SIGTERM or Ctrl-C.
        last_saved_step: The step of the last checkpoint that this run saved; 0 for none.
        row_numbers_key: The key of a batch that holds the numbers of its rows, for error messages. It is removed before
            the loss is computed.
    """

    row_numbers_key = "row_numbers"
    _guard: TrainingGuard
    _passes: StreamPasses

    def guard_training(self) -> None:
        """Start to guard the steps of training; to be called once the Trainer is constructed."""
        self._guard = TrainingGuard(self.accelerator)
        self._passes = StreamPasses(self)
        self.add_callback(self._guard)
        self.add_callback(self._passes)

    @property
    def terminated(self) -> bool:
        return bool(self._guard.ending)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as the Trainer does, with these differences:

        - It resumes from complete checkpoints only; `True` means the newest complete one in `output_dir`. A warning names the
          settings on which the weights depend (`result_settings`) that are not those of the checkpoint.
        - After SIGTERM or Ctrl-C it finishes the current step (an evaluation is left at once), saves a checkpoint and raises
          SystemExit(143 or 130), unless the script handles the signal itself or trains outside of the main thread. A second Ctrl-C ends
          the process at once.

        Raises:
            ValueError: If there is no complete checkpoint to resume from, or nothing to train.
            NonFiniteError: For a NaN or infinite loss or gradient, before the weights change, with the numbers of the rows
                it comes from. The weights are saved as a checkpoint first (not under FSDP and DeepSpeed).
        """
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "Got a model none of whose parameters requires a gradient, expected some: nothing would be trained. Fix: load an adapter with "
                "PeftModel.from_pretrained(model, adapter, is_trainable=True), or pass peft_config for a new one."
            )
        checkpoint = resumable(resume_from_checkpoint, self.args.output_dir)
        if checkpoint and (changed := changed_settings(Path(checkpoint), self.result_settings())):
            logger.warning(changed)
        self.last_saved_step = 0
        # transformers' own just-in-time checkpoint handles SIGTERM itself.
        handler = nullcontext() if self.args.enable_jit_checkpoint else self._guard.signals()
        with handler:
            try:
                output = super().train(checkpoint, *args, **kwargs)
            except NonFiniteError as error:
                error.add_note(self.save_before_failing())
                raise
            except Interrupted:
                if self._guard.has_stepped and self.last_saved_step != self.state.global_step:
                    self._save_checkpoint(self.model, trial=None)
                self.control: Any = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self.terminated:
            saved = f"checkpoint-{self.last_saved_step} is saved" if self.last_saved_step else "no step was made"
            name = signal.Signals(self._guard.ending).name
            continues = how_to_continue(str(self.args.output_dir), self.args.save_only_model)
            logger.warning(f"Training ends after {name}: {saved}. {continues}")
            raise SystemExit(128 + self._guard.ending)
        return output

    def result_settings(self) -> dict[str, Any]:
        # Each data worker reads shards of its own: their number changes the order of a stream's rows.
        of_streams = ["dataloader_num_workers"] if self._passes.is_stream else []
        return super().result_settings() | settings_of(self.args, of_streams)

    def interruptible(self) -> AbstractContextManager[None]:
        """A block of work between two steps, which a signal ends at once."""
        return self._guard.between_steps()

    def leave_if_told(self) -> None:
        """Between two batches of such work, on all ranks together: leave it if one rank received a signal."""
        self._guard.leave_if_told()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.interruptible():
            return super().evaluate(*args, **kwargs)

    def save_before_failing(self) -> str:
        """Save the weights between two steps, before an error ends training. Returns a sentence on what was saved."""
        step = self.state.global_step
        if self.last_saved_step == step or self.accelerator.distributed_type not in UNSHARDED:
            last = "none were saved"
            if self.last_saved_step:
                last = f"the last checkpoint is that of step {self.last_saved_step}"
            return f"Training had done {step} steps; {last}."
        if not all(p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
            return f"After {step} steps some weights are not finite: nothing was saved."
        self._save_checkpoint(self.model, trial=None)
        return f"Saved checkpoint-{step}, the weights before the error."

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows = inputs.pop(self.row_numbers_key, None)
        is_training = self.model.training
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if is_training:
            self._guard.check_loss(loss[0] if isinstance(loss, tuple) else loss, rows)
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.mixed_precision != "fp16":  # fp16's loss scaling skips steps that overflow
            self._guard.check_gradients(norm)
        return norm

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, *args: Any
    ) -> tuple[int, int]:
        """The passes over the training data that are complete, and the batches to skip in the next one."""
        settings = max_steps, num_update_steps_per_epoch, num_train_epochs
        trained = super()._init_training_state(*settings, checkpoint, *args)
        if checkpoint is None or not self._passes.is_stream:
            return trained
        passes, steps = position(TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)))
        if self.args.ignore_data_skip:  # the pass begins anew, as with other datasets
            steps = 0
        self.state.epoch = (
            passes + steps / max_steps
        )  # by this run's max_steps, also in a checkpoint before its next step
        return passes, steps * self.args.gradient_accumulation_steps

    def _save_rng_state(self, output_dir: str) -> None:
        with self._passes.random_state():
            super()._save_rng_state(output_dir)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        step_before = self.state.global_step
        if step_before >= self.state.max_steps:
            # Resumed from the last step's checkpoint: transformers would train one step more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        if self.state.global_step > step_before or self.control.should_training_stop or self.control.should_epoch_stop:
            return
        if kwargs["resume_from_checkpoint"] and kwargs["epoch"] == kwargs["epochs_trained"]:
            return  # the checkpoint is that of the last step of its pass
        raise ValueError(
            f"Got fewer batches in the training data than gradient_accumulation_steps={self.args.gradient_accumulation_steps}, "
            "expected at least as many: no step would ever be made. Fix: lower gradient_accumulation_steps."
        )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.terminated:
            # Otherwise save_total_limit=1 would remove the checkpoint just saved in favour of the best one.
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args, **kwargs)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        if self.accelerator.num_processes > 1 and isinstance(dataset, IterableDataset):
            dataset = UnshardedStream(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)
