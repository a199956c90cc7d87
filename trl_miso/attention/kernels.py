"""All kernels, and the choice among them. Here too: the two that need no package and no GPU.

Shapes as in `kernel_interface.py`: T query rows, S key rows, H query heads, G key-value heads, D head dimension, Lq and Lk rows of one
sequence.
"""

from itertools import pairwise

import torch

from trl_miso.attention.flash import FlashAttn, HubFlash, TorchFlash, is_flash, is_hub_flash
from trl_miso.attention.kernel_interface import Kernel, KernelOptions
from trl_miso.attention.merge import merge_two
from trl_miso.segments.packed import Varlen

__all__ = ["KERNELS", "Kernel", "KernelOptions", "kernel_named", "resolve_kernel"]


class Cpu:
    """torch's CPU flash operator, called once per sequence.

    The operator's causality is top-left aligned and needs as many keys as queries. Queries that also see a prefix take two
    calls, a full one on the prefix and a causal one on themselves, which are merged. A binding window uses the operator's mask.
    In the forward, sequences of equal lengths share one call.
    """

    name = "cpu"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions) -> str | None:
        if device.type != "cpu":
            return f"it runs on CPU tensors, got {device.type}"
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"it takes float32, float64 and 16-bit floats, got {dtype}"
        return "the CPU operator has no softcap" if options.softcap else None

    def forward(self, q, k, v, call, options):
        sequences = _sequences(call)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q.dtype))

        # Sequences of equal lengths are the batch dimension of one call; else the loop below takes them one by one.
        batch = len(sequences) if _equal_lengths(sequences) else 1
        end = sequences[-1][1].stop  # there may be more keys than the sequences read
        batched_q, batched_k, batched_v = _batched(q, batch), _batched(k[:end], batch), _batched(v[:end], batch)
        batched_out = _batched(out, batch)
        batched_lse = lse.unflatten(1, (batch, -1)).transpose(0, 1)

        for rows, keys in sequences[: len(sequences) // batch]:
            parts = []
            for part, causal, mask in _cpu_parts(rows, keys, options, q):
                part_k, part_v = batched_k[:, :, part], batched_v[:, :, part]
                parts.append(_attend_on_cpu(batched_q[:, :, rows], part_k, part_v, options.scale, causal, mask))
            merged = parts[0] if len(parts) == 1 else merge_two(*parts)
            batched_out[:, :, rows], batched_lse[:, :, rows] = merged
        return out, lse

    def backward(self, dout, q, k, v, out, lse, call, options):
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        totals = [_heads_first(x) for x in (dq, dk, dv)]  # views, which the loop below fills in
        dout, q, k, v, out = (_heads_first(x) for x in (dout, q, k, v, out))
        differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for rows, keys in _sequences(call):
            queries = dout[:, :, rows], q[:, :, rows]
            # The calls of a sequence take its joint (out, lse), so that each P is a part of the joint softmax.
            joint = out[:, :, rows], lse[None, :, rows].contiguous()
            for part, causal, mask in _cpu_parts(rows, keys, options, q):
                read = k[:, :, part], v[:, :, part]
                gradients = differentiate(*queries, *read, *joint, 0.0, causal, attn_mask=mask, scale=options.scale)
                for total, where, gradient in zip(totals, (rows, part, part), gradients, strict=True):
                    total[:, :, where] += gradient
        return dq, dk, dv


def _attend_on_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's CPU flash operator: out (batch, H, Lq, D) and its log-sum-exp (batch, H, Lq).

    Causality is top-left aligned: the first query sees the first key. Queries beyond the last key see all keys.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


class Reference:
    """Dense plain torch, sequence by sequence. Takes any device and floating dtype, windows and softcap. Slow."""

    name = "reference"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions) -> str | None:
        return None

    def forward(self, q, k, v, call, options):
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q.dtype))
        for rows, keys in _sequences(call):
            scores, _ = self._scores(q[rows], k[keys], options)
            lse[:, rows] = torch.logsumexp(scores, dim=-1)
            probabilities = torch.exp(scores - lse[:, rows, None])
            out[rows] = torch.einsum("hqk,khd->qhd", probabilities, _repeat(v[keys], q)).to(q.dtype)
        return out, lse

    def backward(self, dout, q, k, v, out, lse, call, options):
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows, keys in _sequences(call):
            scores, slope = self._scores(q[rows], k[keys], options)
            # P from the given log-sum-exp, then dS = P * (dout v^T - rowsum(dout * out)), through the softcap.
            probabilities = torch.exp(scores - lse[:, rows, None])
            wide_dout, wide_out, wide_q = (x[rows].to(scores.dtype) for x in (dout, out, q))
            delta = (wide_dout * wide_out).sum(-1).T[..., None]
            d_scores = torch.einsum("qhd,khd->hqk", wide_dout, _repeat(v[keys], q)) - delta
            d_scores = d_scores * probabilities * slope * options.scale
            dq[rows] = torch.einsum("hqk,khd->qhd", d_scores, _repeat(k[keys], q)).to(q.dtype)
            # Sum over the query heads of each key-value head.
            groups = k.shape[1], q.shape[1] // k.shape[1]
            dk[keys] = torch.einsum("hqk,qhd->khd", d_scores, wide_q).unflatten(1, groups).sum(2).to(k.dtype)
            dv[keys] = torch.einsum("hqk,qhd->khd", probabilities, wide_dout).unflatten(1, groups).sum(2).to(v.dtype)
        return dq, dk, dv

    @staticmethod
    def _scores(q: torch.Tensor, k: torch.Tensor, options: KernelOptions) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Masked scores (H, Lq, Lk), in float32 at least, and their derivative by the scaled product."""
        scores = torch.einsum("qhd,khd->hqk", q.to(lse_dtype(q.dtype)), _repeat(k, q)) * options.scale
        slope: torch.Tensor | float = 1.0
        if options.softcap:
            squashed = torch.tanh(scores / options.softcap)
            scores, slope = options.softcap * squashed, 1 - squashed**2
        hidden = _hidden(q.shape[0], k.shape[0], options, q.device)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores, slope


KERNELS = {kernel.name: kernel for kernel in (FlashAttn(), HubFlash(), TorchFlash(), Cpu(), Reference())}


def resolve_kernel(
    requested: str, base: str, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions
) -> Kernel:
    """Choose the kernel: the requested one, or for `"auto"` the first that can run.

    Args:
        requested: `"auto"` or a name in `KERNELS`.
        base: The model's own attention implementation. FlashAttention-2 there restricts the choice to FlashAttention-2 kernels.

    Raises:
        ValueError: If no acceptable kernel can run.
    """
    flash_only = is_flash(base)
    candidates = _candidates(base)
    if requested == "hub_flash":
        candidates = [HubFlash(base) if is_hub_flash(base) else KERNELS[requested]]
    elif requested != "auto":
        candidates = [kernel for kernel in candidates if kernel.name == requested]
    reasons = {}
    for kernel in candidates:
        reason = kernel.refuses(device, dtype, head_dim, options)
        if reason is None:
            return kernel
        reasons[kernel.name] = reason
    request = f"attention_kernel={requested!r}"
    if flash_only:
        request += f" with attn_implementation={base!r}"
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it is no FlashAttention-2 kernel"
    raise ValueError(
        f"Got {request} for {dtype} tensors on {device.type} with head_dim {head_dim}, which cannot run: {why}. Expected a "
        "kernel that can run. Fix: set attention_kernel='auto' and attn_implementation='sdpa' to use the first kernel that can "
        "run, or meet the named condition."
    )


def kernel_named(name: str) -> Kernel:
    """The kernel of that name. The Hub's kernel in a certain revision is named by its repository."""
    return KERNELS[name] if name in KERNELS else HubFlash(name)


def _candidates(base: str) -> list[Kernel]:
    """The kernels that `"auto"` tries, in their order. Only who loads a model with the Hub's kernel is known to want that."""
    if is_hub_flash(base):
        return [HubFlash(base), KERNELS["flash_attn"], KERNELS["torch_flash"]]
    if base == "flash_attention_2":
        return [KERNELS["flash_attn"], KERNELS["torch_flash"]]
    return [KERNELS[name] for name in ("flash_attn", "torch_flash", "cpu", "reference")]


def _sequences(call: Varlen) -> list[tuple[slice, slice]]:
    """(query rows, key rows) of each sequence."""
    q, k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    rows = [slice(start, end) for start, end in pairwise(q)]
    keys = [slice(start, end) for start, end in pairwise(k)]
    return list(zip(rows, keys, strict=True))


def _equal_lengths(sequences: list[tuple[slice, slice]]) -> bool:
    """Whether all sequences have the same number of queries and the same number of keys."""
    return len({(rows.stop - rows.start, keys.stop - keys.start) for rows, keys in sequences}) == 1


def _batched(x: torch.Tensor, count: int) -> torch.Tensor:
    """(T, heads, D) as a (count, heads, T / count, D) view."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(T, heads, D) as a (1, heads, T, D) view."""
    return x.transpose(0, 1)[None]


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _repeat(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Key-value heads repeated for their query heads, in the dtype of the scores."""
    return x.to(lse_dtype(x.dtype)).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _hidden(n_q: int, n_k: int, options: KernelOptions, device: torch.device) -> torch.Tensor | None:
    """(n_q, n_k) bool, True where a query does not see a key; None if every query sees all keys."""
    if not options.causal and not options.window:
        return None
    distance = torch.arange(n_k - n_q, n_k, device=device)[:, None] - torch.arange(n_k, device=device)
    hidden = distance < 0 if options.causal else torch.zeros_like(distance, dtype=torch.bool)
    if options.window:
        hidden = hidden | (distance >= options.window)
    return hidden


def _cpu_parts(
    rows: slice, keys: slice, options: KernelOptions, q: torch.Tensor
) -> list[tuple[slice, bool, torch.Tensor | None]]:
    """Operator calls (keys, causal, mask) whose merge is the attention of one sequence."""
    n_q, n_k = rows.stop - rows.start, keys.stop - keys.start
    if 0 < options.window < n_k:
        hidden = _hidden(n_q, n_k, options, q.device)
        assert hidden is not None
        return [(keys, False, q.new_zeros(n_q, n_k).masked_fill_(hidden, -torch.inf))]
    if not options.causal:
        return [(keys, False, None)]
    themselves = (slice(keys.stop - n_q, keys.stop), True, None)
    if n_k == n_q:
        return [themselves]
    prefix = (slice(keys.start, keys.stop - n_q), False, None)
    return [prefix, themselves]
