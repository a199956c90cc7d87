"""Evaluation and prediction in rows: a batch is flat, but what `compute_metrics` and `predict` see has one line per row."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import recursively_apply
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers.trainer_utils import PredictionOutput

from trl_miso.data.bins import ROW_LENGTHS
from trl_miso.data.collator import BINS, PLACES

if TYPE_CHECKING:
    from trl import SFTTrainer as _Trainer
else:
    _Trainer = object

logger = get_logger(__name__)
_IGNORED = -100  # pads labels and logits, as Trainer does


class RowPredictions(_Trainer):
    """A layer of MISOSFTTrainer that turns flat batches back into rows, after the loss and before the metrics.

    - A line holds the tokens of a prepared row in the order of its `input_ids`: for several contexts, the segments of the
      contexts and then the output; with `share_prefixes=False`, every context's own copy of its tokens. The rows of a bin
      have a line each.
    - Logits at t predict token t + 1, so `logits[:, :-1]` against `labels[:, 1:]` is right: the first token of a segment,
      which no token of the line predicts, has no label.
    - Shorter lines are padded with -100 (`input_ids` of `include_for_metrics` with the padding token, as in SFTTrainer).
    - As in SFTTrainer, a batch's loss counts once for each of its rows, or bins.
    """

    data_collator: Any
    gather_function: Callable[..., Any]

    def _get_dataloader(
        self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> torch.utils.data.DataLoader:
        collator = self.data_collator
        if not is_training:
            self.data_collator = replace(collator, keep_rows=True)
        try:
            return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        if PLACES not in inputs:
            if prediction_loss_only:
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            raise ValueError(
                f"Got a batch without {PLACES!r}, expected a batch of get_eval_dataloader or get_test_dataloader: others cannot be "
                "turned back into rows. Fix: evaluate on one of these, or with prediction_loss_only=True."
            )
        batch = self._prepare_inputs(inputs)
        places, lengths = batch.pop(PLACES), batch.pop(ROW_LENGTHS).tolist()
        row_counts = batch.pop(BINS, None)
        loss, logits, labels = super().prediction_step(model, batch, prediction_loss_only, ignore_keys)

        def to_lines(packed: torch.Tensor, padding: int = _IGNORED) -> torch.Tensor:
            """(1, T, ...) -> (rows, length of the longest, ...)."""
            return pad_sequence(packed[0, places.to(packed.device)].split(lengths), True, padding)

        if logits is not None and labels is not None:
            logits, labels = to_lines(logits), to_lines(labels)
        if "inputs" in self.args.include_for_metrics:
            ids = batch["input_ids"]
            lines = {
                "input_ids": to_lines(ids, self.data_collator.pad_token_id),
                "attention_mask": to_lines(torch.ones_like(ids), 0),
                "labels": to_lines(batch["labels"]),
            }
            inputs.clear()  # the evaluation loop passes this very dict on
            inputs.update(lines)

        # The evaluation loop gathers a step's losses first, repeated for a full batch, and then everything that has lines.
        gather = partial(self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object)
        gather_lines = gather if row_counts is None else partial(self._gather_rows_of_bins, row_counts)
        num_losses = len(lengths) if row_counts is None else len(row_counts)

        def gather_losses(losses: torch.Tensor) -> Any:
            self.gather_function = gather_lines
            return gather(losses[:num_losses])

        self.gather_function = gather_losses
        return loss, logits, labels

    def _gather_rows_of_bins(self, row_counts: torch.Tensor, lines: Any) -> Any:
        """`Accelerator.gather_for_metrics` for bins: ranks have different numbers of lines, and a bin is repeated with its lines.

        Args:
            row_counts: (bins,) the number of rows in each bin of this rank's batch.
            lines: Tensors with a line per row of this rank's batch.
        """
        counts = self.accelerator.gather(row_counts)
        by_rank = counts.view(-1, len(row_counts)).sum(1).tolist()
        padded = self.accelerator.pad_across_processes(lines, dim=0, pad_index=_IGNORED)
        kept = [torch.arange(count) + rank * max(by_rank) for rank, count in enumerate(by_rank)]
        state = self.accelerator.gradient_state
        last_bins = state.remainder if state.end_of_dataloader and state.remainder > 0 else len(counts)
        index = torch.cat(kept)[: int(counts[:last_bins].sum())]
        return recursively_apply(lambda gathered: gathered[index.to(gathered.device)], self.accelerator.gather(padded))

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """As Trainer's, in the order of the rows: `train_sampling_strategy` does not apply."""
        return self._get_dataloader(test_dataset, description="test", batch_size=self.args.eval_batch_size)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predict rows, with a line for each in their order.

        Args:
            test_dataset: Rows in any format that the trainer trains, prepared here as evaluation rows (neither shuffled nor
                packed); or prepared rows. Dropped rows have no line: the log counts them, and `dropped_rows["test"]` has their
                numbers.
            ignore_keys: Unused, as in SFTTrainer.
            metric_key_prefix: Begins the names of the metrics.

        Returns:
            Logits (rows, length, vocabulary), or what `preprocess_logits_for_metrics` makes of them, labels (rows, length), and
            the metrics.
        """
        if isinstance(test_dataset, Dataset | IterableDataset) and not self._skip_prepare_dataset:
            args = copy(self.args)
            args.shuffle_dataset = False
            self.dropped_rows.pop("test", None)
            test_dataset = self._prepare_dataset(
                test_dataset, self.processing_class, args, False, self._formatting_func, "test"
            )
            if self.dropped_rows.get("test"):
                logger.warning(
                    "Dropped rows have no line in the predictions: `trainer.dropped_rows['test']` has their numbers, by reason."
                )
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)
