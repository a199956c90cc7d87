"""Raw variable-length attention kernels behind one interface. The only file that knows flash_attn and torch's operators.

    forward(q, k, v, call, options) -> out (T, H, D), lse (H, T)
    backward(dout, q, k, v, out, lse, call, options) -> dq, dk, dv

`call` delimits sequences in q (T, H, D) and k, v (S, G, D); `options` has scale, causality (bottom-right aligned: the last
query sees the last key), window and softcap. The log-sum-exp is float32 (float64 for float64 inputs). `backward`
recomputes P = exp(scores - lse) and dS = P * (dout v^T - rowsum(dout * out)) from the (out, lse) that it is *given*. This
is what makes the mixture's gradient exact (`mixture.py`). Every sequence has at least one query and one key.

Shapes: T query rows, S key rows, H query heads, G key-value heads, D head dimension, Lq and Lk rows of one sequence.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch.nn.functional import pad

from trl_miso.attention.merge import merge_two
from trl_miso.segments.packed import Varlen

_FLASH_ATTN_RANGE = ((2, 8), (2, 9))  # from 2.8.0 to before 2.9 the private functions used below have these signatures
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class KernelOptions:
    """Options of one kernel call.

    Args:
        scale: Factor of the scores.
        causal: The last query is aligned with the last key.
        window: Number of keys that a query sees, itself included; 0 for all.
        softcap: c > 0 makes the scores `c tanh(s / c)`; 0 for none.
    """

    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0

    def without_causality(self) -> "KernelOptions":
        """Every query sees all keys."""
        return KernelOptions(self.scale, causal=False, window=0, softcap=self.softcap)


class Kernel(Protocol):
    """Raw variable-length attention, see the module's docstring."""

    name: str

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions) -> str | None:
        """Why the kernel cannot run; None if it can."""
        ...

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Varlen, options: KernelOptions
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: Varlen,
        options: KernelOptions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


class FlashAttn:
    """The flash-attn 2 package's varlen functions (`pip install trl-miso[flash]`)."""

    name = "flash_attn"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions) -> str | None:
        return why_no_flash_attn() or _not_flash(device, dtype, head_dim)

    def forward(self, q, k, v, call, options):
        out, lse, _, _ = flash_attn_functions()._flash_attn_varlen_forward(
            *(_pad_heads(x) for x in (q, k, v)),
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.max_seqlen_q,
            call.max_seqlen_k,
            0.0,
            options.scale,
            options.causal,
            window_size_left=options.window - 1,
            window_size_right=_window_right(options),
            softcap=options.softcap,
        )
        return out[..., : q.shape[-1]], lse

    def backward(self, dout, q, k, v, out, lse, call, options):
        padded = [_pad_heads(x).contiguous() for x in (dout, q, k, v, out)]
        gradients = [torch.empty_like(x) for x in padded[1:4]]
        flash_attn_functions()._flash_attn_varlen_backward(
            *padded,
            lse,
            *gradients,
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.max_seqlen_q,
            call.max_seqlen_k,
            0.0,
            options.scale,
            options.causal,
            options.window - 1,
            _window_right(options),
            options.softcap,
            None,
            torch.are_deterministic_algorithms_enabled(),
        )
        return [gradient[..., : q.shape[-1]] for gradient in gradients]


class TorchFlash:
    """torch's built-in FlashAttention-2: the same kernel and layouts without an extra package, but no softcap."""

    name = "torch_flash"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions) -> str | None:
        if options.softcap:
            return "torch's built-in FlashAttention has no softcap"
        return _not_flash(device, dtype, head_dim)

    def forward(self, q, k, v, call, options):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(_pad_heads(x) for x in (q, k, v)),
            *self._sizes(call),
            0.0,
            options.causal,
            False,
            **self._keywords(options),
        )
        return out[..., : q.shape[-1]], lse

    def backward(self, dout, q, k, v, out, lse, call, options):
        rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # read only under dropout
        unused = torch.empty(0, device=q.device)
        gradients = torch.ops.aten._flash_attention_backward(
            *(_pad_heads(x).contiguous() for x in (dout, q, k, v, out)),
            lse,
            *self._sizes(call),
            0.0,
            options.causal,
            rng,
            unused,
            **self._keywords(options),
        )
        return [gradient[..., : q.shape[-1]] for gradient in gradients]

    @staticmethod
    def _sizes(call: Varlen) -> tuple:
        return call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k

    @staticmethod
    def _keywords(options: KernelOptions) -> dict[str, Any]:
        window = {}
        if options.window:
            window = {"window_size_left": options.window - 1, "window_size_right": _window_right(options)}
        return {"scale": options.scale, **window}


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


KERNELS = {kernel.name: kernel for kernel in (FlashAttn(), TorchFlash(), Cpu(), Reference())}


def resolve_kernel(
    requested: str, flash_only: bool, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions
) -> Kernel:
    """Choose the kernel: the requested one, or for `"auto"` the first of `KERNELS` that can run.

    Args:
        requested: `"auto"` or a name in `KERNELS`.
        flash_only: The model uses flash_attention_2, so only FlashAttention-2 kernels are acceptable.

    Raises:
        ValueError: If no acceptable kernel can run.
    """
    names = list(KERNELS) if requested == "auto" else [requested]
    if flash_only:
        names = [name for name in names if name in ("flash_attn", "torch_flash")]
    reasons = {}
    for name in names:
        reason = KERNELS[name].refuses(device, dtype, head_dim, options)
        if reason is None:
            return KERNELS[name]
        reasons[name] = reason
    request = f"attention_kernel={requested!r}"
    if flash_only:
        request += " with attn_implementation='flash_attention_2'"
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it is no FlashAttention-2 kernel"
    raise ValueError(
        f"Got {request} for {dtype} tensors on {device.type} with head_dim {head_dim}, which cannot run: {why}. Expected a "
        "kernel that can run. Fix: set attention_kernel='auto' and attn_implementation='sdpa' to use the first kernel that can "
        "run, or meet the named condition."
    )


@cache
def flash_attn_functions() -> Any:
    """The flash-attn package's module of raw functions."""
    from flash_attn import flash_attn_interface

    return flash_attn_interface


@cache
def why_no_flash_attn() -> str | None:
    """Why the flash-attn package cannot be used; None if it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the flash-attn package is not installed (pip install 'trl-miso[flash]', which needs CUDA)"
    import flash_attn

    version = tuple(int(part) for part in flash_attn.__version__.split(".")[:2])
    low, high = _FLASH_ATTN_RANGE
    if not low <= version < high:
        return f"flash-attn {flash_attn.__version__} is installed, its functions are known for >=2.8,<2.9"
    return None


def _not_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"FlashAttention-2 needs CUDA tensors, got {device.type}"
    if dtype not in _HALF:
        return f"FlashAttention-2 takes float16 and bfloat16, got {dtype}"
    if head_dim > 256:
        return f"FlashAttention-2 takes head_dim up to 256, got {head_dim}"
    return None


def _window_right(options: KernelOptions) -> int:
    """Keys to the right of a query: none (0) if causal, else all (-1)."""
    return 0 if options.causal else -1


def _pad_heads(x: torch.Tensor) -> torch.Tensor:
    """Pad the head dimension to a multiple of 8, as the raw operators require; zeros change no score."""
    return pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


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
