"""Checkpoints that are whole or not there: written aside, renamed when complete, and checked before training resumes.

A process can be killed, or a disk run full, at any moment of a save. transformers writes into `checkpoint-N` itself, and
resumes from the highest N whatever is in it; without `trainer_state.json` it begins again at step 0 without a word.
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

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

_ASIDE = "_incomplete"  # the Hub's upload leaves out what begins with an underscore
_UNWRITTEN = (OSError, SafetensorError, RuntimeError)  # the last is torch.save's
_FILES = "miso_files.json"  # sizes of a checkpoint's files, by name

logger = get_logger(__name__)


class AtomicCheckpoints(_Trainer):
    """For a Trainer: a checkpoint's folder gets its name when all of it is written."""

    _aside: str | None = None  # where a checkpoint is being written
    _saved_step = 0

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step, run_dir = self.state.global_step, self._get_output_dir(trial)
        aside = os.path.join(run_dir, _ASIDE)
        written, checkpoint = (os.path.join(at, f"{PREFIX_CHECKPOINT_DIR}-{step}") for at in (aside, run_dir))
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            super()._save_checkpoint(model, trial)
            best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == checkpoint or os.path.isdir(best):  # transformers has looked for it aside
                self.state.best_model_checkpoint = best
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _complete(Path(written), Path(checkpoint))
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, _UNWRITTEN):
                raise RuntimeError(_unwritten(error, step, run_dir)) from error
            raise
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        self._saved_step = step
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if self.args.should_save:
            limits = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(run_dir, *limits, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # else it is not whole yet
            super()._push_from_checkpoint(checkpoint_folder)


def _complete(written: Path, checkpoint: Path) -> None:
    """Give a checkpoint that was written aside its name, in one step: every file is on disk before the name is."""
    sizes = {str(file.relative_to(written)): file.stat().st_size for file in _files(written)}
    (written / _FILES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    for path in [*_files(written), written]:
        _flush(path)
    if checkpoint.exists():  # of an earlier run, or of the same step
        os.replace(checkpoint, written.with_name("replaced"))
    os.replace(written, checkpoint)
    _flush(checkpoint.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def _obstacle(checkpoint: Path) -> str | None:
    """Why training cannot resume from a folder; None if it can. Reads names and sizes, not contents."""
    if not checkpoint.is_dir():
        return "it is no folder"
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}: it was not written to its end, or is no checkpoint of a trainer"
    if (checkpoint / _FILES).is_file():
        try:
            sizes = json.loads((checkpoint / _FILES).read_text(encoding="utf-8"))
        except ValueError:
            return f"its {_FILES} cannot be read: it was not copied to its end"
        for name, size in sizes.items():
            file = checkpoint / name
            if not file.is_file() or file.stat().st_size != size:
                got = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
                return f"it has {got} of {name}, which was written with {size} bytes: it was not copied to its end"
    # A file, FSDP's folder, or DeepSpeed's tag; without it transformers goes on with an optimizer that knows nothing.
    if not any((checkpoint / name).exists() for name in (OPTIMIZER_NAME, "optimizer.bin", "optimizer_0", "latest")):
        return "it has no optimizer state: it was saved with save_only_model=True, or was not written to its end"
    return None


def _newest(output_dir: Path) -> Path:
    """The newest checkpoint that training can resume from; newer ones that it cannot are named in a warning.

    Raises:
        ValueError: If there is none.
    """
    reasons: list[str] = []
    for checkpoint in map(Path, _checkpoints(str(output_dir))[::-1]):
        reason = _obstacle(checkpoint)
        if reason is None:
            for passed_over in reasons:
                logger.warning(f"{passed_over}. Training resumes from {checkpoint}.")
            return checkpoint
        reasons.append(f"{checkpoint} is passed over: {reason}")
    if (output_dir / _ASIDE).is_dir():
        reasons.append(f"{output_dir / _ASIDE} was being written when the run ended")
    raise ValueError(
        f"Got resume_from_checkpoint=True, and no whole checkpoint in {output_dir}{''.join(f'; {r}' for r in reasons)}. Expected one. "
        "Fix: leave resume_from_checkpoint out to begin anew, or set output_dir to the folder that has the checkpoints."
    )


def resumable(resume_from_checkpoint: str | os.PathLike | bool | None, output_dir: str) -> str | None:
    """The folder to resume from, `True` standing for the newest in `output_dir`; None to begin anew.

    Raises:
        ValueError: If training cannot resume from it.
    """
    if not resume_from_checkpoint:
        if left := _checkpoints(output_dir):
            logger.warning(
                f"Training begins anew although {output_dir} has checkpoints, up to {Path(left[-1]).name}: a later "
                "resume_from_checkpoint=True takes the one of the highest step, whichever run wrote it."
            )
        return None
    if str(resume_from_checkpoint).lower() == "true":  # also as a command line has it
        return str(_newest(Path(output_dir)))
    reason = _obstacle(Path(str(resume_from_checkpoint)))
    if reason is not None:
        raise ValueError(
            f"Got resume_from_checkpoint={str(resume_from_checkpoint)!r}, but {reason}. Expected a whole checkpoint. Fix: give another "
            "folder, or resume_from_checkpoint=True for the newest whole one in output_dir."
        )
    return str(resume_from_checkpoint)


def _checkpoints(output_dir: str) -> list[str]:
    """Folders named as the trainer names them, by step; not copies that a user has put beside them."""
    numbers = PREFIX_CHECKPOINT_DIR + "-"
    return [path for path in sort_checkpoints(output_dir) if Path(path).name.removeprefix(numbers).isdecimal()]


def _unwritten(error: Exception, step: int, output_dir: str) -> str:
    """What to tell the user whose checkpoint could not be written."""
    left = [folder for folder in _checkpoints(output_dir) if _obstacle(Path(folder)) is None]
    last = f"the last whole checkpoint is {left[-1]}" if left else "there is no earlier checkpoint"
    return (
        f"Got {type(error).__name__} ({error}) while {PREFIX_CHECKPOINT_DIR}-{step} was written; what was written of it is removed, "
        f"{last}. Expected room and permission to write in {output_dir}. Fix: make room, and train again with "
        "resume_from_checkpoint=True."
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
