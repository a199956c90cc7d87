"""The trainers that `step.py` compares, a timer of their steps, and the work in a batch."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.masking_utils import AttentionMaskInterface
from trl import SFTConfig, SFTTrainer

from benchmarks.common.measure import synchronize
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.attention import mixture
from trl_miso.attention.shares import Shares
from trl_miso.segments import decode, unshare
from trl_miso.segments.packed import PackedSegments


@dataclass(frozen=True)
class Variant:
    """A trainer and its settings.

    `plain` is TRL's SFTTrainer; `rows` batches one row per context; `pairs` uses the pairs form of the mixture.
    """

    options: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    rows: bool = False
    pairs: bool = False


PACKED = {"packing": True}
ONE_BY_ONE = {"packing": False, "per_device_train_batch_size": 1}
VARIANTS = {
    "SFTTrainer, packed": Variant(PACKED, plain=True),
    "SFTTrainer, row by row": Variant(ONE_BY_ONE, plain=True),
    "MISO single": Variant(PACKED | {"context_mode": "single"}),
    "MISO para": Variant(PACKED),
    "MISO para, row by row": Variant(ONE_BY_ONE),
    "MISO para, unshared": Variant(PACKED | {"share_prefixes": False}),
    "MISO para, pairs form": Variant(PACKED, pairs=True),
    "MISO fid": Variant(PACKED | {"context_weighting": "fid"}),
    "MISO augment": Variant(PACKED | {"context_mode": "augment"}),
    "one row per context": Variant(ONE_BY_ONE, rows=True),
} | {
    f"MISO succ, k = {k}": Variant(PACKED | {"context_mode": "succ", "chunk_probs": [0.0] * (k - 1) + [1.0]})
    for k in (1, 2, 4, 8)
}


def build(
    name: str, model: PreTrainedModel, rows: Dataset, tokenizer: Any, folder: str, device: str, max_length: int
) -> SFTTrainer:
    """A trainer whose epoch is one optimizer step over all rows."""
    variant = VARIANTS[name]
    common = {
        "output_dir": folder,
        "num_train_epochs": 1,
        "gradient_accumulation_steps": 10**6,  # the epoch ends before, and with it the step
        "per_device_train_batch_size": 1,
        "max_length": max_length,
        "learning_rate": 1e-5,
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    config, kind = (SFTConfig, SFTTrainer) if variant.plain else (MISOSFTConfig, MISOSFTTrainer)
    if not variant.plain:
        common["verify"] = False  # checks before the first step are not part of a step
    trainer = (RowsTrainer if variant.rows else kind)(
        model, config(**common | variant.options), train_dataset=rows, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    if variant.rows:
        trainer.data_collator = RowsCollator(tokenizer.pad_token_id)
        trainer.model.set_attn_implementation("benchmark_rows")
    if variant.pairs:
        trainer.data_collator.window = 1  # so that batches have the fields of the pairs form
    return trainer


class RowsTrainer(MISOSFTTrainer):
    """MISOSFTTrainer on batches of `RowsCollator`, which need no MISO attention."""

    compute_loss = SFTTrainer.compute_loss


class StepTimer(TrainerCallback):
    """Run and time optimizer steps of a trainer.

    Attributes:
        seconds: Of the last step: data, forward, backward and optimizer.
        outside: Seconds of the last step in which neither the model nor the optimizer ran (data, collation, metadata, metrics).
        shares: Seconds of the last step spent on logging shares of attention.
        by_part: Whether `outside` and `shares` are measured. On a GPU that synchronizes around each part, which slows the
            step down.
    """

    def __init__(self, trainer: SFTTrainer, variant: Variant, device: str):
        self.trainer, self.device, self.by_part = trainer, device, device == "cpu"
        self.form = mixture.PairsForm if variant.pairs else mixture.SplitForm
        self.seconds = self.outside = self.shares = self._started = self._left = 0.0
        trainer.add_callback(self)
        trainer.model.register_forward_pre_hook(lambda *_: self._enter())
        trainer.model.register_forward_hook(lambda *_: self._leave())
        backward = trainer.accelerator.backward

        def timed_backward(*args: Any, **kwargs: Any) -> None:
            self._enter()
            backward(*args, **kwargs)
            self._leave()

        trainer.accelerator.backward = timed_backward

    def step(self) -> None:
        """One optimizer step over all rows."""
        self.outside = self.shares = 0.0
        with (
            patch.object(mixture, "SplitForm", self.form),
            patch.object(Shares, "add", self._counted(Shares.add)),
            patch.object(Shares, "means", self._counted(Shares.means)),
        ):
            self.trainer.train()

    def _counted(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `work` so that its seconds count as `shares`."""

        def counted(*args: Any) -> Any:
            if not self.by_part:
                return work(*args)
            synchronize(self.device)
            start = time.perf_counter()
            result = work(*args)
            synchronize(self.device)
            self.shares += time.perf_counter() - start
            return result

        return counted

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self._started = self._left = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self._started

    def _enter(self) -> None:
        """The model begins to run."""
        if self.by_part:
            synchronize(self.device)
            self.outside += time.perf_counter() - self._left

    def _leave(self) -> None:
        """The model has run."""
        if self.by_part:
            synchronize(self.device)
            self._left = time.perf_counter()


def batch_work(batch: dict[str, Any]) -> tuple[int, int]:
    """Tokens that a model computes on in a batch, padding included, and query-key pairs that attention scores per layer."""
    tokens = batch["input_ids"].numel()
    if "miso_cu_seqlens_q" in batch:
        packed = PackedSegments.from_batch(batch)
        mixed = packed.cross_call.score_pairs(causal=False) if packed.num_mixed else 0
        return tokens, packed.self_call.score_pairs(causal=True) + mixed
    if batch["input_ids"].shape[0] > 1 or "position_ids" not in batch:
        rows, width = batch["input_ids"].shape
        return tokens, rows * width * (width + 1) // 2
    return tokens, int((batch["position_ids"] + 1).sum())


@dataclass
class RowsCollator:
    """One example per batch: one row per context, each followed by its own copy of the output and padded on the right."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        (row,) = rows
        (example,) = decode(row["miso_layout"])
        example, (ids, labels) = unshare(example, [row["input_ids"], row["labels"]])
        lengths = [segment.length for segment in example.segments]
        output = ids[-lengths[-1] :] if example.branches else []
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        contexts = [ids[s : s + n] for s, n in zip(starts, lengths, strict=True)][: len(example.branches) or 1]
        width = max(map(len, contexts)) + len(output)
        input_ids = torch.full((len(contexts), width), self.pad_token_id)
        for i, context in enumerate(contexts):
            input_ids[i, : len(context) + len(output)] = torch.tensor(context + output)
        # The copies of the output have the same logits: only the first carries labels.
        row_labels = torch.full((len(contexts), width), -100)
        output_labels = labels[-lengths[-1] :]
        end = len(contexts[0]) + len(output)
        row_labels[0, end - len(output_labels) : end] = torch.tensor(output_labels)
        if output:
            row_labels[0, len(contexts[0])] = -100  # as packing does: it is predicted from a token of another segment
        positions = torch.arange(width).expand(len(contexts), -1)
        batch = {"input_ids": input_ids, "labels": row_labels, "position_ids": positions}
        return batch | {"rows_lengths": [len(context) for context in contexts], "rows_output": len(output)}


def _rows_attention(module, query, key, value, mask, scaling=None, rows_lengths=None, rows_output=0, **kwargs):
    """Causal attention per row, then the mean over the copies of each output token (uniform weighting)."""
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    out = out.transpose(1, 2)
    if rows_output:
        row = torch.arange(len(rows_lengths), device=out.device)[:, None]
        at = torch.tensor(rows_lengths, device=out.device)[:, None] + torch.arange(rows_output, device=out.device)
        mixed = out[row, at].mean(0)
        out = out.index_put((row, at), mixed.expand(len(rows_lengths), *mixed.shape))
    return out, None


AttentionInterface.register("benchmark_rows", _rows_attention)
AttentionMaskInterface.register("benchmark_rows", lambda **kwargs: None)
