r"""MISO attention over packed segments: forward, merge and exact backward. Knows no kernel and no model.

For an output token with branches i = 1..n (one a context), with `(O_i, l_i)` the attention to context i alone and its
log-sum-exp, and `(O_out, l_out)` that to the output itself,

    L_i = logaddexp(l_i, l_out)                      log-sum-exp of branch i, over [K_i, K_out]
    A_i = O_out + sigmoid(l_i - l_out) (O_i - O_out) attention of branch i
    out = sum_i w_i A_i                              eq. 3 of the paper

with fixed w (uniform: 1/n, section 4.2), w_i = exp(L_i) / sum_j exp(L_j) (fid, eq. 7), or, instead of the sum, one
softmax over all contexts and the output (vanilla, eq. 4). Two kernel calls a layer give all of it: the *self* call
(every segment against its own path) and the *cross* call (the output against each context).

**Backward.** A raw flash backward recomputes P = exp(S - lse) and dS = P * (dO V^T - rowsum(dO * out)): it differentiates
a softmax whose normaliser and output are *given*. So the gradient of the mixture needs no dLSE kernel, only other
(dO, out, lse) than the forward's:

    out -> context i, fixed:   dO, A_i, L_i - log w_i      dS_ij = w_i p_ij (dO.v_j - dO.A_i), dV_j = w_i p_ij dO
    out -> out, fixed:         dO, out*, lse*              P = sum_i w_i exp(S - L_i) = exp(S - lse*),
                               lse* = -logsumexp_i(log w_i - L_i), and sum_i w_i p_i (dO.A_i) = P dO.out* for
                               out* = sum_i a_i A_i, a_i = exp(log w_i - L_i + lse*)
    fid:                       dO, out, G = logsumexp_i L_i to contexts; G - log n to the output, which counts n times
    vanilla:                   dO, out, logaddexp(logsumexp_i l_i, l_out) everywhere

Shapes: T packed tokens, U output tokens, Q branch rows (an output row for each of its branches), S key rows of a call,
H query heads, G key-value heads, D head dimension.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from trl_miso.attention.shares import Shares
from trl_miso.segments.packed import WEIGHTINGS, PackedSegments, Varlen


class Rotation(Protocol):
    """R(offset) x for x (N, heads, D) and offsets (N,) in 0..limit - 1, in positions; or its inverse, R(-offset) x."""

    def __call__(
        self, x_NHD: torch.Tensor, offset_N: torch.Tensor, limit: int, inverse: bool = False
    ) -> torch.Tensor: ...


class Kernel(Protocol):
    """Raw variable-length attention, see `kernels.py`."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Varlen, options: "KernelOptions"
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
        options: "KernelOptions",
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class KernelOptions:
    """`scale` multiplies the scores; `window` is the number of keys a query sees, itself included (0: all); a
    `softcap` c > 0 makes the scores `c tanh(s / c)`; causal calls align the last query with the last key."""

    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0

    def without_causality(self) -> "KernelOptions":
        return KernelOptions(self.scale, causal=False, window=0, softcap=self.softcap)


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
    """Attention of one packed batch: contexts and single runs causally, outputs mixed over their branches.

    Equals, for each output row, the weighted sum of softmax attention over each context followed by the output (see
    `reference.py`). Exact gradients to q, k and v. Uses the split form, or the pairs form where `options.window` binds.

    Args:
        q_THD: (T, H, D), rotated to the batch's positions.
        k_TGD: (T, G, D). v_TGD: (T, G, D). H is a multiple of G.
        packed: Segment metadata on the same device.
        rotation: Applied to the keys of contexts that end elsewhere than the output begins, in the output's view of them.
        shares: Is given how much of the outputs' attention each context has.

    Returns:
        (T, H, D), in the dtype of q.

    Raises:
        ValueError: If a window binds and the mixture cannot honour it.
    """
    if not packed.num_mixed:
        return _Varlen.apply(q_THD, k_TGD, v_TGD, packed, kernel, options)
    binds = 0 < options.window < packed.longest
    form = _Pairs if binds else _Split
    if binds:
        _check_window(packed, options)
    else:
        options = KernelOptions(options.scale, options.causal, 0, options.softcap)
    return form.apply(q_THD, k_TGD, v_TGD, packed, kernel, options, rotation, shares)


def _check_window(packed: PackedSegments, options: KernelOptions) -> None:
    got = f"a sliding window of {options.window} tokens and a context with its output of {packed.longest}"
    if packed.gap:
        raise ValueError(
            f"Got {got} in a layout in which contexts do not end where their output begins (succ chunks, or "
            "output_positions='after_longest'): the window would count the wrong tokens. Expected: every context and "
            "its output within the window. Fix: set max_length to at most the window, or use para contexts with "
            "output_positions='successive'."
        )
    if WEIGHTINGS[packed.weighting] == "vanilla":
        raise ValueError(
            f"Got {got} with context_weighting='vanilla', expected a window that does not bind: one softmax over all "
            "contexts has no pairs form. Fix: set max_length to at most the window, or use 'uniform' or 'fid'."
        )
    assert packed.pair_kv_index is not None, "the collator must be told of the window"


class _Varlen(torch.autograd.Function):
    """Ordinary causal attention of every segment to its path: the self call alone."""

    @staticmethod
    def forward(ctx: Any, q, k, v, packed, kernel, options):
        call = packed.self_call
        out, lse = kernel.forward(q, *_keys(k, v, call), call, options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = packed, kernel, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):
        q, k, v, out, lse = ctx.saved_tensors
        packed, kernel, options = ctx.arguments
        call = packed.self_call
        dq, dk, dv = kernel.backward(dout, q, *_keys(k, v, call), out, lse, call, options)
        return dq, *_sum_keys(k, [(call, dk, dv)]), None, None, None


class _Split(torch.autograd.Function):
    """Self call and cross call, merged."""

    @staticmethod
    def forward(ctx: Any, q, k, v, packed, kernel, options, rotation, shares=None):
        rows = slice(packed.output_start, packed.output_end)
        own, cross = packed.self_call, packed.cross_call
        out, lse_HT = kernel.forward(q, *_keys(k, v, own), own, options)
        q_branch = q[rows].index_select(0, packed.branch_rows)
        contexts = _keys(k[: rows.start], v[: rows.start], cross, rotation)
        o_branch, l_branch_HQ = kernel.forward(q_branch, *contexts, cross, options.without_causality())
        o_out = out[rows].clone()
        share_out, share_branch = _shares(lse_HT[:, rows].T, l_branch_HQ.T, packed)
        if shares is not None:
            shares.add(share_branch)
        mixed = _to_outputs(share_branch[..., None] * o_branch, packed)
        out[rows] = mixed.addcmul_(share_out[..., None], _wide(o_out)).to(out.dtype)
        parts = (o_out, o_branch) if WEIGHTINGS[packed.weighting] == "uniform" else (None, None)
        ctx.save_for_backward(q, k, v, out, lse_HT, l_branch_HQ, *parts)
        ctx.arguments = packed, kernel, options, rotation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):
        q, k, v, out, lse_HT, l_branch_HQ, o_out, o_branch = ctx.saved_tensors
        packed, kernel, options, rotation = ctx.arguments
        rows = slice(packed.output_start, packed.output_end)
        own, cross = packed.self_call, packed.cross_call
        given = _given(out[rows], lse_HT[:, rows].T, l_branch_HQ.T, o_out, o_branch, packed)
        out, lse_HT = out.clone(), lse_HT.clone()
        out[rows], lse_HT[:, rows] = given.out_self, given.lse_self.T
        dq, dk, dv = kernel.backward(dout, q, *_keys(k, v, own), out, lse_HT, own, options)
        dq_branch, dk_branch, dv_branch = kernel.backward(
            dout[rows].index_select(0, packed.branch_rows),
            q[rows].index_select(0, packed.branch_rows),
            *_keys(k[: rows.start], v[: rows.start], cross, rotation),
            given.out_branch,
            given.lse_branch.T.contiguous(),
            cross,
            options.without_causality(),
        )
        dq[rows] += _to_outputs(_wide(dq_branch), packed).to(dq.dtype)
        return dq, *_sum_keys(k, [(own, dk, dv), (cross, dk_branch, dv_branch)], rotation), *[None] * 5


class _Pairs(torch.autograd.Function):
    """Each branch as one causal call over [context, output]: right where a window depends on the true distance."""

    @staticmethod
    def forward(ctx: Any, q, k, v, packed, kernel, options, rotation, shares=None):
        rows = slice(packed.output_start, packed.output_end)
        own, pairs = packed.self_call, packed.pairs_call
        out, lse_HT = kernel.forward(q, *_keys(k, v, own), own, options)
        q_branch = q[rows].index_select(0, packed.branch_rows)
        a_branch, l_branch = kernel.forward(q_branch, *_keys(k, v, pairs, rotation), pairs, options)
        weights = _branch_weights(l_branch.T, packed)
        if shares is not None:
            own_mass = torch.exp(lse_HT[:, rows].T[packed.branch_rows] - l_branch.T)
            shares.add(weights * (1 - own_mass))
        mixed = _to_outputs(weights[..., None] * a_branch, packed)
        out[rows] = mixed.to(out.dtype)
        if WEIGHTINGS[packed.weighting] == "uniform":
            lse_branch = l_branch - weights.log().T
        else:
            a_branch = out[rows][packed.branch_rows]
            lse_branch = _logsumexp(l_branch.T, packed)[packed.branch_rows].T.contiguous()
        ctx.save_for_backward(q, k, v, out, lse_HT, a_branch, lse_branch)
        ctx.arguments = packed, kernel, options, rotation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):
        q, k, v, out, lse_HT, out_branch, lse_branch = ctx.saved_tensors
        packed, kernel, options, rotation = ctx.arguments
        rows = slice(packed.output_start, packed.output_end)
        own, pairs = packed.self_call, packed.pairs_call
        dout_own = dout.clone()
        dout_own[rows] = 0  # the self call's output rows were not used
        dq, dk, dv = kernel.backward(dout_own, q, *_keys(k, v, own), out, lse_HT, own, options)
        dq_branch, dk_branch, dv_branch = kernel.backward(
            dout[rows].index_select(0, packed.branch_rows),
            q[rows].index_select(0, packed.branch_rows),
            *_keys(k, v, pairs, rotation),
            out_branch,
            lse_branch,
            pairs,
            options,
        )
        dq[rows] += _to_outputs(_wide(dq_branch), packed).to(dq.dtype)
        return dq, *_sum_keys(k, [(own, dk, dv), (pairs, dk_branch, dv_branch)], rotation), *[None] * 5


def _shares(l_out: torch.Tensor, l_branch: torch.Tensor, packed: PackedSegments) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of each output token's attention is its attention to the output (U, H), and to each context (Q, H).

    They sum to 1: out = share_out O_out + sum_i share_i O_i. For fixed weights share_i = w_i sigmoid(l_i - l_out).
    """
    if WEIGHTINGS[packed.weighting] == "uniform":
        shares = _fixed_weights(packed, l_out.dtype) * torch.sigmoid(l_branch - l_out[packed.branch_rows])
        return 1 - _to_outputs(shares, packed), shares
    total, l_out = _one_softmax(l_out, l_branch, packed)
    return torch.exp(l_out - total), torch.exp(l_branch - total[packed.branch_rows])


def _one_softmax(
    l_out: torch.Tensor, l_branch: torch.Tensor, packed: PackedSegments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp of fid's or vanilla's softmax, and of the output in it: fid counts it once a branch, vanilla once."""
    if WEIGHTINGS[packed.weighting] == "fid":
        l_out = l_out + _to_outputs(torch.ones_like(l_branch), packed).log()
    return torch.logaddexp(_logsumexp(l_branch, packed), l_out), l_out


class _Given(NamedTuple):
    """The (out, lse) that each call's backward takes on the output's rows in place of its own, see above."""

    out_self: torch.Tensor  # (U, H, D)
    lse_self: torch.Tensor  # (U, H)
    out_branch: torch.Tensor  # (Q, H, D)
    lse_branch: torch.Tensor  # (Q, H)


def _given(
    out: torch.Tensor,
    l_out: torch.Tensor,
    l_branch: torch.Tensor,
    o_out: torch.Tensor | None,
    o_branch: torch.Tensor | None,
    packed: PackedSegments,
) -> _Given:
    """From the mixed output (U, H, D) and the calls' own results; the last two are needed for fixed weights."""
    at = packed.branch_rows
    if WEIGHTINGS[packed.weighting] != "uniform":
        total, counted = _one_softmax(l_out, l_branch, packed)
        return _Given(out, total - (counted - l_out), out.index_select(0, at), total[at])
    assert o_out is not None and o_branch is not None
    lse_branch = torch.logaddexp(l_branch, l_out[at]) - _fixed_weights(packed, l_out.dtype).log()  # L_i - log w_i
    lse_self = -_logsumexp(-lse_branch, packed)
    mass = torch.sigmoid(l_branch - l_out[at])[..., None]
    a_branch = torch.lerp(_wide(o_out).index_select(0, at), _wide(o_branch), mass)
    out_self = _to_outputs(torch.exp(lse_self[at] - lse_branch)[..., None] * a_branch, packed)
    return _Given(out_self.to(out.dtype), lse_self, a_branch.to(out.dtype), lse_branch)


def _fixed_weights(packed: PackedSegments, dtype: torch.dtype) -> torch.Tensor:
    """(Q, 1) weights from their bit patterns."""
    assert packed.branch_weight is not None
    return packed.branch_weight.view(torch.float64).to(dtype)[:, None]


def _branch_weights(lse_branch: torch.Tensor, packed: PackedSegments) -> torch.Tensor:
    """(Q, H or 1) weights of whole branches from their log-sum-exps L_i."""
    if WEIGHTINGS[packed.weighting] == "uniform":
        return _fixed_weights(packed, lse_branch.dtype)
    return torch.exp(lse_branch - _logsumexp(lse_branch, packed)[packed.branch_rows])


def _to_outputs(x_Q: torch.Tensor, packed: PackedSegments) -> torch.Tensor:
    """Sum over each output token's branches: (Q, ...) -> (U, ...)."""
    return _sum_by(x_Q, packed.branch_rows, packed.output_end - packed.output_start)


def _logsumexp(x_QH: torch.Tensor, packed: PackedSegments) -> torch.Tensor:
    """Log-sum-exp over each output token's branches: (Q, H) -> (U, H)."""
    return _logsumexp_by(x_QH, packed.branch_rows, packed.output_end - packed.output_start)


def _sum_by(x: torch.Tensor, at: torch.Tensor, size: int) -> torch.Tensor:
    """Rows that go to the same of `size` rows, summed."""
    return x.new_zeros(size, *x.shape[1:]).index_add_(0, at, x)


def _logsumexp_by(x_NH: torch.Tensor, at: torch.Tensor, size: int) -> torch.Tensor:
    """Log-sum-exp of rows that go to the same of `size` rows, each of which has one at least."""
    top = x_NH.new_full((size, x_NH.shape[1]), -torch.inf)
    top = top.scatter_reduce_(0, at[:, None].expand_as(x_NH), x_NH, "amax")
    return top + _sum_by(torch.exp(x_NH - top[at]), at, size).log()


def _keys(
    k: torch.Tensor, v: torch.Tensor, call: Varlen, rotation: Rotation | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value rows of a call: gathered where prefixes are shared, turned where contexts end elsewhere."""
    if call.kv_index is not None:
        k, v = k.index_select(0, call.kv_index), v.index_select(0, call.kv_index)
    if call.kv_offset is not None:
        assert rotation is not None, "a batch with key offsets needs the model's rotation"
        k = rotation(k, call.kv_offset, call.max_seqlen_k)
    return k, v


def _sum_keys(
    k: torch.Tensor, calls: list[tuple[Varlen, torch.Tensor, torch.Tensor]], rotation: Rotation | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transpose of `_keys`, summed over calls and copies in float32 at least: (dk, dv) of all rows."""
    if len(calls) == 1 and calls[0][0].kv_index is None:
        return calls[0][1], calls[0][2]
    sums = _wide(k.new_zeros(k.shape)), _wide(k.new_zeros(k.shape))
    for call, dk, dv in calls:
        if call.kv_offset is not None and rotation is not None:
            dk = rotation(dk, call.kv_offset, call.max_seqlen_k, inverse=True)
        for total, gradient in zip(sums, (dk, dv), strict=True):
            if call.kv_index is None:
                total[: gradient.shape[0]] += gradient
            else:
                total.index_add_(0, call.kv_index, gradient.to(total.dtype))
    return sums[0].to(k.dtype), sums[1].to(k.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Half precision to float32: several bf16 gradients are summed there."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
