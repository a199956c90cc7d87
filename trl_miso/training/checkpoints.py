"""Atomic checkpoints: written to a temporary folder, renamed once complete, and checked before training resumes.

A process can be killed, or a disk run full, at any moment of a save. transformers writes into `checkpoint-N` itself, and
resumes from the highest N whatever that folder has in it. Without `trainer_state.json` it silently starts again at step 0.
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from trl_miso.training.kept_settings import RESULT_SETTINGS, keep_settings, settings_of

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

_TEMPORARY_FOLDER = "_incomplete"  # uploads to the Hub leave out names that begin with an underscore
_MANIFEST = "miso_files.json"  # sizes of a checkpoint's files, by name
_WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # torch.save raises RuntimeError
# Where an optimizer state can be: the trainer's file, FSDP's file or folder, DeepSpeed's tag.
_OPTIMIZER_STATES = (OPTIMIZER_NAME, "optimizer.bin", "optimizer_0", "latest")

logger = get_logger(__name__)


class AtomicCheckpoints(_Trainer):
    """Trainer mixin: a checkpoint's folder gets its name once all of its files are written."""

    _temporary_dir: str | None = None  # set while a checkpoint is being written
    last_saved_step = 0

    def result_settings(self) -> dict[str, Any]:
        """The settings on which the weights depend, to keep in checkpoints and to compare when training resumes."""
        return settings_of(self.args, RESULT_SETTINGS)

    def _get_output_dir(self, trial: Any) -> str:
        return self._temporary_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step, run_dir = self.state.global_step, self._get_output_dir(trial)
        temporary_dir = os.path.join(run_dir, _TEMPORARY_FOLDER)
        written = os.path.join(temporary_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        checkpoint = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if self.args.should_save:
            shutil.rmtree(temporary_dir, ignore_errors=True)  # left by a run that was killed
        self.accelerator.wait_for_everyone()
        self._temporary_dir = temporary_dir
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                keep_settings(Path(written), self.result_settings())
            # transformers has looked for the best checkpoint in the temporary folder: set its path again.
            best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == checkpoint or os.path.isdir(best):
                self.state.best_model_checkpoint = best
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()  # all ranks have written their files
            if self.args.should_save:
                _publish(Path(written), Path(checkpoint))
        except Exception as error:
            shutil.rmtree(temporary_dir, ignore_errors=True)
            if isinstance(error, _WRITE_ERRORS):
                raise RuntimeError(_write_error(error, step, run_dir)) from error
            raise
        finally:
            self._temporary_dir = None
        self.accelerator.wait_for_everyone()  # no rank goes on before the checkpoint has its name
        self.last_saved_step = step
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if self.args.should_save:
            limits = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(run_dir, *limits, use_mtime=True)

    def _load_best_model(self) -> None:
        """Load the best weights, also of adapters with a name, for which transformers looks in the wrong folder.

        PEFT keeps the adapter "default" in the checkpoint's folder and others in folders of their names.
        """
        adapters = getattr(self.model, "active_adapters", None)
        if (
            not isinstance(adapters, list)
            or adapters == ["default"]
            or self.is_deepspeed_enabled
            or self.is_fsdp_enabled
        ):
            super()._load_best_model()
            return
        best = str(self.state.best_model_checkpoint)
        for name in adapters:
            self.model.load_adapter(best if name == "default" else os.path.join(best, name), name, is_trainable=True)
        logger.info(f"Loaded the adapters {', '.join(adapters)} of the best checkpoint, {best}.")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._temporary_dir is None:  # transformers calls this before the checkpoint is complete
            super()._push_from_checkpoint(checkpoint_folder)


def resumable(resume_from_checkpoint: str | os.PathLike | bool | None, output_dir: str) -> str | None:
    """The folder to resume from, or None to start from the beginning.

    Args:
        resume_from_checkpoint: A folder, or True (also as text, from a command line) for the newest complete checkpoint in
            `output_dir`.
        output_dir: The folder of the run's checkpoints.

    Raises:
        ValueError: If training cannot resume from the folder, or `output_dir` has no complete checkpoint.
    """
    if not resume_from_checkpoint:
        if earlier := _checkpoints(output_dir):
            logger.warning(
                f"Training starts from the beginning although {output_dir} has checkpoints, up to {Path(earlier[-1]).name}. A later "
                "resume_from_checkpoint=True takes the checkpoint of the highest step, whichever run wrote it."
            )
        return None
    if str(resume_from_checkpoint).lower() == "true":
        return str(_newest_complete(Path(output_dir)))
    reason = _why_not_resume(Path(str(resume_from_checkpoint)))
    if reason is not None:
        raise ValueError(
            f"Got resume_from_checkpoint={str(resume_from_checkpoint)!r}, but {reason}. Expected a complete checkpoint. Fix: give "
            "another folder, or resume_from_checkpoint=True for the newest complete checkpoint in output_dir."
        )
    return str(resume_from_checkpoint)


def how_to_continue(output_dir: str, save_only_model: bool) -> str:
    """A sentence on how training continues from the checkpoints in `output_dir`."""
    if any(_why_not_resume(Path(checkpoint)) is None for checkpoint in _checkpoints(output_dir)):
        return "It continues with resume_from_checkpoint=True."
    reason = "there is no complete checkpoint"
    if save_only_model:
        reason = "with save_only_model=True checkpoints have no optimizer state"
    return f"It has to start from the beginning: {reason}."


def _publish(written: Path, checkpoint: Path) -> None:
    """Move a complete checkpoint from the temporary folder to its name, atomically."""
    sizes = {str(file.relative_to(written)): file.stat().st_size for file in _files(written)}
    (written / _MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    # Every file has to be on disk before the name is: a crash must not leave a named checkpoint with empty files.
    for path in [*_files(written), written]:
        _flush(path)
    if checkpoint.exists():  # of an earlier run, or saved before at the same step
        os.replace(checkpoint, written.with_name("replaced"))
    os.replace(written, checkpoint)
    _flush(checkpoint.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def _why_not_resume(checkpoint: Path) -> str | None:
    """Why training cannot resume from a folder; None if it can. Reads names and sizes of files, not their contents."""
    if not checkpoint.is_dir():
        return "it is not a folder"
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}: it is an incomplete checkpoint, or not a checkpoint of a trainer"
    if (checkpoint / _MANIFEST).is_file():
        try:
            sizes = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        except ValueError:
            return f"its {_MANIFEST} cannot be read: it is an incomplete copy"
        for name, size in sizes.items():
            file = checkpoint / name
            if not file.is_file():
                return f"it lacks {name}, which was written with {size} bytes: it is an incomplete copy"
            if file.stat().st_size != size:
                got = f"{file.stat().st_size} bytes"
                return f"it has {got} of {name}, which was written with {size} bytes: it is an incomplete copy"
    # Without an optimizer state transformers would silently go on with a fresh optimizer.
    if not any((checkpoint / name).exists() for name in _OPTIMIZER_STATES):
        return "it has no optimizer state: it was saved with save_only_model=True, or is incomplete"
    return None


def _newest_complete(output_dir: Path) -> Path:
    """The newest checkpoint that training can resume from. Warns of newer ones that it cannot resume from.

    Raises:
        ValueError: If there is none.
    """
    reasons: list[str] = []
    for checkpoint in map(Path, reversed(_checkpoints(str(output_dir)))):
        reason = _why_not_resume(checkpoint)
        if reason is None:
            for skipped in reasons:
                logger.warning(f"{skipped}. Training resumes from {checkpoint}.")
            return checkpoint
        reasons.append(f"{checkpoint} is skipped: {reason}")
    if (output_dir / _TEMPORARY_FOLDER).is_dir():
        reasons.append(f"{output_dir / _TEMPORARY_FOLDER} was being written when the run ended")
    raise ValueError(
        f"Got resume_from_checkpoint=True, but no complete checkpoint in {'; '.join([str(output_dir), *reasons])}. Expected one. Fix: "
        "leave resume_from_checkpoint out to start from the beginning, or set output_dir to the folder that has the checkpoints."
    )


def _checkpoints(output_dir: str) -> list[str]:
    """Folders named as the trainer names them, by step. Leaves out a user's copies, such as `checkpoint-9-old`."""
    prefix = PREFIX_CHECKPOINT_DIR + "-"
    return [path for path in sort_checkpoints(output_dir) if Path(path).name.removeprefix(prefix).isdecimal()]


def _write_error(error: Exception, step: int, output_dir: str) -> str:
    """The message for a checkpoint that could not be written."""
    complete = [folder for folder in _checkpoints(output_dir) if _why_not_resume(Path(folder)) is None]
    last = f"The last complete checkpoint is {complete[-1]}" if complete else "There is no earlier checkpoint"
    return (
        f"Got {type(error).__name__} ({error}) while {PREFIX_CHECKPOINT_DIR}-{step} was written; its files were removed. {last}. "
        f"Expected space and permission to write in {output_dir}. Fix: make space, and train again with resume_from_checkpoint=True."
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
