"""Verification in a trainer: on request, and before its first step."""

from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from rich.console import Console
from transformers import TrainerCallback

from trl_miso.attention.support import base_of
from trl_miso.verification.checks import Check
from trl_miso.verification.run import Cost, require_exact, verify_model
from trl_miso.verification.table import make_table

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = get_logger(__name__)


class Verified(_Trainer):
    """Trainer mixin: `verify()`, and the attribute `verification` with the results of the last run of the checks."""

    verification: list[Check] = []

    def verify(self, rows: int = 8) -> list[Check]:
        """Check on the model, the tokenizer and some of the first rows that MISO is exact, and print the results as a table.

        Two ways of computing the labelled tokens' log-probabilities must agree: one context by MISO and by the model's own
        attention; rows packed and one by one; prefixes shared and unshared; contexts in either order; attention by the kernel
        and by definition (eq. 3). Differences are measured in nats and may be as large as rounding explains, see
        `verification/checks.py`. No label may lie across a boundary, and every token must have gradient.

        Args:
            rows: Number of examples to check on, those with several contexts first: of these short ones, and, of more than two, one long one.

        Returns:
            The results, also kept as `verification`.

        Raises:
            ValueError: If a check fails, or under FSDP and DeepSpeed, whose models run once `train` has prepared them.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "Got verify() under FSDP or DeepSpeed, where a model runs only after train() has prepared it. Expected verify=True, "
                "with which train() verifies before its first step. Fix: call train(), or verify() in a single process."
            )
        cost = self.run_checks(rows, gradients=True)
        if self.is_world_process_zero():
            Console().print(make_table(self.verification, "" if cost is None else f"on {cost}"))
        return self.verification

    def run_checks(self, count: int, gradients: bool) -> Cost | None:
        """Check on `count` examples, keep the results as `verification`, and return what that took; None if nothing was checked.

        Raises ValueError if a check fails.
        """
        self.verification = []
        with self.accelerator.autocast():
            self.verification, cost = verify_model(
                self.model,
                self.data_collator,
                self.train_dataset,
                count,
                self.args.compute_dtype(base_of(self.model).dtype),
                self.accelerator.device,
                gradients,
                progress=self.is_world_process_zero() and not self.args.disable_tqdm,
            )
        require_exact(self.verification)
        return cost


class VerifyFirst(TrainerCallback):
    """Run the checks on two short examples once the model is ready for its first step, unless `verify=False`."""

    def __init__(self, trainer: Verified):
        self._trainer = trainer

    def on_train_begin(self, args: Any, *others: Any, **kwargs: Any) -> None:
        if not args.verify:
            return
        cost = self._trainer.run_checks(2, gradients=False)
        if cost is None:
            return
        passed = sum(check.status == "passed" for check in self._trainer.verification)
        logger.info(f"Verified on this model and {cost}: {passed} checks passed (see trainer.verification).")
