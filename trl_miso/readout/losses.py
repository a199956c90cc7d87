"""The rows' answers read by standard inference and under each weighting: their loss and token accuracy, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from trl_miso.attention.mixture import check_window
from trl_miso.attention.support import ModelSupport, check_relative
from trl_miso.data.collator import MISODataCollator
from trl_miso.data.layout import context_weights
from trl_miso.readout.rows import Columns, PreparedRow, Progress
from trl_miso.report.meters import measuring
from trl_miso.segments import Example, encode
from trl_miso.segments.packed import WEIGHTINGS

STANDARD = "standard"


@dataclass(frozen=True)
class Reading:
    """A way of mixing a row's contexts: a weighting, and the full context's weight if it is fixed."""

    name: str
    weighting: str
    full_context_weight: float | None = None

    def weights(self, row: PreparedRow) -> list[float] | None:
        """Weights of the row's contexts; None where the weighting alone decides."""
        if self.weighting != "uniform":
            return None
        return row.parallel.weights or context_weights(len(row.parallel.contexts), self.full_context_weight)


READINGS = (
    Reading("uniform", "uniform"),
    Reading("full 1/2", "uniform", 0.5),
    Reading("full 3/4", "uniform", 0.75),
    *(Reading(weighting, weighting) for weighting in WEIGHTINGS if weighting != "uniform"),
)


@dataclass(frozen=True)
class RowLoss:
    """A row's answer under one reading: sum of the negative log-likelihoods, tokens predicted first, and tokens."""

    nll: float
    correct: int
    tokens: int


def read_answers(
    model: PreTrainedModel,
    rows: Sequence[PreparedRow],
    *,
    max_length: int | None = None,
    output_positions: str = "successive",
    share_prefixes: bool = True,
    progress: Progress = lambda items, doing: items,
) -> tuple[dict[str, list[RowLoss]], dict[str, str]]:
    """Read the rows' answers by standard inference and under each weighting, in evaluation mode; the model is restored.

    Pooled over rows, a reading's loss is `eval_loss` of `MISOSFTTrainer` on these rows in one batch: with
    `eval_contexts="standard"`, or with `"miso"` and the reading's `context_weighting` and `full_context_weight`.

    Args:
        max_length, output_positions, share_prefixes: As in `MISOSFTConfig`.
        progress: Wraps the rows of each reading.

    Returns:
        By reading (`"standard"` first) one `RowLoss` per row, and by reading that is impossible the reason.

    Raises:
        ValueError: If MISO does not support the model or its positions.
    """
    losses: dict[str, list[RowLoss]] = {}
    with measuring(model, max_length) as support:
        if output_positions == "successive":
            check_relative(model.config.model_type, support)
        refused = _refused(model.config.model_type, rows, support, output_positions)
        names = [STANDARD, *(reading.name for reading in READINGS if reading.name not in refused)]
        by_name = {reading.name: reading for reading in READINGS}
        for name in names:
            reading = by_name.get(name)
            weighting = reading.weighting if reading else WEIGHTINGS[0]
            collator = MISODataCollator(0, weighting, share_prefixes and support.shares, support.window)
            losses[name] = []
            for row in progress(rows, f"Reading answers: {name}"):
                columns = weighted(row, reading.full_context_weight) if reading else row.standard
                losses[name].append(_row_loss(model, collator([columns])))
    return losses, refused


def weighted(row: PreparedRow, full_context_weight: float | None) -> Columns:
    """The row's prepared columns with another weight of the full context, which is the first branch of each output."""
    if full_context_weight is None:
        return row.mixed
    outputs = []
    for output in row.example.outputs:
        weights = context_weights(len(output.branches), full_context_weight)
        branches = [branch._replace(weight=w) for branch, w in zip(output.branches, weights, strict=True)]
        outputs.append(output._replace(branches=tuple(branches)))
    return row.mixed | {"miso_layout": encode(Example(row.example.segments, tuple(outputs)))}


def full_weight_obstacle(rows: Sequence[PreparedRow]) -> str:
    """Why the full context of some row cannot have a weight of its own; "" if it can."""
    if any(row.parallel.weights for row in rows):
        return "Got rows with context_weights of their own, expected none. Fix: leave the column out."
    if any(row.parallel.names[0] != "full" for row in rows):
        return (
            "Got rows whose full context is not among their contexts, expected it there. Fix: leave include_full=True, or add the "
            "prompt to the contexts."
        )
    return ""


def _refused(
    model_type: str, rows: Sequence[PreparedRow], support: ModelSupport, output_positions: str
) -> dict[str, str]:
    """The readings that these rows or the model's window do not allow, with the reason. Raises ValueError if no weighting is left."""
    refused = {}
    obstacle = full_weight_obstacle(rows)
    longer = sum(row.example.longest > support.window for row in rows) if support.window else 0
    for reading in READINGS:
        if reading.full_context_weight is not None and obstacle:
            refused[reading.name] = obstacle
        elif longer:
            window = f"a {model_type} model with a sliding window of {support.window} tokens, which {longer} of {len(rows)} rows exceed"
            has_gap = output_positions == "after_longest"
            try:
                check_window(window, has_gap, reading.weighting, f"set --max_length {support.window}")
            except ValueError as error:
                if has_gap:
                    raise
                refused[reading.name] = str(error)
    return refused


@torch.no_grad()
def _row_loss(model: PreTrainedModel, batch: dict[str, Any]) -> RowLoss:
    """Loss of a batch; logits are computed for the tokens that predict a label only, where the model allows that."""
    labels = batch.pop("labels")[0, 1:]
    predicting = (labels != -100).nonzero().flatten()
    batch = send_to_device(batch, model.device)
    options = {"logits_to_keep": predicting.to(model.device)} if model._supports_logits_to_keep() else {}
    logits = model(**batch, use_cache=False, **options).logits[0]
    if not options:
        logits = logits[predicting.to(logits.device)]
    targets = labels[predicting].to(logits.device)
    nll = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return RowLoss(float(nll), int((logits.argmax(-1) == targets).sum()), len(targets))
