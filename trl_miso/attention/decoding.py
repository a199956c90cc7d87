"""Attention while an output is generated: new tokens attend to the contexts, read once before, and to the output so far.

    contexts, once:   causal, as in training; `ContextCache` keeps each layer's keys, turned to where the output wants them
    output, a step:   q -> K_out and q -> K_i for every context i, merged as in `mixture.py` (eqs. 3, 4 and 7 of the paper)

A forward with the batch keys of `PackedSegments` and `miso_cache` reads contexts; one with `miso_cache` alone continues outputs;
without it (probes, other inputs) the attention is the one that trains. Nothing here is differentiated.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from trl_miso.attention.adapter import compute_dtype, register_over, rotation_of, score_scale
from trl_miso.attention.kernels import resolve_kernel
from trl_miso.attention.mixture import Kernel, KernelOptions, _branch_weights, _keys, _shares, _to_outputs
from trl_miso.packing import PackedSegments, Varlen, _cu_seqlens, _ranges, pack
from trl_miso.segments import Example


def register_decoding(base: str) -> str:
    """Register the attention of generation over a base implementation, see `register_miso_attention`; the name to set."""
    return register_over(base, "decoding", partial(_attention_forward, flash_only=base == "flash_attention_2"))


class ContextCache(DynamicCache):
    """Keys and values of a generation: of the contexts of each request by attention module, of the outputs as in DynamicCache.

    All rows of a request (samples, beams) share its contexts. Its length is that of the ids that `generate` sees: `before` ids
    in place of the contexts, then the output. Every layer keeps all of the output, whatever its window.

    Args:
        examples: A request's contexts each, with an output of one token.
        weighting: One of `WEIGHTINGS`.
        before: Ids that stand for the contexts in each row.
    """

    def __init__(self, examples: Sequence[Example], weighting: str, before: int):
        super().__init__()
        self._before = before
        self._requests = len(examples)
        self._mixed = pack(examples, weighting)[2]
        self._lengths = self._mixed.cross_call.cu_seqlens_k.diff().numpy()  # of the contexts
        self._kept: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._steps: dict[tuple[int, torch.device], tuple[tuple[int, int], PackedSegments]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._before + super().get_seq_length(layer_idx)

    def keep(self, module: nn.Module, k_TGD: torch.Tensor, v_TGD: torch.Tensor, window: int) -> None:
        """Keep a layer's keys and values of all contexts, one context after the other; of a window, the last that can be seen."""
        call = self._mixed.cross_call
        rows = torch.arange(int(self._lengths.sum()))
        if 0 < window < self._lengths.max():
            lengths = np.minimum(self._lengths, window)
            rows = torch.from_numpy(_ranges(self._lengths.cumsum() - lengths, lengths))
        index = rows if call.kv_index is None else call.kv_index[rows]
        offset = None if call.kv_offset is None else call.kv_offset[rows].to(k_TGD.device)
        read = Varlen(call.cu_seqlens_q, call.cu_seqlens_k, 1, call.max_seqlen_k, index.to(k_TGD.device), offset)
        self._kept[module] = _keys(k_TGD, v_TGD, read, rotation_of(module))

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kernel: Kernel,
        options: KernelOptions,
    ) -> torch.Tensor:
        """Attention of new output tokens: `sum_i w_i softmax(q [K_i, K_out]^T) [V_i, V_out]`, each branch causal and windowed.

        Args:
            query: (B, H, new, D), the last tokens of the outputs.
            key: (B, G, seen, D), of all of the output. value: likewise.

        Returns:
            (B, new, H, D).
        """
        batch, _, new, _ = query.shape
        binds = 0 < options.window < self._lengths.max() + key.shape[2]
        if binds:
            key, value = (x[:, :, -(options.window + new - 1) :] for x in (key, value))
        else:
            options = KernelOptions(options.scale, softcap=options.softcap)
        packed = self._step(batch, new, key.shape[2], options.window, query.device)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        form = _pairs if binds else _split
        return form(q, k, v, self._kept[module], packed, kernel, options).unflatten(0, (batch, new))

    def _step(self, batch: int, new: int, seen: int, window: int, device: torch.device) -> PackedSegments:
        """Metadata of a forward, which its layers share: as `pack` makes it for outputs, with kept keys in place of contexts."""
        shape, packed = self._steps.get((window, device), (None, None))
        if packed is None or shape != (batch, new):
            packed = self._rows(batch, new, device)
        elif packed.max_seqlen_k == seen:
            return packed
        packed = replace(packed, cu_seqlens_k=_ends(batch, seen, device), max_seqlen_k=seen)
        if window:
            self._pair(packed, batch // self._requests, np.minimum(self._lengths, window), device)
        self._steps[window, device] = (batch, new), packed
        return packed

    def _rows(self, batch: int, new: int, device: torch.device) -> PackedSegments:
        """What does not depend on how much of the output there is."""
        assert self._mixed.branch_weight is not None
        branches = len(self._lengths)
        span = batch // self._requests * new  # a branch has rows of each copy of its request
        first = self._mixed.branch_rows.to(device)[:, None] * span
        return PackedSegments(
            cu_seqlens_q=_ends(batch, new, device),
            cu_seqlens_k=_ends(batch, 0, device),
            max_seqlen_q=new,
            max_seqlen_k=0,
            num_examples=self._requests,
            num_mixed=self._requests,
            weighting=self._mixed.weighting,
            output_end=batch * new,
            branch_cu_seqlens_q=_ends(branches, span, device),
            branch_cu_seqlens_k=_cu_seqlens(self._lengths).to(device),
            branch_max_seqlen_q=span,
            branch_max_seqlen_k=int(self._lengths.max()),
            branch_q_index=(first + torch.arange(span, device=device)).flatten(),
            branch_weight=self._mixed.branch_weight.to(device).repeat_interleave(span),
        )

    def _pair(self, packed: PackedSegments, copies: int, lengths: np.ndarray, device: torch.device) -> None:
        """Fill in how each copy of a branch reads its kept keys, then the output's, which follow all of those."""
        seen = packed.max_seqlen_k
        packed.branch_cu_seqlens_q = _ends(len(lengths) * copies, packed.max_seqlen_q, device)
        packed.branch_max_seqlen_q = packed.max_seqlen_q
        outputs = self._mixed.branch_rows.numpy()[:, None] * copies + np.arange(copies)
        starts = np.stack(
            [np.repeat(lengths.cumsum() - lengths, copies), lengths.sum() + outputs.ravel() * seen], axis=1
        )
        sizes = np.stack([np.repeat(lengths, copies), np.full(outputs.size, seen)], axis=1)
        packed.pair_kv_index = torch.from_numpy(_ranges(starts.ravel(), sizes.ravel())).to(device)
        packed.pair_cu_seqlens_k = _cu_seqlens(sizes.sum(1)).to(device)
        packed.pair_max_seqlen_k = int(sizes.sum(1).max())


def _ends(count: int, each: int, device: torch.device) -> torch.Tensor:
    """Cumulative lengths of `count` sequences of `each` rows."""
    return torch.arange(count + 1, dtype=torch.int32, device=device) * each


def _split(q, k, v, contexts, packed: PackedSegments, kernel: Kernel, options: KernelOptions) -> torch.Tensor:
    """The output against itself and against each context, merged."""
    cross = options.without_causality()
    o_out, l_out = kernel.forward(q, k, v, packed.self_call, options if packed.max_seqlen_q > 1 else cross)
    k, v = contexts
    o_branch, l_branch = kernel.forward(q.index_select(0, packed.branch_rows), k, v, packed.cross_call, cross)
    share_out, share_branch = _shares(l_out.T, l_branch.T, packed)
    return share_out[..., None] * o_out + _to_outputs(share_branch[..., None] * o_branch, packed)


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
    dtype = compute_dtype(value)
    window, softcap = kwargs.get("sliding_window") or 0, kwargs.get("softcap") or 0.0
    reads = PackedSegments.from_batch(kwargs) is not None
    if miso_cache is not None and reads:
        miso_cache.keep(module, key[0].transpose(0, 1).to(dtype), value[0].transpose(0, 1).to(dtype), window)
    if miso_cache is None or reads:
        return trained(module, query, key, value, attention_mask, **kwargs)
    options = KernelOptions(score_scale(query, kwargs.get("scaling")), window=window, softcap=softcap)
    kernel = resolve_kernel("auto", flash_only, query.device, dtype, query.shape[-1], options)
    with torch.autocast(query.device.type, enabled=False):
        out = miso_cache.attend(module, query.to(dtype), key.to(dtype), value.to(dtype), kernel, options)
    return out.to(dtype), None
