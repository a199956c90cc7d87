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
    return torch.ops.trl_miso.attend(q_THD, k_SGD, v_SGD, *_arguments(kernel, call, options))


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
    return torch.ops.trl_miso.attend_backward(
        dout_THD, q_THD, k_SGD, v_SGD, out_THD, lse_HT, *_arguments(kernel, call, options)
    )


def _arguments(kernel: Kernel, call: Varlen, options: KernelOptions) -> tuple:
    """A call in types that an operator takes."""
    return *call.sizes, kernel.name, options.scale, options.causal, options.window, options.softcap


# Not `torch.library.custom_op`, whose checks at every call cost a tenth of a small layer.
_CALL = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "str kernel, float scale, bool causal, int window, float softcap"
)
torch.library.define("trl_miso::attend", f"(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)")
torch.library.define(
    "trl_miso::attend_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_CALL}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("trl_miso::attend", "default")
def _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, kernel, *options):
    call = Varlen(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = kernel_named(kernel).forward(q, k, v, call, KernelOptions(*options))
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("trl_miso::attend")
def _(q, k, v, *call):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q.dtype))


@torch.library.impl("trl_miso::attend_backward", "default")
def _attend_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, kernel, *options):
    call = Varlen(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    gradients = kernel_named(kernel).backward(dout, q, k, v, out, lse, call, KernelOptions(*options))
    return tuple(gradient.contiguous() for gradient in gradients)


@torch.library.register_fake("trl_miso::attend_backward")
def _(dout, q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
