"""What two ways of computing the same log-probabilities must agree on, whatever the model.

Both ways are exact, so they may differ by rounding only. The budget for that difference is measured on the model at hand:
multiply the embeddings by 1 +- r, where r is the relative rounding of the compute dtype, and take the root mean square change
s of the log-probabilities. The budget is 4 s, plus a floor for the head, which computes in float32. Exact ways were seen to
differ by at most 1.0 s (six architectures of 3 and 16 layers, float32 and bf16).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from trl_miso.attention.state import in_eval_mode
from trl_miso.data.bins import ROW_LENGTHS
from trl_miso.data.collator import PLACES, MISODataCollator
from trl_miso.segments import WEIGHTINGS, Example, PackedSegments, decode, encode, single, unshare, unshare_row

# `input_ids`, `labels` and `miso_layout` of a single example; `sources` of a row with copies: the token that each copies.
PreparedRow = dict[str, list[int]]
LONGEST = 4096  # tokens of a row for which all attention scores at once, or all contexts unshared, fit in memory
_NATS = "nats"


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
        """Run all checks, with the model in eval mode. It and the random states stay as they are."""
        devices = [self.device] if self.device.type == "cuda" else []
        with in_eval_mode(self.model), torch.random.fork_rng(devices):
            yield from self._checks()

    def _checks(self) -> Iterator[Check]:
        packed = self.log_probs(self.rows)
        budget = self._budget(packed)
        causal_rows = [_first_context_row(row) for row in self.rows]

        def compare(name: str, a: torch.Tensor, b: torch.Tensor) -> Check:
            return _check(name, _distance(a, b), budget, _NATS)

        yield _check(
            "loss matches the model's logits", self._fused_head_error(min(causal_rows, key=_length)), budget, _NATS
        )
        yield compare(
            "one context matches plain attention",
            torch.cat([self.log_probs([row]) for row in causal_rows]),
            torch.cat([self.log_probs([row], metadata=False) for row in causal_rows]),
        )
        yield compare("packing changes nothing", torch.cat([self.log_probs([row]) for row in self.rows]), packed)
        skip = self._why_not_unshare()
        if skip or not self.collator.share_prefixes:
            yield Check("prefix sharing changes nothing", "skipped", note=skip or "share_prefixes is off")
        else:
            yield compare(
                "prefix sharing changes nothing", self.log_probs([_unshared(row) for row in self.rows]), packed
            )
        yield self._kernel_matches_definition(budget)
        if skip:
            yield Check("context order changes nothing", "skipped", note=skip)
        else:
            reversed_rows = [_reverse_contexts(row) for row in self.rows]
            yield compare("context order changes nothing", self.log_probs(reversed_rows), packed)
        yield self._examples_are_isolated(packed, budget)
        yield self._labels_are_in_place()
        if self.gradients:
            yield self._every_token_has_gradient()

    def _why_not_unshare(self) -> str:
        """Why not to give each context its own copy of its tokens; empty if that is possible and changes a row."""
        examples = [_example_of(row) for row in self.rows]
        if not any(example.branches for example in examples):
            return "no row has several contexts"
        tokens = max(example.num_unshared_tokens for example in examples)
        return f"a row has {tokens:,} tokens without prefix sharing" if tokens > LONGEST else ""

    def log_probs(self, rows: Sequence[PreparedRow], metadata: bool = True) -> torch.Tensor:
        """Log-probabilities of the labelled tokens, in the order of the rows' tokens: float64 of shape (labels,).

        `metadata=False` leaves MISO's fields out of the batch, so that the model's own attention runs.
        """
        if not self.collator.share_prefixes:
            rows = [_unshared(row) for row in rows]
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

    def _kernel_matches_definition(self, budget: float) -> Check:
        name = "kernel matches the definition"
        rows = [row for row in self.rows if _example_of(row).num_unshared_tokens <= LONGEST]
        if not rows:
            note = f"no row has at most {LONGEST} tokens, and the definition computes all scores at once"
            return Check(name, "skipped", note=note)
        with self.definition():
            by_definition = torch.cat([self._log_probs_by_definition(row) for row in rows])
        return _check(name, _distance(by_definition, self.log_probs(rows)), budget, _NATS)

    def _log_probs_by_definition(self, row: PreparedRow) -> torch.Tensor:
        """`log_probs` of one row, for a model that attends by definition."""
        if not self.collator.share_prefixes:
            row = _unshared(row)
        # The definition takes the tokens in the row's own order.
        example, size = _example_of(row), len(row["input_ids"])
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
            rows = [_unshared(row) for row in rows]
        batch = replace(self.collator, share_prefixes=True, keep_rows=True)(rows)
        if not metadata:
            batch = {name: value for name, value in batch.items() if not name.startswith("miso_") or name == PLACES}
        batch.pop(ROW_LENGTHS, None)
        return send_to_device(batch, self.device)

    def _forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities of the labelled tokens, in the order of the batch."""
        batch = {name: value for name, value in batch.items() if name != PLACES}
        outputs = self.model(**batch, use_cache=False, fused_lm_head=True)
        return outputs.log_probs[outputs.label_mask.bool()]

    def _fused_head_error(self, row: PreparedRow) -> float:
        """Distance of the log-probabilities that TRL computes from hidden states to those of the model's logits."""
        batch = self._batch([row])
        del batch[PLACES]
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = self.model(**batch, use_cache=False).logits[0, :-1][labels != -100]
        log_probs = logits.float().log_softmax(-1).gather(-1, labels[labels != -100, None])[:, 0]
        return _distance(log_probs.cpu().double(), self.log_probs([row]))

    def _budget(self, packed: torch.Tensor) -> float:
        """Largest difference that rounding explains, in nats; see the module's docstring."""
        float32_eps = torch.finfo(torch.float32).eps
        examples = [_example_of(row) for row in self.rows]
        end = max(example.num_positions for example in examples)
        # Rotary angles are computed in float32, and their absolute rounding grows with the position.
        rounding = max(torch.finfo(self.dtype).eps, end * float32_eps / 2)
        with _hooked(self.embeddings, _Noise(rounding)):
            change = _distance(self.log_probs(self.rows), packed)
        floor = float32_eps * float(packed.abs().max())  # the head computes in float32
        return 4 * (change + floor)

    def _examples_are_isolated(self, packed: torch.Tensor, budget: float) -> Check:
        """Change the tokens of the first example: the log-probabilities of the others must stay the same."""
        name = "examples do not see each other"
        if len(self.rows) < 2:
            return Check(name, "skipped", note="there is only one row")
        first, *others = self.rows
        changed = first | {"input_ids": first["input_ids"][::-1]}
        start = len(self.log_probs([first]))
        change = _distance(self.log_probs([changed, *others])[start:], packed[start:])
        return _check(name, change, budget, _NATS)

    def _labels_are_in_place(self) -> Check:
        """Count labels that would be predicted from another segment's last token, and labels that were lost or doubled."""
        batch = self._batch(self.rows)
        labelled = batch["labels"][0] != -100
        crossing = labelled[batch["miso_cu_seqlens_q"][:-1].long()].sum()
        expected = sum(label != -100 for row in self.rows for label in row["labels"][1:])
        return _check("no loss across boundaries", float(crossing + abs(labelled.sum() - expected)), 0.0, "labels")

    def _every_token_has_gradient(self) -> Check:
        """Count tokens whose embedding has no gradient, of those that a labelled token depends on."""
        batch = self._batch(self.rows)
        leaf = _Leaf()
        with _hooked(self.embeddings, leaf):
            (gradient,) = torch.autograd.grad(self._forward(batch).sum(), [leaf.out])
        idle = (gradient[0] == 0).all(dim=-1) & self._predicts(batch)
        return _check("every token carries gradient", float(idle.sum()), 0.0, "tokens")

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


def choose(rows: Iterable[dict[str, Any]], count: int) -> list[PreparedRow]:
    """Choose up to `count` examples with labels from prepared rows or bins, one row per example.

    Prefers examples of at most `LONGEST` tokens, then examples with several contexts. Those with several contexts come first in
    the result, which is their order in a batch.
    """
    examples: list[PreparedRow] = []
    for row in chain.from_iterable(map(_split_examples, rows)):
        if any(label != -100 for label in row["labels"][1:]):
            examples.append(row)
    examples.sort(key=lambda row: (_example_of(row).num_unshared_tokens > LONGEST, not _example_of(row).branches))
    return sorted(examples[:count], key=lambda row: not _example_of(row).branches)


def _split_examples(row: dict[str, Any]) -> Iterator[PreparedRow]:
    """One row per example of a prepared row."""
    examples = list(decode(row["miso_layout"])) if "miso_layout" in row else [single(len(row["input_ids"]))]
    ends = list(accumulate(example.num_tokens for example in examples))
    for example, end in zip(examples, ends, strict=True):
        span = slice(end - example.num_tokens, end)
        yield _make_row(row["input_ids"][span], row.get("labels", row["input_ids"])[span], example)


def _make_row(ids: Sequence[int], labels: Sequence[int], example: Example) -> PreparedRow:
    return {"input_ids": list(ids), "labels": list(labels), "miso_layout": encode(example)}


def _example_of(row: PreparedRow) -> Example:
    return next(decode(row["miso_layout"]))


def _length(row: PreparedRow) -> int:
    return len(row["input_ids"])


def _first_context_row(row: PreparedRow) -> PreparedRow:
    """The first context and its output, or else the first run with labels, as one causal run: as in plain SFT."""
    row = _unshared(row)
    example, bounds = _example_of(row), _bounds(row)
    if example.outputs:
        output = example.outputs[0]
        parts = [output.branches[0].segment, output.segment]
    else:
        runs = enumerate(pairwise(bounds))
        parts = [next(s for s, (a, b) in runs if any(label != -100 for label in row["labels"][a + 1 : b]))]
    row = _select(row, parts, example)
    return _make_row(row["input_ids"], row["labels"], single(len(row["input_ids"])))


def _reverse_contexts(row: PreparedRow) -> PreparedRow:
    """Each output's contexts in reverse order, each with its own copy of its tokens."""
    row = _unshared(row)
    example = _example_of(row)
    order = list(range(len(example.segments)))
    outputs = []
    for output in example.outputs:
        # The contexts of an output stand before it, one segment each.
        first, last = output.branches[0].segment, output.segment
        order[first:last] = order[first:last][::-1]
        branches = [branch._replace(segment=s) for s, branch in enumerate(output.branches[::-1], start=first)]
        outputs.append(output._replace(branches=tuple(branches)))
    segments = tuple([example.segments[s] for s in order])
    return _select(row, order, Example(segments, tuple(outputs)))


def _bounds(row: PreparedRow) -> list[int]:
    """Where each segment of a row begins, and where the last ends."""
    return list(accumulate((segment.length for segment in _example_of(row).segments), initial=0))


def _select(row: PreparedRow, segments: Sequence[int], example: Example) -> PreparedRow:
    """The row with these of its segments, in this order, laid out as `example`."""
    bounds = _bounds(row)
    selected: PreparedRow = {"miso_layout": encode(example)}
    for name in ("input_ids", "labels", "sources"):
        selected[name] = list(chain.from_iterable(row[name][bounds[s] : bounds[s + 1]] for s in segments))
    return selected


def _unshared(row: PreparedRow) -> PreparedRow:
    """The row with a copy of its tokens for every context and run."""
    example, ids, labels = unshare_row(_example_of(row), row["input_ids"], row["labels"])
    sources = row.get("sources", list(range(len(row["input_ids"]))))
    return _make_row(ids, labels, example) | {"sources": unshare(_example_of(row), [sources])[1][0]}


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


def _check(name: str, measured: float, budget: float, unit: str) -> Check:
    return Check(name, "passed" if measured <= budget else "failed", measured, budget, unit)
