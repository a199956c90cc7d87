"""Pushes to the Hub: write MISO's model card, report failures and how to push again, and keep the token out of files."""

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
    """Mixin for MISOSFTTrainer: what is uploaded, and what happens when an upload fails."""

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **metadata: Any,
    ) -> None:
        """As in SFTTrainer, with how contexts were made and mixed.

        Args:
            metadata: More fields of the card's header, such as `language` and `license`.
        """
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            write_model_card(self, model_name, dataset_name, metadata)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in SFTTrainer. A second call resumes a failed upload: files that have arrived are not sent again.

        Raises:
            RuntimeError: If the upload fails. The model is then complete in `output_dir`.
        """
        try:
            pushed = super().push_to_hub(*args, **kwargs)
        except Exception as error:
            if "save_model" in (frame.name for frame in traceback.extract_tb(error.__traceback__)):
                raise  # the model could not be written to disk: no failure of the Hub
            if self.hub_model_id is None:  # creating the repository failed, which comes before saving the model
                self.save_model(_internal_call=True)
            raise RuntimeError(self._not_pushed(error)) from error
        if isinstance(pushed, Future):
            pushed.add_done_callback(self._report_failure)
            self.push_in_progress = PushInProgress([*self._uploads(), pushed])
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in Trainer: upload in the background. A failure is logged as soon as it happens.

        With `hub_always_push`, wait for the previous upload first, since it reads the files that are about to be written.
        """
        if self.args.hub_always_push:
            self._finish_current_push()
        earlier = self._uploads()
        super()._push_from_checkpoint(checkpoint_folder)
        for job in set(self._uploads()) - set(earlier):
            job.add_done_callback(self._report_failure)

    def _uploads(self) -> list[Future]:
        in_progress = getattr(self, "push_in_progress", None)  # not set on processes that do not push
        return [] if in_progress is None else list(in_progress.jobs)

    def _report_failure(self, upload: Future) -> None:
        if not upload.cancelled() and (error := upload.exception()) is not None:
            logger.warning(f"{self._not_pushed(error)} Training goes on; its next push uploads the model too.")

    def _not_pushed(self, error: BaseException) -> str:
        folder = os.path.abspath(self.args.output_dir)
        repo = self.hub_model_id or self.args.hub_model_id or os.path.basename(folder)
        revision = f" --revision {self.args.hub_revision}" if self.args.hub_revision else ""
        return (
            f"Got {_describe(error)} while {repo} was pushed to {constants.ENDPOINT}, expected the upload to succeed. Nothing is lost: "
            f"the model is complete in {folder}. Fix: call trainer.push_to_hub() again, or, without the trainer, run "
            f"hf upload {repo} {shlex.quote(folder)} --exclude '{PREFIX_CHECKPOINT_DIR}-*'{revision}."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.args.hub_token = self.args.hub_token and Secret(self.args.hub_token)
        if output_dir is None or os.path.abspath(output_dir) == os.path.abspath(self.args.output_dir):
            self._finish_current_push()  # it reads the files that are about to be written
        super()._save(output_dir, state_dict)
        if is_peft_model(self.model) and self.is_world_process_zero():
            # PEFT's own card gives the path of a local base model as an id on the Hub, and the Hub refuses such a card.
            card = Path(self.args.output_dir, "README.md").resolve()
            peft_card = Path(output_dir or self.args.output_dir, "README.md").resolve()
            if peft_card == card:
                self.create_model_card()
            elif card.exists():
                shutil.copy(card, peft_card)


class Secret(str):
    """A token that pickles as None, since training_args.bin is uploaded with the model."""

    def __reduce__(self) -> tuple:
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> "Secret":
        return self


def _describe(error: BaseException | None) -> str:
    """An error and its causes on one line, without causes whose text is already there."""
    descriptions: list[str] = []
    while error is not None:
        text = " ".join(str(error).split())
        if not any(text in description for description in descriptions):
            descriptions.append(f"{type(error).__name__} ({text})")
        error = None if isinstance(error, HfHubHTTPError) else error.__cause__
    return ", from ".join(descriptions)
