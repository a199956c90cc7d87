r"""Merge attention over disjoint sets of keys, from the (out, log-sum-exp) of each set.

For scores s with values v over two disjoint sets of keys, with `l = logsumexp(s)` and `O = softmax(s) v` of each set,

    l = logaddexp(l_1, l_2)
    O = exp(l_1 - l) O_1 + exp(l_2 - l) O_2          (paper, eq. 2)

All weightings of contexts (eqs. 3, 4, 7) follow from this: `attention_shares` gives the factor of each part.

Shapes: T packed tokens, U output tokens, Q branch rows (an output row for each of its branches), S key rows of a call,
N rows of any kind, H query heads, G key-value heads, D head dimension.
"""

import torch

from trl_miso.attention.rotation import Rotation
from trl_miso.segments.packed import WEIGHTINGS, PackedSegments, Varlen


def merge_two(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from (out, lse) over each: (..., Lq, D) and (..., Lq)."""
    (out_1, lse_1), (out_2, lse_2) = first, second
    # exp(l_2 - logaddexp(l_1, l_2)) = sigmoid(l_2 - l_1)
    share_2 = torch.sigmoid(lse_2 - lse_1)[..., None]
    out = torch.lerp(out_1.to(lse_1.dtype), out_2.to(lse_1.dtype), share_2)
    return out.to(out_1.dtype), torch.logaddexp(lse_1, lse_2)


def attention_shares(
    lse_out_UH: torch.Tensor, lse_branch_QH: torch.Tensor, packed: PackedSegments
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output's share of its own attention (U, H), and each context's share (Q, H): `out = share_out O_out + sum_i share_i O_i`.

    The shares of an output token sum to 1. Equals, with l_i the log-sum-exp of context i alone and l_out that of the output,
    `share_i = w_i sigmoid(l_i - l_out)` for fixed weights (eq. 3), and the terms of one softmax for fid and vanilla (eqs. 7 and 4).
    """
    if has_fixed_weights(packed):
        weights = fixed_weights(packed, lse_out_UH.dtype)
        share_branch_QH = weights * torch.sigmoid(lse_branch_QH - lse_out_UH[packed.branch_rows])
        return 1 - sum_over_branches(share_branch_QH, packed), share_branch_QH
    total_UH, counted_out_UH = joint_logsumexp(lse_out_UH, lse_branch_QH, packed)
    share_branch_QH = torch.exp(lse_branch_QH - total_UH[packed.branch_rows])
    return torch.exp(counted_out_UH - total_UH), share_branch_QH


def joint_logsumexp(
    lse_out_UH: torch.Tensor, lse_branch_QH: torch.Tensor, packed: PackedSegments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp of the one softmax of fid or vanilla, and of the output's part of that softmax, both (U, H).

    Fid counts the output once per branch (eq. 7), vanilla once (eq. 4).
    """
    if WEIGHTINGS[packed.weighting] == "fid":
        branches_UH = sum_over_branches(torch.ones_like(lse_branch_QH), packed)
        lse_out_UH = lse_out_UH + branches_UH.log()
    return torch.logaddexp(logsumexp_over_branches(lse_branch_QH, packed), lse_out_UH), lse_out_UH


def has_fixed_weights(packed: PackedSegments) -> bool:
    """Whether a branch's weight is a constant of the batch: 1/n or given weights ("uniform"), not a function of the scores."""
    return WEIGHTINGS[packed.weighting] == "uniform"


def fixed_weights(packed: PackedSegments, dtype: torch.dtype) -> torch.Tensor:
    """Weights of the branches, (Q, 1), from the float64 bit patterns in the batch."""
    assert packed.branch_weight is not None
    return packed.branch_weight.view(torch.float64).to(dtype)[:, None]


def branch_weights(lse_pair_QH: torch.Tensor, packed: PackedSegments) -> torch.Tensor:
    """Weights w_i, (Q, H) or (Q, 1), from the log-sum-exps L_i over [K_i, K_out]: fixed (eq. 3) or softmax over L_i (eq. 7)."""
    if has_fixed_weights(packed):
        return fixed_weights(packed, lse_pair_QH.dtype)
    return torch.exp(lse_pair_QH - logsumexp_over_branches(lse_pair_QH, packed)[packed.branch_rows])


def sum_over_branches(x_Q: torch.Tensor, packed: PackedSegments) -> torch.Tensor:
    """Sum over the branches of each output token: (Q, ...) -> (U, ...)."""
    return sum_by_row(x_Q, packed.branch_rows, packed.output_end - packed.output_start)


def logsumexp_over_branches(x_QH: torch.Tensor, packed: PackedSegments) -> torch.Tensor:
    """Log-sum-exp over the branches of each output token: (Q, H) -> (U, H)."""
    return logsumexp_by_row(x_QH, packed.branch_rows, packed.output_end - packed.output_start)


def sum_by_row(x: torch.Tensor, row_N: torch.Tensor, size: int) -> torch.Tensor:
    """Sum the N rows of x that have the same target row: `result[row_N[n]] += x[n]`, (size, ...)."""
    if torch.compiler.is_compiling():
        return torch.ops.trl_miso.sum_by_row(x, row_N, size)
    return x.new_zeros(size, *x.shape[1:]).index_add_(0, row_N, x)


# An operator of its own in compiled layers: where inductor (torch 2.13, CPU) computes such a sum together with a mean over the
# other dimension, it adds to wrong addresses, also beyond the end of the result.
torch.library.define("trl_miso::sum_by_row", "(Tensor x, Tensor row, SymInt size) -> Tensor")


@torch.library.impl("trl_miso::sum_by_row", "default")
def _(x, row_N, size):
    return x.new_zeros(size, *x.shape[1:]).index_add_(0, row_N, x)


@torch.library.register_fake("trl_miso::sum_by_row")
def _(x, row_N, size):
    return x.new_empty(size, *x.shape[1:])


def logsumexp_by_row(x_NH: torch.Tensor, row_N: torch.Tensor, size: int) -> torch.Tensor:
    """Log-sum-exp of the N rows of x that have the same target row, (size, H). Every target row has at least one."""
    top = x_NH.new_full((size, x_NH.shape[1]), -torch.inf)
    top = top.scatter_reduce_(0, row_N[:, None].expand_as(x_NH), x_NH, "amax")
    return top + sum_by_row(torch.exp(x_NH - top[row_N]), row_N, size).log()


def gather_keys(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, call: Varlen, rotation: Rotation | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value rows of a call, (S, G, D): gathered where prefixes are shared, turned where contexts end at other positions."""
    if call.kv_index is not None:
        k_TGD, v_TGD = k_TGD.index_select(0, call.kv_index), v_TGD.index_select(0, call.kv_index)
    if call.kv_offset is not None:
        assert rotation is not None, "a batch with key offsets needs the model's rotation"
        k_TGD = rotation(k_TGD, call.kv_offset, call.max_seqlen_k)
    return k_TGD, v_TGD


def scatter_key_gradients(
    k_TGD: torch.Tensor, calls: list[tuple[Varlen, torch.Tensor, torch.Tensor]], rotation: Rotation | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transpose of `gather_keys`: sum the (dk, dv) of all calls and copies into rows of k, in float32 at least.

    Args:
        calls: Per kernel call, its keys and its gradients (S, G, D).
    """
    if len(calls) == 1 and calls[0][0].kv_index is None:
        _, dk, dv = calls[0]
        return dk, dv
    dk_TGD = at_least_float32(k_TGD.new_zeros(k_TGD.shape))
    dv_TGD = torch.zeros_like(dk_TGD)
    for call, dk, dv in calls:
        if call.kv_offset is not None and rotation is not None:
            dk = rotation(dk, call.kv_offset, call.max_seqlen_k, inverse=True)
        for total, gradient in ((dk_TGD, dk), (dv_TGD, dv)):
            if call.kv_index is None:
                total[: gradient.shape[0]] += gradient
            elif torch.compiler.is_compiling():
                total += sum_by_row(gradient.to(total.dtype), call.kv_index, len(total))
            else:
                total.index_add_(0, call.kv_index, gradient.to(total.dtype))
    return dk_TGD.to(k_TGD.dtype), dv_TGD.to(k_TGD.dtype)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision to float32, where several terms are summed."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
