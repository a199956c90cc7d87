r"""MISO attention over packed segments: forward, merge and exact backward. Takes any kernel and knows no model.

For an output token with branches i = 1..n (one per context), with `(O_i, l_i)` the attention to context i alone and its
log-sum-exp, and `(O_out, l_out)` that to the output itself,

    L_i = logaddexp(l_i, l_out)                      log-sum-exp of branch i, over [K_i, K_out]
    A_i = O_out + sigmoid(l_i - l_out) (O_i - O_out) attention of branch i
    out = sum_i w_i A_i                              eq. 3 of the paper

with fixed w (uniform: 1/n, section 4.2), w_i = exp(L_i) / sum_j exp(L_j) (fid, eq. 7), or, instead of the sum, one
softmax over all contexts and the output (vanilla, eq. 4). Two kernel calls per layer are enough: the *self* call
(every segment against its own path) and the *cross* call (the output against each context).

**Backward.** A raw flash backward recomputes P = exp(S - lse) and dS = P * (dO V^T - rowsum(dO * out)): it differentiates
a softmax whose normaliser and output are *given*. So the gradient of the mixture needs no kernel for the gradient of the
log-sum-exp. It only needs other (dO, out, lse) than those of the forward:

    out -> context i, fixed:   dO, A_i, L_i - log w_i      dS_ij = w_i p_ij (dO.v_j - dO.A_i), dV_j = w_i p_ij dO
    out -> out, fixed:         dO, out*, lse*              P = sum_i w_i exp(S - L_i) = exp(S - lse*),
                               lse* = -logsumexp_i(log w_i - L_i), and sum_i w_i p_i (dO.A_i) = P dO.out* for
                               out* = sum_i a_i A_i, a_i = exp(log w_i - L_i + lse*)
    fid:                       dO, out, G = logsumexp_i L_i to contexts; G - log n to the output, which counts n times
    vanilla:                   dO, out, logaddexp(logsumexp_i l_i, l_out) everywhere

Shapes: T packed tokens, U output tokens, Q branch rows (an output row for each of its branches), S key rows of a call,
H query heads, G key-value heads, D head dimension.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from trl_miso.attention.kernels import Kernel, KernelOptions
from trl_miso.attention.merge import (
    at_least_float32,
    attention_shares,
    branch_weights,
    fixed_weights,
    gather_keys,
    has_fixed_weights,
    joint_logsumexp,
    logsumexp_over_branches,
    scatter_key_gradients,
    sum_over_branches,
)
from trl_miso.attention.operators import attend, attend_backward
from trl_miso.attention.rotation import Rotation
from trl_miso.attention.shares import Shares
from trl_miso.segments.packed import WEIGHTINGS, PackedSegments


def miso_attention(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    packed: PackedSegments,
    kernel: Kernel,
    options: KernelOptions,
    rotation: Rotation | None = None,
    shares: Shares | None = None,
) -> torch.Tensor:
    """Attention of one packed batch: contexts and single runs causally, outputs mixed over their branches (eqs. 3, 4, 7).

    Equals, for each output row, `sum_i w_i softmax(q [K_i, K_out]^T) [V_i, V_out]` (see `reference.py`). Gradients to q, k and v
    are exact. Uses the split form, or the pairs form where `options.window` binds.

    Args:
        q_THD: (T, H, D), rotated to the batch's positions.
        k_TGD: (T, G, D). v_TGD: (T, G, D). H is a multiple of G.
        packed: Segment metadata on the same device.
        rotation: Turns the keys of contexts that end at another position than the output begins at, in the output's view.
        shares: Collects each context's share of the outputs' attention.

    Returns:
        (T, H, D), in the dtype of q.

    Raises:
        ValueError: If a window binds and the mixture cannot honour the window.
    """
    if packed.branch_q_index is None:
        return _Causal.apply(q_THD, k_TGD, v_TGD, packed, kernel, options)
    if 0 < options.window < packed.longest:
        weighting = WEIGHTINGS[packed.weighting]
        if packed.gap or weighting == "vanilla":  # asked here as well: torch.compile cannot make the message's text
            window = f"a sliding window of {options.window} tokens and a context with its output of {packed.longest}"
            check_window(window, bool(packed.gap), weighting, "set max_length to at most the window")
        assert packed.pair_kv_index is not None, "the collator was not given the window"
        form: type[torch.autograd.Function] = PairsForm
    else:
        form = SplitForm
        options = KernelOptions(options.scale, options.causal, 0, options.softcap)
    if shares is None:
        return form.apply(q_THD, k_TGD, v_TGD, packed, kernel, options, rotation)
    out_THD, share_QH = form.apply(q_THD, k_TGD, v_TGD, packed, kernel, options, rotation, True)
    shares.add(share_QH)
    return out_THD


def check_window(window: str, has_gap: bool, weighting: str, fix: str) -> None:
    """Raise ValueError if the mixture cannot honour a sliding window that binds: asked by settings, requests and batches.

    Args:
        window: The window and what exceeds it, for the message.
        has_gap: Whether some context does not end where its output begins (succ, `output_positions="after_longest"`).
        weighting: One of `WEIGHTINGS`.
        fix: How the caller gets a window that does not bind.
    """
    if has_gap:
        obstacle = (
            "contexts that do not end where their output begins (succ chunks, or output_positions='after_longest'): the "
            "window would count the wrong tokens"
        )
        other = "para contexts with output_positions='successive'"
    elif weighting == "vanilla":
        obstacle = "weighting 'vanilla': one softmax over all contexts cannot honour a window"
        other = "weighting 'uniform' or 'fid'"
    else:
        return
    raise ValueError(
        f"Got {window}, with {obstacle}. Expected every context and its output within the window. Fix: {fix}, or use {other}."
    )


class _Causal(torch.autograd.Function):
    """Ordinary causal attention of every segment to its path: the self call alone."""

    @staticmethod
    def forward(ctx: Any, q, k, v, packed, kernel, options):
        call = packed.self_call
        out, lse = attend(kernel, q, *gather_keys(k, v, call), call, options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = packed, kernel, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):
        q, k, v, out, lse = ctx.saved_tensors
        packed, kernel, options = ctx.arguments
        call = packed.self_call
        dq, dk, dv = attend_backward(kernel, dout, q, *gather_keys(k, v, call), out, lse, call, options)
        return dq, *scatter_key_gradients(k, [(call, dk, dv)]), None, None, None


class SplitForm(torch.autograd.Function):
    """Self call and cross call, merged. The output's own attention is computed once, not once per context."""

    @staticmethod
    def forward(ctx: Any, q, k, v, packed, kernel, options, rotation, with_shares=False):
        rows = slice(packed.output_start, packed.output_end)
        self_call, cross_call = packed.self_call, packed.cross_call

        # Self call: every segment against its path. In the output's rows: (O_out, l_out).
        out, lse_HT = attend(kernel, q, *gather_keys(k, v, self_call), self_call, options)
        o_out = out[rows].clone()

        # Cross call: the output's rows, once per branch, against context i alone: (O_i, l_i).
        q_branch = q[rows].index_select(0, packed.branch_rows)
        contexts = gather_keys(k[: rows.start], v[: rows.start], cross_call, rotation)
        o_branch, l_branch_HQ = attend(kernel, q_branch, *contexts, cross_call, options.without_causality())

        # Merge: out = share_out O_out + sum_i share_i O_i   (eqs. 3, 4, 7).
        share_out, share_branch = attention_shares(lse_HT[:, rows].T, l_branch_HQ.T, packed)
        mixed = sum_over_branches(share_branch[..., None] * o_branch, packed)
        out[rows] = mixed.addcmul_(share_out[..., None], at_least_float32(o_out)).to(out.dtype)

        # With fixed weights the backward needs A_i, which O_out and O_i give.
        parts = (o_out, o_branch) if has_fixed_weights(packed) else (None, None)
        ctx.save_for_backward(q, k, v, out, lse_HT, l_branch_HQ, *parts)
        ctx.arguments = packed, kernel, options, rotation
        if not with_shares:
            return out
        ctx.mark_non_differentiable(share_branch)
        return out, share_branch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, *_):
        q, k, v, out, lse_HT, l_branch_HQ, o_out, o_branch = ctx.saved_tensors
        packed, kernel, options, rotation = ctx.arguments
        rows = slice(packed.output_start, packed.output_end)
        self_call, cross_call = packed.self_call, packed.cross_call

        # The (out, lse) of the module's table: what each call's backward takes in place of its own results.
        given = _given_to_backward(out[rows], lse_HT[:, rows].T, l_branch_HQ.T, o_out, o_branch, packed)

        # Self call. Contexts and single runs keep their own (out, lse); the output's rows take (out*, lse*).
        out, lse_HT = out.clone(), lse_HT.clone()
        out[rows], lse_HT[:, rows] = given.out_self, given.lse_self.T
        dq, dk, dv = attend_backward(kernel, dout, q, *gather_keys(k, v, self_call), out, lse_HT, self_call, options)

        # Cross call, with (A_i, L_i - log w_i) for fixed weights.
        dq_branch, dk_branch, dv_branch = attend_backward(
            kernel,
            dout[rows].index_select(0, packed.branch_rows),
            q[rows].index_select(0, packed.branch_rows),
            *gather_keys(k[: rows.start], v[: rows.start], cross_call, rotation),
            given.out_branch,
            given.lse_branch.T.contiguous(),
            cross_call,
            options.without_causality(),
        )

        # Sum: a query over its calls, a key over calls, branches and shared paths.
        dq[rows] += sum_over_branches(at_least_float32(dq_branch), packed).to(dq.dtype)
        dk_and_dv = scatter_key_gradients(k, [(self_call, dk, dv), (cross_call, dk_branch, dv_branch)], rotation)
        return dq, *dk_and_dv, *[None] * 5


class PairsForm(torch.autograd.Function):
    """Each branch as one causal call over [context, output]: exact where a window depends on the true distance."""

    @staticmethod
    def forward(ctx: Any, q, k, v, packed, kernel, options, rotation, with_shares=False):
        rows = slice(packed.output_start, packed.output_end)
        self_call, pairs_call = packed.self_call, packed.pairs_call

        # Self call: contexts and single runs. The output's rows are replaced below.
        out, lse_HT = attend(kernel, q, *gather_keys(k, v, self_call), self_call, options)

        # Pairs call: the output's rows, once per branch, against [K_i, K_out]: (A_i, L_i).
        q_branch = q[rows].index_select(0, packed.branch_rows)
        a_branch, l_branch = attend(kernel, q_branch, *gather_keys(k, v, pairs_call, rotation), pairs_call, options)

        # Mix: out = sum_i w_i A_i   (eqs. 3 and 7).
        weights = branch_weights(l_branch.T, packed)
        mixed = sum_over_branches(weights[..., None] * a_branch, packed)
        out[rows] = mixed.to(out.dtype)

        # What the backward of the pairs call takes: (A_i, L_i - log w_i) for fixed weights, (out, logsumexp_i L_i) for fid.
        if has_fixed_weights(packed):
            lse_branch = l_branch - weights.log().T
        else:
            a_branch = out[rows][packed.branch_rows]
            lse_branch = logsumexp_over_branches(l_branch.T, packed)[packed.branch_rows].T.contiguous()
        ctx.save_for_backward(q, k, v, out, lse_HT, a_branch, lse_branch)
        ctx.arguments = packed, kernel, options, rotation
        if not with_shares:
            return out
        # In branch i the context has what the output leaves: 1 - exp(l_out - L_i).
        share_out = torch.exp(lse_HT[:, rows].T[packed.branch_rows] - l_branch.T)
        share_branch = weights * (1 - share_out)
        ctx.mark_non_differentiable(share_branch)
        return out, share_branch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, *_):
        q, k, v, out, lse_HT, out_branch, lse_branch = ctx.saved_tensors
        packed, kernel, options, rotation = ctx.arguments
        rows = slice(packed.output_start, packed.output_end)
        self_call, pairs_call = packed.self_call, packed.pairs_call

        # Self call. The forward replaced the output's rows, so no gradient reaches the call through them.
        dout_self = dout.clone()
        dout_self[rows] = 0
        dq, dk, dv = attend_backward(
            kernel, dout_self, q, *gather_keys(k, v, self_call), out, lse_HT, self_call, options
        )

        # Pairs call: P = exp(S - lse_branch) is w_i times the softmax of branch i.
        dq_branch, dk_branch, dv_branch = attend_backward(
            kernel,
            dout[rows].index_select(0, packed.branch_rows),
            q[rows].index_select(0, packed.branch_rows),
            *gather_keys(k, v, pairs_call, rotation),
            out_branch,
            lse_branch,
            pairs_call,
            options,
        )

        # Sum: a query over its calls, a key over calls, branches and shared paths.
        dq[rows] += sum_over_branches(at_least_float32(dq_branch), packed).to(dq.dtype)
        dk_and_dv = scatter_key_gradients(k, [(self_call, dk, dv), (pairs_call, dk_branch, dv_branch)], rotation)
        return dq, *dk_and_dv, *[None] * 5


class _Given(NamedTuple):
    """The (out, lse) that each call's backward takes in the output's rows, see the module's docstring."""

    out_self: torch.Tensor  # (U, H, D)
    lse_self: torch.Tensor  # (U, H)
    out_branch: torch.Tensor  # (Q, H, D)
    lse_branch: torch.Tensor  # (Q, H)


def _given_to_backward(
    out: torch.Tensor,
    l_out: torch.Tensor,
    l_branch: torch.Tensor,
    o_out: torch.Tensor | None,
    o_branch: torch.Tensor | None,
    packed: PackedSegments,
) -> _Given:
    """From the mixed output (U, H, D), the log-sum-exps (U, H) and (Q, H), and for fixed weights O_out (U, H, D) and O_i (Q, H, D)."""
    rows_Q = packed.branch_rows
    if not has_fixed_weights(packed):
        # One softmax: every call takes its output and log-sum-exp. The output's keys count n times in fid.
        total, counted = joint_logsumexp(l_out, l_branch, packed)
        return _Given(out, total - (counted - l_out), out.index_select(0, rows_Q), total[rows_Q])
    assert o_out is not None and o_branch is not None

    # Context i: A_i and L_i - log w_i.
    lse_branch = torch.logaddexp(l_branch, l_out[rows_Q]) - fixed_weights(packed, l_out.dtype).log()
    context_share = torch.sigmoid(l_branch - l_out[rows_Q])[..., None]
    a_branch = torch.lerp(at_least_float32(o_out).index_select(0, rows_Q), at_least_float32(o_branch), context_share)

    # Output: lse* = -logsumexp_i(log w_i - L_i), out* = sum_i exp(log w_i - L_i + lse*) A_i.
    lse_self = -logsumexp_over_branches(-lse_branch, packed)
    out_self = sum_over_branches(torch.exp(lse_self[rows_Q] - lse_branch)[..., None] * a_branch, packed)
    return _Given(out_self.to(out.dtype), lse_self, a_branch.to(out.dtype), lse_branch)
