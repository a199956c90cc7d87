"""Identities that hold for the mixture whatever the model: each is two ways to compute the same log-probabilities.

Two ways differ by rounding. How much rounding moves *this* model's log-probabilities is measured, not assumed: the
embeddings are multiplied by 1 +- r, with r the relative rounding of the compute dtype, and the change s is noted. Exact ways
were seen to differ by up to 1.0 s (six architectures of 3 and 16 layers, float32 and bf16); the budget is 4 s.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn

from trl_miso.data.collator import MISODataCollator
from trl_miso.segments import Branch, Example, decode, encode, single, unshare

PreparedRow = dict[str, list[int]]  # prepared, of one example
LONGEST = 4096  # tokens of a row whose scores fit in memory, all at once
_NATS = "nats"


@dataclass(frozen=True)
class Check:
    """One identity; it failed if `measured` exceeds `budget`.

    `status` is `"passed"`, `"failed"` or `"skipped"` (`note` says why). `unit` is `"nats"`, the root mean square over the labelled
    tokens' log-probabilities; `"labels"` on a wrong token; or `"tokens"` without gradient.
    """

    name: str
    status: str
    measured: float | None = None
    budget: float | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Verifier:
    """Checks MISO on a model, as it is wrapped for training.

    Args:
        model: Takes a batch and `fused_lm_head=True`, and returns `log_probs` and `label_mask` (TRL's fused head).
        embeddings: The model's input embeddings.
        collator: As in training.
        rows: Prepared rows of one example each, of which at least one has several contexts where any has; see `choose`.
        dtype: What the model computes in.
        definition: Switches the model to attention by its definition (`adapter.register_definition`), while it is entered.
        device: Where batches go.
        gradients: Whether gradients can be asked for outside a training step (not of sharded parameters).
    """

    model: nn.Module
    embeddings: nn.Module
    collator: MISODataCollator
    rows: Sequence[PreparedRow]
    dtype: torch.dtype
    definition: Callable[[], AbstractContextManager]
    device: torch.device
    gradients: bool = False

    def __call__(self) -> Iterator[Check]:
        """Run all checks. The model is in eval mode while they run; neither weights nor random states change."""
        training, devices = self.model.training, [self.device] if self.device.type == "cuda" else []
        self.model.eval()
        try:
            with torch.random.fork_rng(devices):
                yield from self._checks()
        finally:
            self.model.train(training)

    def _checks(self) -> Iterator[Check]:
        packed = self.log_probs(self.rows)
        budget = self._budget(packed)
        mixed = [row for row in self.rows if _example(row).branches]
        alone = [_alone(row) for row in self.rows]

        def equal(name: str, other: torch.Tensor, to: torch.Tensor = packed) -> Check:
            return _check(name, _distance(other, to), budget, _NATS)

        yield _check("the loss is the model's own", self._of_fused_head(min(alone, key=_length)), budget, _NATS)
        yield equal(
            "one context is plain attention",
            torch.cat([self.log_probs([row]) for row in alone]),
            torch.cat([self.log_probs([row], metadata=False) for row in alone]),
        )
        yield equal("packed is separate", torch.cat([self.log_probs([row]) for row in self.rows]))
        written_out = max(_example(row).num_unshared_tokens for row in self.rows)
        why = "" if mixed else "no row has several contexts"
        if written_out > LONGEST:
            why = why or f"a row of {written_out:,} tokens without sharing"
        unsharing = why or ("" if self.collator.share_prefixes else "share_prefixes is off")
        if unsharing:
            yield Check("shared is unshared", "skipped", note=unsharing)
        else:
            yield equal("shared is unshared", self.log_probs(self.rows, replace(self.collator, share_prefixes=False)))
        yield self._is_definition(budget)
        if why:
            yield Check("contexts in any order", "skipped", note=why)
        else:
            yield equal("contexts in any order", self.log_probs([_reordered(row) for row in self.rows]))
        yield self._isolated(packed, budget)
        yield self._labels_within_outputs()
        if self.gradients:
            yield self._every_token_counts()

    def log_probs(
        self, rows: Sequence[PreparedRow], collator: MISODataCollator | None = None, metadata: bool = True
    ) -> torch.Tensor:
        """(labels,) float64 log-probabilities of the labelled tokens, in order; without metadata by ordinary attention."""
        with torch.no_grad():
            return self._forward(self._batch(rows, collator, metadata)).cpu().double()

    def _is_definition(self, budget: float) -> Check:
        name = "the kernel is the definition"
        rows = [row for row in self.rows if _example(row).num_unshared_tokens <= LONGEST]
        if not rows:
            return Check(name, "skipped", note=f"no row of at most {LONGEST} tokens: the definition is dense")
        with self.definition():
            defined = torch.cat([self._defined(row) for row in rows])
        return _check(name, _distance(defined, self.log_probs(rows)), budget, _NATS)

    def _defined(self, row: PreparedRow) -> torch.Tensor:
        """As `log_probs`, of a model that attends by the definition."""
        batch = self._batch([row], replace(self.collator, pad_to_multiple_of=None))
        example = _example(row) if self.collator.share_prefixes else unshare(_example(row), [])[0]
        with torch.no_grad():
            return self._forward(batch | {"miso_definition": tuple(encode(example))}).cpu().double()

    def _batch(
        self, rows: Sequence[PreparedRow], collator: MISODataCollator | None = None, metadata: bool = True
    ) -> dict[str, Any]:
        batch = (collator or self.collator)(rows)
        return {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if metadata or not name.startswith("miso_")
        }

    def _forward(self, batch: dict[str, Any]) -> torch.Tensor:
        outputs = self.model(**batch, use_cache=False, fused_lm_head=True)
        return outputs.log_probs[outputs.label_mask.bool()]

    def _of_fused_head(self, row: PreparedRow) -> float:
        """How far the log-probabilities that TRL computes from hidden states are from those of the model's logits."""
        batch = self._batch([row])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = self.model(**batch, use_cache=False).logits[0, :-1][labels != -100]
        own = logits.float().log_softmax(-1).gather(-1, labels[labels != -100, None])[:, 0]
        return _distance(own.cpu().double(), self.log_probs([row]))

    def _budget(self, packed: torch.Tensor) -> float:
        """See the module's docstring. Angles of long positions are rounded more coarsely than anything in float32."""
        longest = max(_example(row).end(len(_example(row).segments) - 1) for row in self.rows)
        rounding = max(torch.finfo(self.dtype).eps, longest * torch.finfo(torch.float32).eps / 2)
        with _hooked(self.embeddings, _Noise(rounding)):
            moved = _distance(self.log_probs(self.rows), packed)
        floor = torch.finfo(torch.float32).eps * float(packed.abs().max())  # of the head, which is in float32
        return 4 * (moved + floor)

    def _isolated(self, packed: torch.Tensor, budget: float) -> Check:
        """Other tokens in the first example leave the log-probabilities of those after it as they are."""
        name = "examples do not see each other"
        if len(self.rows) < 2:
            return Check(name, "skipped", note="one row")
        first, *others = self.rows
        changed = first | {"input_ids": first["input_ids"][::-1]}
        start = len(self.log_probs([first]))
        moved = _distance(self.log_probs([changed, *others])[start:], packed[start:])
        return _check(name, moved, budget, _NATS)

    def _labels_within_outputs(self) -> Check:
        """No label is predicted from another segment's token, and none is on a context."""
        batch = self._batch(self.rows)
        labelled = batch["labels"][0] != -100
        crossing = labelled[batch["miso_cu_seqlens_q"][:-1].long()].sum()
        in_contexts = labelled[: batch.get("miso_output_start", 0)].sum()
        return _check("no loss across boundaries", float(crossing + in_contexts), 0.0, "labels")

    def _every_token_counts(self) -> Check:
        """Every token that something is predicted from carries gradient: all but those after the last label."""
        batch = self._batch(self.rows)
        leaf = _Leaf()
        with _hooked(self.embeddings, leaf):
            (gradient,) = torch.autograd.grad(self._forward(batch).sum(), [leaf.out])
        idle = (gradient[0] == 0).all(dim=-1) & self._predicts(batch)
        return _check("every token carries gradient", float(idle.sum()), 0.0, "tokens")

    @staticmethod
    def _predicts(batch: dict[str, Any]) -> torch.Tensor:
        """(T,) whether a label comes after a token in its segment, or the token is a context's."""
        labelled, bounds = batch["labels"][0] != -100, batch["miso_cu_seqlens_q"].tolist()
        predicts = torch.zeros_like(labelled)
        for start, end in zip(bounds, bounds[1:], strict=False):
            after = labelled[start:end].flip(0).cumsum(0).flip(0) > 0
            predicts[start : end - 1] = after[1:]
        predicts[: batch.get("miso_output_start", 0)] = True
        return predicts


def choose(rows: Iterable[dict[str, Any]], count: int) -> list[PreparedRow]:
    """Up to `count` examples, with labels, of prepared rows or bins: of several contexts first, of over `LONGEST` tokens last."""
    examples = [
        row for row in chain.from_iterable(map(_split, rows)) if any(label != -100 for label in row["labels"][1:])
    ]
    examples.sort(key=lambda row: (_example(row).num_unshared_tokens > LONGEST, not _example(row).branches))
    return sorted(examples[:count], key=lambda row: not _example(row).branches)  # as they are laid out in a batch


def _split(row: dict[str, Any]) -> Iterator[PreparedRow]:
    """The examples of a prepared row, each a row."""
    examples = list(decode(row["miso_layout"])) if "miso_layout" in row else [single(len(row["input_ids"]))]
    ends = list(accumulate(example.num_tokens for example in examples))
    for example, end in zip(examples, ends, strict=True):
        span = slice(end - example.num_tokens, end)
        yield _row(row["input_ids"][span], row.get("labels", row["input_ids"])[span], example)


def _row(ids: Sequence[int], labels: Sequence[int], example: Example) -> PreparedRow:
    return {"input_ids": list(ids), "labels": list(labels), "miso_layout": encode(example)}


def _example(row: PreparedRow) -> Example:
    return next(decode(row["miso_layout"]))


def _length(row: PreparedRow) -> int:
    return len(row["input_ids"])


def _alone(row: PreparedRow) -> PreparedRow:
    """The first context and the output as one causal run: plain SFT."""
    example, (ids, labels) = unshare(_example(row), [row["input_ids"], row["labels"]])
    first, rest = example.segments[0].length, sum(segment.length for segment in example.segments[:-1])
    if not example.branches:
        return row
    return _row(ids[:first] + ids[rest:], labels[:first] + labels[rest:], single(len(ids) - rest + first))


def _reordered(row: PreparedRow) -> PreparedRow:
    """The same contexts, last first, each with its own copy of its tokens."""
    example, columns = unshare(_example(row), [row["input_ids"], row["labels"]])
    if not example.branches:
        return row
    *contexts, output = example.segments
    ends = list(accumulate(segment.length for segment in contexts))
    spans = [slice(end - segment.length, end) for segment, end in zip(contexts, ends, strict=True)]
    ids, labels = ([t for span in reversed(spans) for t in column[span]] + column[ends[-1] :] for column in columns)
    branches = tuple(Branch(i, 0, branch.weight) for i, branch in enumerate(reversed(example.branches)))
    return _row(ids, labels, Example((*reversed(contexts), output), branches))


class _Noise:
    """Forward hook: multiplies what comes out by 1 +- size."""

    def __init__(self, size: float):
        self.size = size

    def __call__(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, out.shape, generator=generator).to(out.device) * 2 - 1
        return (out.to(torch.promote_types(out.dtype, torch.float32)) * (1 + self.size * signs)).to(out.dtype)


class _Leaf:
    """Forward hook: keeps what comes out, so that gradients with respect to it can be asked for."""

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
    """Root mean square of the differences; infinite where the two are not of one size, or not numbers."""
    if a.shape != b.shape:
        return math.inf
    distance = float((a - b).square().mean().sqrt())
    return distance if math.isfinite(distance) else math.inf


def _check(name: str, measured: float, budget: float, unit: str) -> Check:
    return Check(name, "passed" if measured <= budget else "failed", measured, budget, unit)
