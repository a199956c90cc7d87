"""What two ways of computing the same log-probabilities must agree on, whatever the model.

Both ways are exact, so they may differ by rounding only. The budget for that difference is measured on the model at hand:
multiply the embeddings by 1 +- r, where r is the relative rounding of the compute dtype, and take the root mean square change
s of the log-probabilities. The budget is 4 s, plus a floor for the head, which computes in float32. Exact ways were seen to
differ by at most 1.0 s (six architectures of 3 and 16 layers, float32 and bf16).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers.utils.logging import tqdm

from trl_miso.attention.state import adapters_at_work, in_eval_mode
from trl_miso.data.bins import ROW_LENGTHS
from trl_miso.data.collator import PLACES, MISODataCollator
from trl_miso.segments import WEIGHTINGS, PackedSegments
from trl_miso.verification.rows import (
    LONGEST,
    PreparedRow,
    example_of,
    first_context_row,
    length,
    reverse_contexts,
    unshared,
)

_NATS = "nats"
_LOGITS_AT_ONCE = 2**22  # of a piece in float64, which takes 32 MiB; a token of a vocabulary of 262,144 has 2**18


@dataclass(frozen=True)
class Check:
    """Result of one check: failed if `measured` exceeds `budget`.

    `status` is `"passed"`, `"failed"` or `"skipped"` (`note` gives the reason). `unit` is `"nats"` for the root mean square
    difference of the labelled tokens' log-probabilities, `"labels"` for a number of misplaced labels, or `"tokens"` for a
    number of tokens without gradient.
    """

    name: str
    status: str
    measured: float | None = None
    budget: float | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Verifier:
    """Checks that MISO is exact on a model that is wrapped for training.

    Args:
        model: Takes a batch and `fused_lm_head=True`, and returns `log_probs` and `label_mask` (TRL's fused head).
        embeddings: The model's input embeddings.
        collator: The collator of training.
        rows: Prepared rows of one example each, with several contexts in at least one where the data allows it; see `choose`.
        dtype: The compute dtype, which sets the size of rounding.
        definition: Returns a context manager within which the model attends by definition, see
            `transformers_attention.register_definition`.
        device: Device of the batches.
        gradients: Also check gradients. Not possible for sharded parameters outside a training step.
        progress: Show a progress bar with the name of the check under way.

    Attributes:
        forwarded: Number of tokens of each batch that the model was given.
    """

    model: nn.Module
    embeddings: nn.Module
    collator: MISODataCollator
    rows: Sequence[PreparedRow]
    dtype: torch.dtype
    definition: Callable[[], AbstractContextManager]
    device: torch.device
    gradients: bool = False
    progress: bool = False
    forwarded: list[int] = field(default_factory=list, init=False)

    def __call__(self) -> Iterator[Check]:
        """Run all checks, with the model in eval mode and its adapters at work. It and the random states stay as they are."""
        devices = [self.device] if self.device.type == "cuda" else []
        with in_eval_mode(self.model), adapters_at_work(self.model), torch.random.fork_rng(devices):
            yield from self._checks()

    def _checks(self) -> Iterator[Check]:
        checks: dict[str, Callable[[_Packed], _Result]] = {
            "loss matches the model's logits": self._loss_matches_logits,
            "one context matches plain attention": self._one_context_is_plain,
            "packing changes nothing": self._packing_changes_nothing,
            "prefix sharing changes nothing": self._sharing_changes_nothing,
            "kernel matches the definition": self._kernel_matches_definition,
            "context order changes nothing": self._order_changes_nothing,
            "examples do not see each other": self._examples_are_isolated,
            "no loss across boundaries": self._labels_are_in_place,
        }
        if self.gradients:
            checks["every token carries gradient"] = self._every_token_has_gradient
        with tqdm(checks.items(), "Verifying: rounding", leave=False, disable=not self.progress) as bar:
            log_probs = self.log_probs(self.rows)
            packed = _Packed(log_probs, self._budget(log_probs))
            for name, check in bar:
                bar.set_description(f"Verifying: {name}")
                yield check(packed).named(name)

    def _loss_matches_logits(self, packed: "_Packed") -> "_Result":
        return packed.within(self._fused_head_error(min(map(first_context_row, self.rows), key=length)))

    def _one_context_is_plain(self, packed: "_Packed") -> "_Result":
        rows = [first_context_row(row) for row in self.rows]
        by_miso = torch.cat([self.log_probs([row]) for row in rows])
        return packed.within(_distance(by_miso, torch.cat([self.log_probs([row], metadata=False) for row in rows])))

    def _packing_changes_nothing(self, packed: "_Packed") -> "_Result":
        return packed.agree(torch.cat([self.log_probs([row]) for row in self.rows]))

    def _sharing_changes_nothing(self, packed: "_Packed") -> "_Result":
        skip = self._why_not_unshare()
        if skip or not self.collator.share_prefixes:
            return _Result(note=skip or "share_prefixes is off")
        return packed.agree(self.log_probs([unshared(row) for row in self.rows]))

    def _order_changes_nothing(self, packed: "_Packed") -> "_Result":
        skip = self._why_not_unshare()
        if skip:
            return _Result(note=skip)
        return packed.agree(self.log_probs([reverse_contexts(row) for row in self.rows]))

    def _why_not_unshare(self) -> str:
        """Why not to give each context its own copy of its tokens; empty if that is possible and changes a row."""
        examples = [example_of(row) for row in self.rows]
        if not any(example.branches for example in examples):
            return "no row has several contexts"
        tokens = max(example.num_unshared_tokens for example in examples)
        return f"a row has {tokens:,} tokens without prefix sharing" if tokens > LONGEST else ""

    def log_probs(self, rows: Sequence[PreparedRow], metadata: bool = True) -> torch.Tensor:
        """Log-probabilities of the labelled tokens, in the order of the rows' tokens: float64 of shape (labels,).

        `metadata=False` leaves MISO's fields out of the batch, so that the model's own attention runs.
        """
        if not self.collator.share_prefixes:
            rows = [unshared(row) for row in rows]
        with torch.no_grad():
            return self._in_order(self._batch(rows, metadata), rows)

    def _in_order(self, batch: dict[str, Any], rows: Sequence[PreparedRow]) -> torch.Tensor:
        """Forward a batch; its order depends on the layout, and that of the result on the tokens of the rows only."""
        places = batch.pop(PLACES)
        labelled = places[(batch["labels"][0, places] != -100) & (places > 0)]
        by_token = self._forward(batch)[labelled.argsort().argsort()].cpu().double()
        order: list[int] = []
        for row in rows:
            sources = row.get("sources", range(len(row["labels"])))
            own = [source for source, label in zip(sources, row["labels"], strict=True) if label != -100 and source]
            order += [len(order) + at for at in sorted(range(len(own)), key=own.__getitem__)]
        return by_token[order] if len(order) == len(by_token) else by_token  # misplaced labels are a check of their own

    def _kernel_matches_definition(self, packed: "_Packed") -> "_Result":
        rows = [row for row in self.rows if example_of(row).num_unshared_tokens <= LONGEST]
        if not rows:
            note = f"no row has at most {LONGEST} tokens, and the definition computes all scores at once"
            return _Result(note=note)
        with self.definition():
            by_definition = torch.cat([self._log_probs_by_definition(row) for row in rows])
        by_kernel = packed.log_probs if len(rows) == len(self.rows) else self.log_probs(rows)
        return packed.within(_distance(by_definition, by_kernel))

    def _log_probs_by_definition(self, row: PreparedRow) -> torch.Tensor:
        """`log_probs` of one row, for a model that attends by definition."""
        if not self.collator.share_prefixes:
            row = unshared(row)
        # The definition takes the tokens in the row's own order.
        example, size = example_of(row), len(row["input_ids"])
        positions = [segment.start + i for segment in example.segments for i in range(segment.length)]
        columns = {"input_ids": row["input_ids"], "labels": row["labels"], "position_ids": positions}
        batch: dict[str, Any] = {name: torch.tensor([values]) for name, values in columns.items()}
        batch = send_to_device(batch | {PLACES: torch.arange(size)}, self.device)
        batch["miso_definition"] = tuple(row["miso_layout"])
        batch["miso_weighting"] = WEIGHTINGS.index(self.collator.weighting)
        with torch.no_grad():
            return self._in_order(batch, [row])

    def _batch(self, rows: Sequence[PreparedRow], metadata: bool = True) -> dict[str, Any]:
        if not self.collator.share_prefixes:
            rows = [unshared(row) for row in rows]
        batch = replace(self.collator, share_prefixes=True, keep_rows=True)(rows)
        if not metadata:
            batch = {name: value for name, value in batch.items() if not name.startswith("miso_") or name == PLACES}
        batch.pop(ROW_LENGTHS, None)
        return send_to_device(batch, self.device)

    def _run(self, batch: dict[str, Any], **options: bool) -> Any:
        self.forwarded.append(batch["input_ids"].numel())
        return self.model(**batch, use_cache=False, **options)

    def _forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities of the labelled tokens, in the order of the batch."""
        batch = {name: value for name, value in batch.items() if name != PLACES}
        outputs = self._run(batch, fused_lm_head=True)
        return outputs.log_probs[outputs.label_mask.bool()]

    def _fused_head_error(self, row: PreparedRow) -> float:
        """Distance of the log-probabilities that TRL computes from hidden states to those of the model's logits."""
        batch = self._batch([row])
        del batch[PLACES]
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = self._run(batch).logits[0, :-1]
        return _distance(exact_log_probs(logits, labels), self.log_probs([row]))

    def _budget(self, packed: torch.Tensor) -> float:
        """Largest difference that rounding explains, in nats; see the module's docstring."""
        float32_eps = torch.finfo(torch.float32).eps
        examples = [example_of(row) for row in self.rows]
        end = max(example.num_positions for example in examples)
        # Rotary angles are computed in float32, and their absolute rounding grows with the position.
        rounding = max(torch.finfo(self.dtype).eps, end * float32_eps / 2)
        with _hooked(self.embeddings, _Noise(rounding)):
            change = _distance(self.log_probs(self.rows), packed)
        floor = float32_eps * float(packed.abs().max())  # the head computes in float32
        return 4 * (change + floor)

    def _examples_are_isolated(self, packed: "_Packed") -> "_Result":
        """Change the tokens of the first example: the log-probabilities of the others must stay the same."""
        if len(self.rows) < 2:
            return _Result(note="there is only one row")
        first, *others = self.rows
        changed = first | {"input_ids": first["input_ids"][::-1]}
        start = sum(label != -100 for label in first["labels"][1:])
        return packed.within(_distance(self.log_probs([changed, *others])[start:], packed.log_probs[start:]))

    def _labels_are_in_place(self, packed: "_Packed") -> "_Result":
        """Count labels that would be predicted from another segment's last token, and labels that were lost or doubled."""
        batch = self._batch(self.rows)
        labelled = batch["labels"][0] != -100
        crossing = labelled[batch["miso_cu_seqlens_q"][:-1].long()].sum()
        expected = sum(label != -100 for row in self.rows for label in row["labels"][1:])
        return _Result(float(crossing + abs(labelled.sum() - expected)), 0.0, "labels")

    def _every_token_has_gradient(self, packed: "_Packed") -> "_Result":
        """Count tokens whose embedding has no gradient, of those that a labelled token depends on."""
        batch = self._batch(self.rows)
        leaf = _Leaf()
        with _hooked(self.embeddings, leaf):
            (gradient,) = torch.autograd.grad(self._forward(batch).sum(), [leaf.out])
        idle = (gradient[0] == 0).all(dim=-1) & self._predicts(batch)
        return _Result(float(idle.sum()), 0.0, "tokens")

    @staticmethod
    def _predicts(batch: dict[str, Any]) -> torch.Tensor:
        """(T,) bool: whether a labelled token depends on a token: a context's, or one before a label on its path."""
        packed = PackedSegments.from_batch(batch)
        assert packed is not None
        labelled, bounds = batch["labels"][0] != -100, packed.cu_seqlens_q.tolist()
        keys = torch.arange(len(labelled)) if packed.kv_index is None else packed.kv_index.cpu()
        key_bounds = packed.cu_seqlens_k.tolist()
        predicts = torch.zeros_like(labelled)
        for i, (start, end) in enumerate(pairwise(bounds)):
            places = labelled[start:end].nonzero()
            if len(places):
                seen = keys[key_bounds[i] : key_bounds[i + 1]]  # ancestors, then the segment itself
                predicts[seen[: len(seen) - (end - start) + int(places[-1])]] = True
        predicts[: packed.output_start] = True
        return predicts


class _Result(NamedTuple):
    """A check without its name; one without a measurement was skipped."""

    measured: float | None = None
    budget: float | None = None
    unit: str = ""
    note: str = ""

    def named(self, name: str) -> Check:
        if self.measured is None or self.budget is None:
            return Check(name, "skipped", note=self.note)
        return Check(name, "passed" if self.measured <= self.budget else "failed", *self)


class _Packed(NamedTuple):
    """What the checks compare with: the log-probabilities of all rows in one batch, and the largest difference allowed."""

    log_probs: torch.Tensor
    budget: float

    def within(self, measured: float) -> _Result:
        return _Result(measured, self.budget, _NATS)

    def agree(self, log_probs: torch.Tensor) -> _Result:
        return self.within(_distance(log_probs, self.log_probs))


def exact_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the labels that are not -100, from logits of shape (T, vocabulary): float64 of shape (labels,).

    Computed in float64, since a sum in float32 over 262,144 entries is off by 1e-5; in pieces, since a long row's logits in float64
    would take more memory than training.
    """
    if logits.device.type == "mps":  # which has no float64
        logits, labels = logits.cpu(), labels.cpu()
    pieces = (labels != -100).nonzero()[:, 0].split(max(1, _LOGITS_AT_ONCE // logits.shape[-1]))
    log_probs = [logits[at].double().log_softmax(-1).gather(-1, labels[at, None])[:, 0] for at in pieces]
    return torch.cat(log_probs).cpu()


class _Noise:
    """Forward hook: multiply the output by 1 +- `size`, with signs drawn from a fixed seed."""

    def __init__(self, size: float):
        self.size = size

    def __call__(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, out.shape, generator=generator).to(out.device) * 2 - 1
        return (out.to(torch.promote_types(out.dtype, torch.float32)) * (1 + self.size * signs)).to(out.dtype)


class _Leaf:
    """Forward hook: make the output a leaf of the graph, and keep it to differentiate by."""

    out: torch.Tensor

    def __call__(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        self.out = out.detach().requires_grad_()
        return self.out


@contextmanager
def _hooked(module: nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the differences; infinite for unequal shapes and for NaN."""
    if a.shape != b.shape:
        return math.inf
    distance = float((a - b).square().mean().sqrt())
    return distance if math.isfinite(distance) else math.inf
