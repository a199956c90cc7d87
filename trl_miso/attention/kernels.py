"""Raw variable-length attention kernels behind one interface. The only file that knows flash_attn and torch's operators.

    forward(q, k, v, call, options) -> out (T, H, D), lse (H, T)
    backward(dout, q, k, v, out, lse, call, options) -> dq, dk, dv

`call` delimits sequences in q (T, H, D) and k, v (S, G, D); `options` has scale, causality (bottom-right aligned: the last
query sees the last key), window and softcap. The log-sum-exp is float32 (float64 for float64 inputs). `backward`
recomputes P = exp(scores - lse) and dS = P * (dout v^T - rowsum(dout * out)) from whatever (out, lse) it is *given*, which
is what makes the mixture's gradient exact (`mixture.py`). Every sequence has at least one query and one key.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch.nn.functional import pad

from trl_miso.attention.mixture import Kernel, KernelOptions
from trl_miso.segments.packed import Varlen

_FLASH_ATTN_RANGE = ((2, 8), (2, 9))  # the private functions used below, as they are from 2.8.0 to before 2.9
_HALF = (torch.float16, torch.bfloat16)


class FlashAttn:
    """The flash-attn 2 package's varlen functions (`pip install trl-miso[flash]`)."""

    name = "flash_attn"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions) -> str | None:
        return _flash_attn_missing() or _not_flash(device, dtype, head_dim)

    def forward(self, q, k, v, call, options):
        out, lse, _, _ = _flash_attn()._flash_attn_varlen_forward(
            *(_pad_heads(x) for x in (q, k, v)),
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.max_seqlen_q,
            call.max_seqlen_k,
            0.0,
            options.scale,
            options.causal,
            window_size_left=options.window - 1,
            window_size_right=_right(options),
            softcap=options.softcap,
        )
        return out[..., : q.shape[-1]], lse

    def backward(self, dout, q, k, v, out, lse, call, options):
        padded = [_pad_heads(x).contiguous() for x in (dout, q, k, v, out)]
        gradients = [torch.empty_like(x) for x in padded[1:4]]
        _flash_attn()._flash_attn_varlen_backward(
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
            _right(options),
            options.softcap,
            None,
            torch.are_deterministic_algorithms_enabled(),
        )
        return [gradient[..., : q.shape[-1]] for gradient in gradients]


class TorchFlash:
    """torch's built-in FlashAttention-2: same kernel and layouts, no extra package, no softcap."""

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
            window = {"window_size_left": options.window - 1, "window_size_right": _right(options)}
        return {"scale": options.scale, **window}


class Cpu:
    """torch's CPU flash operator, one call a sequence (two where the keys are longer than the causal queries); forward, sequences
    that are all of one length share theirs.

    The operator's causality is top-left aligned and it needs equal lengths; queries that also see a prefix are merged
    from a full call on the prefix and a causal one on themselves. A binding window uses the operator's mask.
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
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=_lse_dtype(q.dtype))
        count = len(sequences) if _alike(sequences) else 1  # of equal lengths: one call for all of them
        q_, k_, v_, out_ = (
            _batched(x, count) for x in (q, k[: sequences[-1][1].stop], v[: sequences[-1][1].stop], out)
        )
        lse_ = lse.unflatten(1, (count, -1)).transpose(0, 1)
        for rows, keys in sequences[: len(sequences) // count]:
            parts = [
                attend_on_cpu(q_[:, :, rows], k_[:, :, part], v_[:, :, part], options.scale, causal, mask)
                for part, causal, mask in _cpu_parts(rows, keys, options, q)
            ]
            out_[:, :, rows], lse_[:, :, rows] = parts[0] if len(parts) == 1 else merge_two(*parts)
        return out, lse

    def backward(self, dout, q, k, v, out, lse, call, options):
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        q_, k_, v_, out_, dout_ = (heads_first(x) for x in (q, k, v, out, dout))
        dq_, dk_, dv_ = (heads_first(x) for x in (dq, dk, dv))
        differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for rows, keys in _sequences(call):
            given = dout_[:, :, rows], q_[:, :, rows]
            saved = out_[:, :, rows], lse[None, :, rows].contiguous()
            for part, causal, mask in _cpu_parts(rows, keys, options, q):
                read = k_[:, :, part], v_[:, :, part]
                gradients = differentiate(*given, *read, *saved, 0.0, causal, attn_mask=mask, scale=options.scale)
                for total, where, gradient in zip((dq_, dk_, dv_), (rows, part, part), gradients, strict=True):
                    total[:, :, where] += gradient
        return dq, dk, dv


def attend_on_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's CPU flash operator: (batch, H, Lq, D) and its log-sum-exp (batch, H, Lq). The first query sees the first key, ...;
    queries beyond the last key see all."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


class Reference:
    """Dense plain torch, sequence by sequence: any device and floating dtype, windows and softcap included. Slow."""

    name = "reference"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions) -> str | None:
        return None

    def forward(self, q, k, v, call, options):
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=_lse_dtype(q.dtype))
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
            probabilities = torch.exp(scores - lse[:, rows, None])
            wide = [x[rows].to(scores.dtype) for x in (dout, out, q)]
            delta = (wide[0] * wide[1]).sum(-1).T[..., None]
            d_scores = torch.einsum("qhd,khd->hqk", wide[0], _repeat(v[keys], q)) - delta
            d_scores = d_scores * probabilities * slope * options.scale
            dq[rows] = torch.einsum("hqk,khd->qhd", d_scores, _repeat(k[keys], q)).to(q.dtype)
            groups = k.shape[1], q.shape[1] // k.shape[1], k.shape[2]
            dk[keys] = torch.einsum("hqk,qhd->khd", d_scores, wide[2]).unflatten(1, groups[:2]).sum(2).to(k.dtype)
            dv[keys] = torch.einsum("hqk,qhd->khd", probabilities, wide[0]).unflatten(1, groups[:2]).sum(2).to(v.dtype)
        return dq, dk, dv

    @staticmethod
    def _scores(q: torch.Tensor, k: torch.Tensor, options: KernelOptions) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Masked scores (H, Lq, Lk) in float32 at least, and d(scores)/d(scaled product)."""
        scores = torch.einsum("qhd,khd->hqk", q.to(_lse_dtype(q.dtype)), _repeat(k, q)) * options.scale
        slope: torch.Tensor | float = 1.0
        if options.softcap:
            squashed = torch.tanh(scores / options.softcap)
            scores, slope = options.softcap * squashed, 1 - squashed**2
        hidden = _hidden(q.shape[0], k.shape[0], options, q.device)
        return (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)), slope


KERNELS = {kernel.name: kernel for kernel in (FlashAttn(), TorchFlash(), Cpu(), Reference())}


def resolve_kernel(
    requested: str, flash_only: bool, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions
) -> Kernel:
    """The kernel that runs: the requested one or an error; for `"auto"` the first that can.

    Args:
        requested: `"auto"` or a name in `KERNELS`.
        flash_only: The script asked for flash_attention_2, so that only FlashAttention-2 kernels will do.

    Raises:
        ValueError: If the request cannot be honoured.
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
    asked = f"attention_kernel={requested!r}" + (" with attn_implementation='flash_attention_2'" if flash_only else "")
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it is no FlashAttention-2 kernel"
    raise ValueError(
        f"Got {asked} for {dtype} tensors on {device.type} with head_dim {head_dim}, which cannot run: {why}. Expected a "
        "kernel that can. Fix: set attention_kernel='auto' and attn_implementation='sdpa' to let the first that can run "
        "be chosen, or meet the condition named."
    )


@cache
def _flash_attn() -> Any:
    from flash_attn import flash_attn_interface

    return flash_attn_interface


@cache
def _flash_attn_missing() -> str | None:
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
    return f"FlashAttention-2 takes head_dim up to 256, got {head_dim}" if head_dim > 256 else None


def _right(options: KernelOptions) -> int:
    """Window to the right: none when causal, all (-1) when not."""
    return 0 if options.causal else -1


def _pad_heads(x: torch.Tensor) -> torch.Tensor:
    """The raw operators want a head dimension that is a multiple of 8; zeros change no score."""
    return pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _sequences(call: Varlen) -> list[tuple[slice, slice]]:
    q, k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    return [(slice(a, b), slice(c, d)) for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False)]


def _alike(sequences: list[tuple[slice, slice]]) -> bool:
    """Whether all sequences have as many queries, and as many keys, as the first."""
    return len({(rows.stop - rows.start, keys.stop - keys.start) for rows, keys in sequences}) == 1


def _batched(x: torch.Tensor, count: int) -> torch.Tensor:
    """(T, heads, D) as a (count, heads, T / count, D) view."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """(T, heads, D) as a (1, heads, T, D) view."""
    return x.transpose(0, 1)[None]


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _repeat(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Key-value heads repeated for their query heads, in the dtype of the scores."""
    return x.to(_lse_dtype(x.dtype)).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _hidden(n_q: int, n_k: int, options: KernelOptions, device: torch.device) -> torch.Tensor | None:
    """(n_q, n_k) bool, True where a query does not see a key; None where it sees all."""
    if not options.causal and not options.window:
        return None
    distance = torch.arange(n_k - n_q, n_k, device=device)[:, None] - torch.arange(n_k, device=device)
    hidden = distance < 0 if options.causal else torch.zeros_like(distance, dtype=torch.bool)
    return hidden | (distance >= options.window) if options.window else hidden


def _cpu_parts(
    rows: slice, keys: slice, options: KernelOptions, q: torch.Tensor
) -> list[tuple[slice, bool, torch.Tensor | None]]:
    """Calls (keys, causal, mask) whose merge is one sequence."""
    n_q, n_k = rows.stop - rows.start, keys.stop - keys.start
    if 0 < options.window < n_k:
        hidden = _hidden(n_q, n_k, options, q.device)
        assert hidden is not None
        return [(keys, False, q.new_zeros(n_q, n_k).masked_fill_(hidden, -torch.inf))]
    if not options.causal:
        return [(keys, False, None)]
    own = (slice(keys.stop - n_q, keys.stop), True, None)
    return [own] if n_k == n_q else [(slice(keys.start, keys.stop - n_q), False, None), own]


def merge_two(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two sets of keys, from (out, lse) over each: (batch, H, Lq, D), (batch, H, Lq)."""
    (o1, l1), (o2, l2) = first, second
    share = torch.sigmoid(l2 - l1)[..., None]
    return torch.lerp(o1.to(l1.dtype), o2.to(l1.dtype), share).to(o1.dtype), torch.logaddexp(l1, l2)
