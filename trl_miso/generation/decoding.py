"""Attention while an output is generated: new tokens attend to the contexts, read once before, and to the output so far.

    contexts, once:   causal, as in training; `ContextCache` keeps each layer's keys, turned to where the output wants them
    output, a step:   q -> K_out and q -> K_p for every part p of the contexts (`parts.py`), merged as in `mixture.py` (eqs. 3, 4, 7)

A forward with the batch keys of `PackedSegments` and `miso_cache` reads contexts; one with `miso_cache` alone continues outputs;
without it (probes, other inputs) the attention is the one that trains. Nothing here is differentiated.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from trl_miso.attention.kernels import KERNELS, attend_on_cpu, resolve_kernel
from trl_miso.attention.mixture import (
    Kernel,
    KernelOptions,
    _branch_weights,
    _keys,
    _logsumexp_by,
    _shares,
    _sum_by,
    _to_outputs,
)
from trl_miso.attention.transformers_attention import compute_dtype, register_over, rotation_of, score_scale
from trl_miso.generation.context_parts import DenseParts, KeysAndValues, Parts, Reading
from trl_miso.segments import Example
from trl_miso.segments.packed import WEIGHTINGS, PackedSegments, Varlen, cumulative_lengths, ranges


def register_decoding(base: str) -> str:
    """Register the attention of generation over a base implementation, see `register_miso_attention`; the name to set."""
    return register_over(base, "decoding", partial(_attention_forward, flash_only=base == "flash_attention_2"))


class ContextCache(DynamicCache):
    """Keys and values of a generation: of the contexts of each request by attention module, of the outputs as in DynamicCache.

    All rows of a request (samples, beams) share its contexts, and contexts their common prefixes as far as `parts.py` says. Its length
    is that of the ids that `generate` sees: `before` ids in place of the contexts, then the output. Every layer keeps all of
    the output, whatever its window.

    Args:
        examples: A request's contexts each, with an output of one token.
        weighting: One of `WEIGHTINGS`.
        before: Ids that stand for the contexts in each row.
        layers: Attention layers of the model.
        windows: Whether a layer's window can come to bind.
    """

    def __init__(self, examples: Sequence[Example], weighting: str, before: int, layers: int, windows: bool):
        super().__init__()
        self._examples, self._layers, self._windows = examples, layers, windows
        self._requests, self._weighting, self._before = len(examples), weighting, before
        self._parts = Parts(examples)
        self._lengths = self._parts.branch_lengths
        self._longest = int(self._lengths.max())
        self._reading: Reading | None = None
        self._calls: dict[torch.device, Varlen] = {}
        self._how: dict[nn.Module, tuple[Kernel, KernelOptions, KernelOptions]] = {}  # the last without a window
        self._kept: dict[nn.Module, KeysAndValues] = {}  # of all parts
        self._seen: dict[nn.Module, KeysAndValues] = {}  # of each branch, what its window shows
        self._dense: dict[torch.dtype, DenseParts] = {}
        self._kept_dense: dict[nn.Module, list[KeysAndValues]] = {}
        self._steps: dict[tuple[int, torch.device], _Step] = {}

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
        """Keep a layer's keys and values of all contexts, and how it attends, which is how its outputs will.

        Returns:
            The contexts' attention, (T, H, D): nothing reads the last layer's, which is 0. None where training's will do.

        Raises:
            ValueError: For a module that attends more than once in a forward.
        """
        if module in self._how:
            raise ValueError(
                f"Got a model in which {type(module).__name__} attends more than once in a layer, expected one attention a layer, whose "
                "keys are kept. Fix: use another model."
            )
        device = k_TGD.device
        if device not in self._calls:
            self._calls[device] = self._parts.call(device)
        self._kept[module] = _keys(k_TGD, v_TGD, self._calls[device], rotation_of(module))
        unbound = replace(options, window=0)
        self._how[module] = kernel, options if self._windows else unbound, unbound
        if len(self._how) == self._layers:
            return torch.zeros_like(q_THD)
        if kernel is not KERNELS["cpu"] or 0 < options.window < self._longest:
            return None
        self._reading = self._reading or Reading(self._examples)
        return self._reading.attend(q_THD, k_TGD, v_TGD, options.scale)

    def attend(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of new output tokens: `sum_i w_i softmax(q [K_i, K_out]^T) [V_i, V_out]`, each branch causal and windowed.

        Args:
            query: (B, H, new, D), the last tokens of the outputs.
            key: (B, G, seen, D), of all of the output. value: likewise.

        Returns:
            (B, new, H, D).
        """
        kernel, options, unbound = self._how[module]
        batch, _, new, _ = query.shape
        window = options.window if options.window < self._longest + key.shape[2] else 0
        if new == 1 and not window and kernel is KERNELS["cpu"]:
            return self._attend_one(module, query[:, :, 0], key, value)[:, None]
        if window:
            key, value = (x[:, :, -(window + new - 1) :] for x in (key, value))
        step = self._step(batch, new, key.shape[2], window, query.device)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        if window:
            out = _pairs(q, k, v, self._within(module, window), step.packed, kernel, options)
        else:
            out = _split(q, k, v, self._kept[module], step, kernel, unbound)
        return out.unflatten(0, (batch, new))

    def _attend_one(
        self, module: nn.Module, q_BHD: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """For one new token the heads of a group are taken for queries of one head, so that each key is read once."""
        dtype, scale = q_BHD.dtype, self._how[module][1].scale
        if dtype not in self._dense:
            self._dense[dtype] = DenseParts(self._parts, dtype)
        dense = self._dense[dtype]
        if module not in self._kept_dense:
            self._kept_dense[module] = dense.keep(*self._kept[module])
            if not self._how[module][1].window:  # which may come to bind
                del self._kept[module]
        q_BGHD = q_BHD.unflatten(1, (key.shape[1], -1))
        o_out, l_out = attend_on_cpu(q_BGHD, key, value, scale)
        requests = self._requests
        o_part, l_part = dense.attend(_by_group(q_BGHD, requests), self._kept_dense[module], scale)
        if requests > 1:
            copies = len(q_BHD) // requests
            o_part, l_part = (_by_row(x.index_select(0, dense.place), copies).flatten(0, 1) for x in (o_part, l_part))
            step = self._step(len(q_BHD), 1, key.shape[2], 0, q_BHD.device)
            return _merge(o_out.flatten(1, 2), l_out.flatten(1), o_part, l_part, step).to(dtype)
        mixed = dense.mix(o_part, l_part, _by_group(o_out, 1)[0], _by_group(l_out, 1)[0], self._weighting)
        return _by_row(mixed[None], len(q_BHD))[0].to(dtype)

    def _within(self, module: nn.Module, window: int) -> KeysAndValues:
        """Keys and values of one branch after the other, of each the last that the window can show from now on."""
        if module in self._kept:
            self._kept_dense.pop(module, None)
            k, v = self._kept.pop(module)
            keys = torch.from_numpy(self._parts.last_keys(window)).to(k.device)
            self._seen[module] = k.index_select(0, keys), v.index_select(0, keys)
        return self._seen[module]

    def _step(self, batch: int, new: int, seen: int, window: int, device: torch.device) -> "_Step":
        """Metadata of a forward, which its layers share."""
        step = self._steps.get((window, device))
        if step is None or step.shape != (batch, new):
            step = self._rows(batch, new, device)
        elif step.packed.max_seqlen_k == seen:
            return step
        step.packed = replace(step.packed, cu_seqlens_k=_ends(batch, seen, device), max_seqlen_k=seen)
        if window:
            self._pair(step.packed, batch // self._requests, np.minimum(self._lengths, window), device)
        self._steps[window, device] = step
        return step

    def _rows(self, batch: int, new: int, device: torch.device) -> "_Step":
        """What does not depend on how much of the output there is: as `pack` makes it for outputs."""
        parts = self._parts
        span = batch // self._requests * new  # each part and branch has rows of every copy of its request

        def spread(index: np.ndarray) -> torch.Tensor:
            return torch.from_numpy((index[:, None] * span + np.arange(span)).ravel()).to(device)

        packed = PackedSegments(
            cu_seqlens_q=_ends(batch, new, device),
            cu_seqlens_k=_ends(batch, 0, device),
            max_seqlen_q=new,
            max_seqlen_k=0,
            num_examples=self._requests,
            num_mixed=self._requests,
            weighting=WEIGHTINGS.index(self._weighting),
            output_end=batch * new,
            branch_q_index=spread(parts.branch_request),
            branch_weight=torch.from_numpy(parts.weights).view(torch.int64).to(device).repeat_interleave(span),
        )
        count = len(parts.lengths)
        call = Varlen(
            _ends(count, span, device), cumulative_lengths(parts.lengths).to(device), span, int(parts.lengths.max())
        )
        return _Step((batch, new), packed, call, *map(spread, (parts.request, parts.part, parts.branch)))

    def _pair(self, packed: PackedSegments, copies: int, lengths: np.ndarray, device: torch.device) -> None:
        """Fill in how each copy of a branch reads its kept keys, then the output's, which follow all of those."""
        seen = packed.max_seqlen_k
        packed.branch_cu_seqlens_q = _ends(len(lengths) * copies, packed.max_seqlen_q, device)
        packed.branch_max_seqlen_q = packed.max_seqlen_q
        outputs = self._parts.branch_request[:, None] * copies + np.arange(copies)
        starts = np.stack(
            [np.repeat(lengths.cumsum() - lengths, copies), lengths.sum() + outputs.ravel() * seen], axis=1
        )
        sizes = np.stack([np.repeat(lengths, copies), np.full(outputs.size, seen)], axis=1)
        packed.pair_kv_index = torch.from_numpy(ranges(starts.ravel(), sizes.ravel())).to(device)
        packed.pair_cu_seqlens_k = cumulative_lengths(sizes.sum(1)).to(device)
        packed.pair_max_seqlen_k = int(sizes.sum(1).max())


@dataclass
class _Step:
    """Metadata of a forward of `shape` (outputs, new tokens). R rows of the parts' call, E of pairs of a part and a branch."""

    shape: tuple[int, int]
    packed: PackedSegments
    parts: Varlen
    part_rows: torch.Tensor  # (R,) output row of each row of the parts' call
    pair_part: torch.Tensor  # (E,) row of the parts' call
    pair_branch: torch.Tensor  # (E,) branch row


def _ends(count: int, each: int, device: torch.device) -> torch.Tensor:
    """Cumulative lengths of `count` sequences of `each` rows."""
    return torch.arange(count + 1, dtype=torch.int32, device=device) * each


def _by_group(x_BGH: torch.Tensor, requests: int) -> torch.Tensor:
    """(B, G, H / G, ...) as (R, G, M, ...): queries of all copies and heads that share keys, for R requests."""
    return x_BGH if len(x_BGH) == requests else x_BGH.unflatten(0, (requests, -1)).transpose(1, 2).flatten(2, 3)


def _by_row(x_NGM: torch.Tensor, copies: int) -> torch.Tensor:
    """(N, G, M, ...) as (N, copies, H, ...)."""
    if copies == 1:
        return x_NGM.flatten(1, 2)[:, None]
    return x_NGM.unflatten(2, (copies, -1)).transpose(1, 2).flatten(2, 3)


def _split(q, k, v, contexts, step: _Step, kernel: Kernel, options: KernelOptions) -> torch.Tensor:
    """The output against itself and against each part of the contexts, merged."""
    packed, whole = step.packed, options.without_causality()
    o_out, l_out = kernel.forward(q, k, v, packed.self_call, options if packed.max_seqlen_q > 1 else whole)
    k, v = contexts
    o_part, l_part = kernel.forward(q.index_select(0, step.part_rows), k, v, step.parts, whole)
    return _merge(o_out, l_out.T, o_part, l_part.T, step)


def _merge(
    o_out: torch.Tensor, l_out: torch.Tensor, o_part: torch.Tensor, l_part: torch.Tensor, step: _Step
) -> torch.Tensor:
    """(U, H, D) from attention to the output (U, H, D) and to the parts (R, H, D), with their log-sum-exps (U, H) and (R, H)."""
    packed = step.packed
    l_pair = l_part.index_select(0, step.pair_part)
    l_branch = _logsumexp_by(l_pair, step.pair_branch, len(packed.branch_rows))
    share_out, share_branch = _shares(l_out, l_branch, packed)
    share_pair = share_branch[step.pair_branch] * torch.exp(l_pair - l_branch[step.pair_branch])
    share_part = _sum_by(share_pair, step.pair_part, len(o_part))
    mixed = _sum_by(share_part[..., None] * o_part, step.part_rows, len(o_out))
    return share_out[..., None] * o_out + mixed


def _pairs(q, k, v, contexts, packed: PackedSegments, kernel: Kernel, options: KernelOptions) -> torch.Tensor:
    """Each branch in one call over [context, output]: right where a window depends on the true distance."""
    k, v = (torch.cat([kept, own]) for kept, own in zip(contexts, (k, v), strict=True))
    call = packed.pairs_call
    a_branch, l_branch = kernel.forward(q.index_select(0, packed.branch_rows), *_keys(k, v, call), call, options)
    return _to_outputs(_branch_weights(l_branch.T, packed)[..., None] * a_branch, packed)


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    trained: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    flash_only: bool,
    miso_cache: ContextCache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' calling convention: query (B, H, new, D), key and value (B, G, seen, D) -> (B, new, H, D), None."""
    if miso_cache is None:
        return trained(module, query, key, value, attention_mask, **kwargs)
    dtype, device = compute_dtype(value), query.device.type
    query, key, value = (x.to(dtype) for x in (query, key, value))
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        if PackedSegments.from_batch(kwargs) is None:
            return miso_cache.attend(module, query, key, value).to(dtype), None
        window, softcap = kwargs.get("sliding_window") or 0, kwargs.get("softcap") or 0.0
        options = KernelOptions(score_scale(query, kwargs.get("scaling")), window=window, softcap=softcap)
        kernel = resolve_kernel("auto", flash_only, query.device, dtype, query.shape[-1], options)
        q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (query, key, value))
        out = miso_cache.read(module, q_THD, k_TGD, v_TGD, kernel, options)
    if out is None:
        return trained(module, query, key, value, attention_mask, **kwargs)
    return out[None], None
