"""Pushes to the Hub: MISO's model card, failures that lose nothing and are told, a token that stays out of files."""

import os
import shlex
import shutil
import traceback
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import PushInProgress

from trl_miso.training.model_card import write_model_card

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = get_logger(__name__)


class HubPushes(_Trainer):
    """For MISOSFTTrainer: what is uploaded, and what happens when it cannot be."""

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **metadata: Any,
    ) -> None:
        """As SFTTrainer's, and says how contexts were made and mixed. `metadata` (`language`, `license`, ...) is its header's."""
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            write_model_card(self, model_name, dataset_name, metadata)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As SFTTrainer's. A second call goes on with a failed upload: files that have arrived are not sent again.

        Raises:
            RuntimeError: If the upload fails. The model is then complete in `output_dir`.
        """
        try:
            pushed = super().push_to_hub(*args, **kwargs)
        except Exception as error:
            if "save_model" in (frame.name for frame in traceback.extract_tb(error.__traceback__)):
                raise  # no matter of the Hub
            if self.hub_model_id is None:  # the repository, which comes before the model, could not be made
                self.save_model(_internal_call=True)
            raise RuntimeError(self._not_pushed(error)) from error
        if isinstance(pushed, Future):
            pushed.add_done_callback(self._report_failure)
            self.push_in_progress = PushInProgress([*self._uploads(), pushed])
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's: uploads while training goes on; one that fails is told as soon as it does.

        With `hub_always_push` it waits for the upload before: that reads the files which are written now.
        """
        if self.args.hub_always_push:
            self._finish_current_push()
        earlier = self._uploads()
        super()._push_from_checkpoint(checkpoint_folder)
        for job in set(self._uploads()) - set(earlier):
            job.add_done_callback(self._report_failure)

    def _uploads(self) -> list[Future]:
        in_progress = getattr(self, "push_in_progress", None)  # processes that do not push have none
        return [] if in_progress is None else list(in_progress.jobs)

    def _report_failure(self, upload: Future) -> None:
        if not upload.cancelled() and (error := upload.exception()) is not None:
            logger.warning(f"{self._not_pushed(error)} Training is not affected; its next push uploads the model too.")

    def _not_pushed(self, error: BaseException) -> str:
        folder = os.path.abspath(self.args.output_dir)
        repo = self.hub_model_id or self.args.hub_model_id or os.path.basename(folder)
        return (
            f"Got {_reasons(error)} while {repo} was pushed to {constants.ENDPOINT}, expected the upload to succeed. Nothing is lost: "
            f"the model is complete in {folder}. Fix: trainer.push_to_hub() tries again, or, without the trainer, "
            f"hf upload {repo} {shlex.quote(folder)} --exclude '{PREFIX_CHECKPOINT_DIR}-*'"
            f"{f' --revision {self.args.hub_revision}' if self.args.hub_revision else ''}."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.args.hub_token = self.args.hub_token and Secret(self.args.hub_token)
        if output_dir is None or os.path.abspath(output_dir) == os.path.abspath(self.args.output_dir):
            self._finish_current_push()  # an upload reads these files
        super()._save(output_dir, state_dict)
        if is_peft_model(self.model) and self.is_world_process_zero():
            # PEFT has written a card that names a local base model as one of the Hub, which refuses the upload.
            card, saved = (Path(folder or self.args.output_dir, "README.md").resolve() for folder in (None, output_dir))
            if saved == card:
                self.create_model_card()
            elif card.exists():
                shutil.copy(card, saved)


class Secret(str):
    """A token that pickles leave out: training_args.bin is uploaded beside the model."""

    def __reduce__(self) -> tuple:
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> "Secret":
        return self


def _reasons(error: BaseException | None) -> str:
    """An error, and what caused it if that says more, on one line."""
    reasons: list[str] = []
    while error is not None:
        text = " ".join(str(error).split())
        if not any(text in reason for reason in reasons):
            reasons.append(f"{type(error).__name__} ({text})")
        error = None if isinstance(error, HfHubHTTPError) else error.__cause__
    return ", from ".join(reasons)
