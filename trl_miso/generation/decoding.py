"""Attention during generation: new tokens attend to the contexts, which were read once before, and to the output so far.

The protocol of a generation, per layer:

1. *Read the contexts once.* A forward over all packed contexts, with the batch keys of `PackedSegments` and `miso_cache`. The
   attention is causal as in training. `ContextCache.read` keeps the layer's keys and values, turned to the output's view.
2. *Attend per token.* Forwards with `miso_cache` alone. `ContextCache.attend` computes q -> K_out and q -> K_p for every part p of
   the contexts (`context_parts.py`), and merges both as `merge.py` describes (eqs. 3, 4, 7).

A forward without `miso_cache` (probes, other inputs) uses MISO attention as in training. Nothing here is differentiated.

Shapes: B rows that generate (requests x copies), U = B x new output tokens, Q branch rows, R rows of the parts' call, E pairs of
a part row and a branch row, H query heads, G key-value heads, D head dimension.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from trl_miso.attention.kernels import Kernel, KernelOptions, resolve_kernel
from trl_miso.attention.merge import (
    attention_shares,
    branch_weights,
    gather_keys,
    logsumexp_by_row,
    sum_by_row,
    sum_over_branches,
)
from trl_miso.attention.rotation import rotation_of
from trl_miso.attention.transformers_attention import compute_dtype, equal_head_sizes, register_over, score_scale
from trl_miso.generation.context_parts import KeysAndValues, Parts
from trl_miso.segments import Example
from trl_miso.segments.packed import WEIGHTINGS, PackedSegments, Varlen, cumulative_lengths, ranges


def register_decoding(base: str) -> str:
    """Register the attention of generation over a base implementation and return its name, see `register_miso_attention`."""
    return register_over(base, "decoding", partial(_attention_forward, base=base))


class ContextCache(DynamicCache):
    """Keys and values of a generation: those of the contexts per attention module, those of the outputs as in DynamicCache.

    All rows of a request (samples, beams) share the keys of its contexts, and contexts share those of common prefixes as far as
    `context_parts.py` allows. The cache's length is that of the ids that `generate` sees: `before` ids in place of the contexts, then
    the output. Every layer keeps all of the output, whatever its window.

    Args:
        examples: Per request, its contexts and an output of one token.
        weighting: One of `WEIGHTINGS`.
        before: Number of ids that stand for the contexts in each row.
        layers: Number of attention layers of the model.
        windows: Whether the window of a layer can bind during the generation.
    """

    def __init__(self, examples: Sequence[Example], weighting: str, before: int, layers: int, windows: bool):
        super().__init__()
        self._layers, self._windows = layers, windows
        self._requests, self._weighting, self._before = len(examples), weighting, before
        self._parts = Parts(examples)
        self._lengths = self._parts.branch_lengths
        self._longest = int(self._lengths.max())
        self._calls: dict[torch.device, Varlen] = {}
        self._settings: dict[nn.Module, tuple[Kernel, KernelOptions]] = {}
        self._kept: dict[nn.Module, KeysAndValues] = {}  # of all parts
        self._in_window: dict[nn.Module, KeysAndValues] = {}  # of each branch, as far as its window reaches
        self._steps: dict[tuple[int, torch.device], _Step] = {}
        self._attended: set[nn.Module] = set()

    def check_attended(self) -> None:
        """Raise RuntimeError unless every attention layer has attended to the contexts since they were read."""
        if len(self._attended) < self._layers:
            raise RuntimeError(
                f"Got an output for which {len(self._attended)} of {self._layers} attention layers read the contexts, expected all: "
                f"`generate` of transformers {transformers.__version__} does not hand their cache to the model. Fix: install a "
                "version of transformers that trl-miso admits."
            )

    @property
    def is_linear(self) -> list[bool]:
        """For transformers 5.24, which feeds all ids to a cache whose layers are all linear, as those of an empty list are."""
        return [False] * self._layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._before + super().get_seq_length(layer_idx)

    def read(
        self,
        module: nn.Module,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        kernel: Kernel,
        options: KernelOptions,
    ) -> torch.Tensor | None:
        """Keep a layer's keys and values of all contexts, and the kernel and options with which it attends.

        Returns:
            None if the caller is to compute the contexts' attention as in training. For the last layer, whose attention nothing
            reads, zeros (T, H, D).

        Raises:
            ValueError: For a module that attends more than once in a forward.
        """
        if module in self._settings:
            raise ValueError(
                f"Got a model in which {type(module).__name__} attends more than once in a layer, expected one attention per layer, "
                "whose keys are kept. Fix: use another model."
            )
        device = k_TGD.device
        if device not in self._calls:
            self._calls[device] = self._parts.call(device)
        self._kept[module] = gather_keys(k_TGD, v_TGD, self._calls[device], rotation_of(module))
        self._settings[module] = kernel, options if self._windows else replace(options, window=0)
        if len(self._settings) == self._layers:
            return torch.zeros_like(q_THD)
        return None

    def attend(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of new output tokens: `sum_i w_i softmax(q [K_i, K_out]^T) [V_i, V_out]`, each branch causal and windowed.

        Args:
            query: (B, H, new, D), the last tokens of the outputs.
            key, value: (B, G, seen, D), all tokens of the outputs.

        Returns:
            (B, new, H, D).
        """
        kernel, options = self._settings[module]
        self._attended.add(module)
        batch, _, new, _ = query.shape
        # A window binds if the longest context with its output is longer.
        window = options.window if options.window < self._longest + key.shape[2] else 0
        if window:
            # The first new token sees `window` keys, the last of them itself.
            key, value = (x[:, :, -(window + new - 1) :] for x in (key, value))
        step = self._step(batch, new, key.shape[2], window, query.device)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        if window:
            out = _attend_pairs(q, k, v, self._keys_in_window(module, window), step.packed, kernel, options)
        else:
            out = _attend_split(q, k, v, self._kept[module], step, kernel, replace(options, window=0))
        return out.unflatten(0, (batch, new))

    def _keys_in_window(self, module: nn.Module, window: int) -> KeysAndValues:
        """Keys and values of the branches one after the other, of each branch the last that its window can reach from now on."""
        if module in self._kept:
            k, v = self._kept.pop(module)
            keys = torch.from_numpy(self._parts.last_keys(window)).to(k.device)
            self._in_window[module] = k.index_select(0, keys), v.index_select(0, keys)
        return self._in_window[module]

    def _step(self, batch: int, new: int, seen: int, window: int, device: torch.device) -> "_Step":
        """Metadata of a forward, shared by its layers; from one token to the next only the lengths of the outputs change."""
        step = self._steps.get((window, device))
        if step is None or step.shape != (batch, new):
            step = self._new_step(batch, new, device)
        elif step.packed.max_seqlen_k == seen:
            return step
        step.packed = replace(step.packed, cu_seqlens_k=_equal_ends(batch, seen, device), max_seqlen_k=seen)
        if window:
            self._add_pairs(step.packed, batch // self._requests, np.minimum(self._lengths, window), device)
        self._steps[window, device] = step
        return step

    def _new_step(self, batch: int, new: int, device: torch.device) -> "_Step":
        """Metadata that does not depend on the length of the outputs, in the form that `pack` makes for outputs."""
        parts = self._parts
        span = batch // self._requests * new  # rows of a part or branch: the new tokens of every copy of its request

        def rows_of(index: np.ndarray) -> torch.Tensor:
            return torch.from_numpy((index[:, None] * span + np.arange(span)).ravel()).to(device)

        packed = PackedSegments(
            cu_seqlens_q=_equal_ends(batch, new, device),
            cu_seqlens_k=_equal_ends(batch, 0, device),
            max_seqlen_q=new,
            max_seqlen_k=0,
            num_examples=self._requests,
            num_mixed=self._requests,
            weighting=WEIGHTINGS.index(self._weighting),
            output_end=batch * new,
            branch_q_index=rows_of(parts.branch_request),
            branch_weight=torch.from_numpy(parts.weights).view(torch.int64).to(device).repeat_interleave(span),
        )
        queries = _equal_ends(len(parts.lengths), span, device)
        keys = cumulative_lengths(parts.lengths).to(device)
        call = Varlen(queries, keys, span, int(parts.lengths.max()))
        return _Step(
            (batch, new),
            packed,
            call,
            rows_of(parts.request),
            pair_part=rows_of(parts.part),
            pair_branch=rows_of(parts.branch),
        )

    def _add_pairs(self, packed: PackedSegments, copies: int, lengths: np.ndarray, device: torch.device) -> None:
        """Fill in the pairs call: each copy of a branch reads the kept keys of the branch, then those of its output.

        The keys of the call are the kept keys of all branches, `lengths` of them per branch, followed by those of all outputs.
        """
        seen = packed.max_seqlen_k
        packed.branch_cu_seqlens_q = _equal_ends(len(lengths) * copies, packed.max_seqlen_q, device)
        packed.branch_max_seqlen_q = packed.max_seqlen_q
        outputs = (self._parts.branch_request[:, None] * copies + np.arange(copies)).ravel()
        # Two runs of keys per copy of a branch: (first row, number of rows) of the context and of the output.
        context_starts = np.repeat(lengths.cumsum() - lengths, copies)
        starts = np.stack([context_starts, lengths.sum() + outputs * seen], axis=1)
        sizes = np.stack([np.repeat(lengths, copies), np.full(outputs.size, seen)], axis=1)
        packed.pair_kv_index = torch.from_numpy(ranges(starts.ravel(), sizes.ravel())).to(device)
        packed.pair_cu_seqlens_k = cumulative_lengths(sizes.sum(1)).to(device)
        packed.pair_max_seqlen_k = int(sizes.sum(1).max())


@dataclass
class _Step:
    """Metadata of a forward over `shape` = (outputs, new tokens per output)."""

    shape: tuple[int, int]
    packed: PackedSegments
    parts: Varlen  # every output row against each part of its request
    part_rows: torch.Tensor  # (R,) output row of each row of the parts' call
    pair_part: torch.Tensor  # (E,) row of the parts' call
    pair_branch: torch.Tensor  # (E,) branch row


def _equal_ends(count: int, length: int, device: torch.device) -> torch.Tensor:
    """Cumulative lengths of `count` sequences of the same length."""
    return torch.arange(count + 1, dtype=torch.int32, device=device) * length


def _attend_split(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: KeysAndValues,
    step: _Step,
    kernel: Kernel,
    options: KernelOptions,
) -> torch.Tensor:
    """Outputs against themselves and against each part of the contexts, merged: (U, H, D)."""
    packed, not_causal = step.packed, options.without_causality()
    # One new token sees all keys of its output, which spares the kernel a causal mask.
    o_out, l_out = kernel.forward(q, k, v, packed.self_call, options if packed.max_seqlen_q > 1 else not_causal)
    o_part, l_part = kernel.forward(q.index_select(0, step.part_rows), *kept, step.parts, not_causal)
    return _merge_parts(o_out, l_out.T, o_part, l_part.T, step)


def _merge_parts(
    o_out: torch.Tensor, l_out: torch.Tensor, o_part: torch.Tensor, l_part: torch.Tensor, step: _Step
) -> torch.Tensor:
    """Attention of output rows, (U, H, D).

    Args:
        o_out, l_out: Attention to the output, (U, H, D), and its log-sum-exp (U, H).
        o_part, l_part: Attention to the parts, (R, H, D), and its log-sum-exp (R, H).
    """
    packed = step.packed
    # Branches from parts: l_i = logsumexp_{p in i} l_p.
    l_pair = l_part.index_select(0, step.pair_part)
    l_branch = logsumexp_by_row(l_pair, step.pair_branch, len(packed.branch_rows))
    share_out, share_branch = attention_shares(l_out, l_branch, packed)
    # Shares of parts: c_p = sum_{i holds p} share_i exp(l_p - l_i).
    share_pair = share_branch[step.pair_branch] * torch.exp(l_pair - l_branch[step.pair_branch])
    share_part = sum_by_row(share_pair, step.pair_part, len(o_part))
    # out = share_out O_out + sum_p c_p O_p.
    mixed = sum_by_row(share_part[..., None] * o_part, step.part_rows, len(o_out))
    return share_out[..., None] * o_out + mixed


def _attend_pairs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: KeysAndValues,
    packed: PackedSegments,
    kernel: Kernel,
    options: KernelOptions,
) -> torch.Tensor:
    """Each branch in one call over [context, output], as a window needs: out = sum_i w_i A_i, (U, H, D)."""
    k, v = torch.cat([kept[0], k]), torch.cat([kept[1], v])
    call = packed.pairs_call
    a_branch, l_branch = kernel.forward(q.index_select(0, packed.branch_rows), *gather_keys(k, v, call), call, options)
    return sum_over_branches(branch_weights(l_branch.T, packed)[..., None] * a_branch, packed)


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    trained: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    base: str,
    miso_cache: ContextCache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' calling convention: query (B, H, new, D), key (B, G, seen, D), value (B, G, seen, V) -> (B, new, H, V), None."""
    # Without a cache: as in training.
    if miso_cache is None:
        return trained(module, query, key, value, attention_mask, **kwargs)
    dtype, device = compute_dtype(value), query.device.type
    query, key, value = (x.to(dtype) for x in (query, key, value))
    padded_q, padded_k, padded_v = equal_head_sizes(query, key, value)
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        # Without metadata of contexts: new tokens of the outputs.
        if PackedSegments.from_batch(kwargs) is None:
            attended = miso_cache.attend(module, padded_q, padded_k, padded_v)
            return attended[..., : value.shape[-1]].to(dtype), None
        # With metadata: read the contexts.
        window, softcap = kwargs.get("sliding_window") or 0, kwargs.get("softcap") or 0.0
        options = KernelOptions(score_scale(query, kwargs.get("scaling")), window=window, softcap=softcap)
        kernel = resolve_kernel("auto", base, query.device, dtype, padded_q.shape[-1], options)
        q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (padded_q, padded_k, padded_v))
        out = miso_cache.read(module, q_THD, k_TGD, v_TGD, kernel, options)
    if out is None:
        return trained(module, query, key, value, attention_mask, **kwargs)
    return out[None, ..., : value.shape[-1]], None
