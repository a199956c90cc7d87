"""The kernels as operators of torch, which torch.compile keeps in its graphs as they are.

    attend(kernel, q, k, v, call, options) -> kernel.forward(q, k, v, call, options)
    attend_backward(kernel, dout, q, k, v, out, lse, call, options) -> kernel.backward(dout, q, k, v, out, lse, call, options)

Training takes these functions whether it is compiled or not. The operators have no gradient of their own: `mixture.py` gives
their backward other (out, lse) than their forward returned. Results are contiguous.

Shapes: T query rows, S key rows, H query heads, G key-value heads, D head dimension.
"""

import torch

from trl_miso.attention.kernels import Kernel, KernelOptions, kernel_named, lse_dtype
from trl_miso.segments.packed import Varlen


def attend(
    kernel: Kernel, q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, call: Varlen, options: KernelOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (T, H, D) and its log-sum-exp (H, T)."""
    return _attend(q_THD, k_SGD, v_SGD, *_arguments(kernel, call, options))


def attend_backward(
    kernel: Kernel,
    dout_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    out_THD: torch.Tensor,
    lse_HT: torch.Tensor,
    call: Varlen,
    options: KernelOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, from the (out, lse) that are given."""
    return _attend_backward(dout_THD, q_THD, k_SGD, v_SGD, out_THD, lse_HT, *_arguments(kernel, call, options))


def _arguments(kernel: Kernel, call: Varlen, options: KernelOptions) -> tuple:
    """A call in types that an operator takes."""
    sizes = call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k
    return *sizes, kernel.name, options.scale, options.causal, options.window, options.softcap


@torch.library.custom_op("trl_miso::attend", mutates_args=())
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    kernel: str,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    call = Varlen(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = kernel_named(kernel).forward(q, k, v, call, KernelOptions(scale, causal, window, softcap))
    return out.contiguous(), lse.contiguous()


@_attend.register_fake
def _(q, k, v, *call):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q.dtype))


@torch.library.custom_op("trl_miso::attend_backward", mutates_args=())
def _attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    kernel: str,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = Varlen(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = KernelOptions(scale, causal, window, softcap)
    dq, dk, dv = kernel_named(kernel).backward(dout, q, k, v, out, lse, call, options)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attend_backward.register_fake
def _(dout, q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
