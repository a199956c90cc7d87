"""The checks as a trainer makes them: on request, and before its first step."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from rich.console import Console
from transformers import PreTrainedModel, TrainerCallback

from trl_miso.attention.support import base_of
from trl_miso.attention.transformers_attention import register_definition
from trl_miso.verification.checks import Check, Verifier, choose
from trl_miso.verification.table import as_text, table

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = get_logger(__name__)


class Verified(_Trainer):
    """For MISOSFTTrainer: `verify()`, and the attribute `verification`, the checks that were made last."""

    verification: list[Check] = []

    def verify(self, rows: int = 8) -> list[Check]:
        """Check on the model, the tokenizer and the first rows that MISO is exact; print the checks as a table.

        One context is the model's own attention; packed, shared and reordered contexts change nothing; the kernel gives
        what the definition (eq. 3) gives; no loss crosses a boundary; every token carries gradient. Each is measured in
        nats of the labelled tokens' log-probabilities, and may differ by what rounding explains (`verification/checks.py`).

        Args:
            rows: Examples to check on, those of several contexts first.

        Raises:
            ValueError: If a check fails, or the model is sharded and not yet made ready by `train`.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "Got verify() under FSDP or DeepSpeed, whose models run once training has begun only. Expected verify=True, with which "
                "train() verifies first. Fix: call train(), or verify() in one process."
            )
        self.run_checks(rows, gradients=True)
        if self.is_world_process_zero():
            Console().print(table(self.verification))
        return self.verification

    def run_checks(self, count: int, gradients: bool) -> None:
        rows = choose(islice(self.train_dataset, 20 * count), count)
        self.verification = []
        if not rows:
            logger.warning(f"Nothing was verified: none of the first {20 * count} rows has a label.")
            return
        base_model = base_of(self.model)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else base_model.dtype
        verifier = Verifier(
            model=self.model,
            embeddings=base_model.get_input_embeddings(),
            collator=self.data_collator,
            rows=rows,
            dtype=dtype,
            definition=partial(_attending_by_definition, base_model),
            device=self.accelerator.device,
            gradients=gradients,
        )
        with self.accelerator.autocast():
            self.verification = list(verifier())
        if any(check.status == "failed" for check in self.verification):
            raise ValueError(
                "Got a model on which MISO is not exact, expected every check to pass. Nothing was trained. Fix: use another model, "
                "attention_kernel or attn_implementation, and report this table; verify=False trains in spite of it.\n\n"
                f"{as_text(self.verification)}"
            )


class VerifyFirst(TrainerCallback):
    """Runs the checks on two rows when the model is ready for its first step, unless `verify=False`."""

    def __init__(self, trainer: Verified):
        self._trainer = trainer

    def on_train_begin(self, args: Any, *others: Any, **kwargs: Any) -> None:
        if not args.verify:
            return
        self._trainer.run_checks(2, gradients=False)
        passed = sum(check.status == "passed" for check in self._trainer.verification)
        logger.info(f"Verified on this model and the first rows: {passed} checks passed (trainer.verification).")


@contextmanager
def _attending_by_definition(model: PreTrainedModel) -> Iterator[None]:
    """Set on the configs that attention reads: a model that FSDP has wrapped takes no other implementation."""
    name, definition = model.config.get_text_config()._attn_implementation, register_definition()
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    attending = [c for c in configs.values() if getattr(c, "_attn_implementation", None) == name]
    for config in attending:
        config._attn_implementation = definition
    try:
        yield
    finally:
        for config in attending:
            config._attn_implementation = name
