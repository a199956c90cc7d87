"""Run the checks on a model that is wrapped for training and on its prepared rows."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import PreTrainedModel

from trl_miso.attention.support import base_of
from trl_miso.attention.transformers_attention import register_definition
from trl_miso.data.collator import MISODataCollator
from trl_miso.verification.checks import Check, Verifier
from trl_miso.verification.rows import ALL_SHORT, choose
from trl_miso.verification.table import as_text

ROWS_READ_PER_EXAMPLE = 20  # enough to find examples with several contexts among rows with one

logger = get_logger(__name__)


@dataclass(frozen=True)
class Cost:
    """What a run of the checks took: rows, their tokens, the tokens that the model was given in all, and seconds."""

    rows: int
    tokens: int
    forwarded: int
    seconds: float

    def __str__(self) -> str:
        short, plural = "short " * (self.rows <= ALL_SHORT), "s" * (self.rows > 1)
        return f"{self.rows} {short}row{plural} ({self.tokens:,} tokens, {self.forwarded:,} forwarded) in {self.seconds:.1f} s"


def verify_model(
    model: nn.Module,
    collator: MISODataCollator,
    dataset: Iterable[dict[str, Any]],
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    gradients: bool,
    progress: bool,
) -> tuple[list[Check], Cost | None]:
    """Check on the first rows of a prepared dataset that MISO is exact on a model.

    Args:
        model: The model as it is wrapped for training, with MISO attention installed.
        collator: The collator of training.
        dataset: Prepared rows or bins, of which the first `ROWS_READ_PER_EXAMPLE * count` are read.
        count: Examples to check on, those with several contexts first, and of these short ones; see `choose`.
        dtype: The compute dtype.
        device: Device of the batches.
        gradients: Also check that every token has gradient. Not possible for sharded parameters outside a training step.
        progress: Show a progress bar.

    Returns:
        The results, failed ones included, and what they took; no results and None if no row that was read has a label.
    """
    start = time.perf_counter()
    read = ROWS_READ_PER_EXAMPLE * count
    rows = choose(islice(dataset, read), count)
    if not rows:
        logger.warning(f"Nothing was verified: none of the first {read} rows has a label.")
        return [], None
    base_model = base_of(model)
    verifier = Verifier(
        model=model,
        embeddings=base_model.get_input_embeddings(),
        collator=collator,
        rows=rows,
        dtype=dtype,
        definition=partial(_attend_by_definition, base_model),
        device=device,
        gradients=gradients,
        progress=progress,
    )
    checks = list(verifier())
    tokens = sum(len(row["input_ids"]) for row in rows)
    return checks, Cost(len(rows), tokens, sum(verifier.forwarded), time.perf_counter() - start)


def require_exact(checks: Sequence[Check]) -> None:
    """Raise ValueError, with the table of all checks, if one failed."""
    if any(check.status == "failed" for check in checks):
        raise ValueError(
            "Got a model on which MISO is not exact, expected every check to pass. Nothing was trained. Fix: use another model, "
            "attention_kernel or attn_implementation, and report this table; verify=False trains in spite of it.\n\n"
            f"{as_text(checks)}"
        )


@contextmanager
def _attend_by_definition(model: PreTrainedModel) -> Iterator[None]:
    """Make the model attend by definition (`attention/reference.py`) within the block.

    Sets the configs that attention reads, since a model that FSDP has wrapped refuses `set_attn_implementation`.
    """
    name, definition = model.config.get_text_config()._attn_implementation, register_definition()
    by_id = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    configs = [config for config in by_id.values() if getattr(config, "_attn_implementation", None) == name]
    for config in configs:
        config._attn_implementation = definition
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = name
