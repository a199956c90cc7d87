"""FlashAttention-2's compiled functions in dense torch, stricter than the originals, for tests without a GPU.

Makes every check that the compiled code makes, refuses what it would read wrongly without a check, and leaves NaN in memory that it
would not write. It computes in float32 and rounds to the dtype of the inputs.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ALIGNMENT = 16  # bytes: rows are read in vectors of this size


def dense_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap):
    """(out, lse): NaN where the compiled code would write nothing."""
    _check_inputs({"q": q, "k": k, "v": v}, cu_q, cu_k, max_q, max_k)
    causal, left, right = _normalize_window(max_q, max_k, causal, left, right)
    out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    for rows, keys in _sequences(cu_q, cu_k):
        scores, _ = _scores(q[rows], k[keys], scale, left, right, softcap)
        lse[:, rows] = scores.logsumexp(-1)
        probabilities = (scores - lse[:, rows, None]).exp()
        out[rows] = torch.einsum("hqk,khd->qhd", probabilities, _for_queries(v[keys], q)).to(q.dtype)
    return out, lse


def dense_backward(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap):
    """Fill dq, dk, dv from the given (out, lse): NaN where the compiled code would write nothing."""
    _check_inputs({"dout": dout, "q": q, "k": k, "v": v, "out": out}, cu_q, cu_k, max_q, max_k)
    _require(lse.dtype == torch.float32 and lse.shape == (q.shape[1], q.shape[0]), "lse is not float32 (H, total_q)")
    _require(lse.is_contiguous(), "lse is not contiguous")
    _require(dout.shape == out.shape == q.shape, "dout, out and q differ in shape")
    for gradient, x in ((dq, q), (dk, k), (dv, v)):
        _require(gradient.shape == x.shape and gradient.dtype == x.dtype, "a gradient differs from its input")
        _require(gradient.is_contiguous(), "a gradient is not contiguous")
        gradient.fill_(torch.nan)
    causal, left, right = _normalize_window(max_q, max_k, causal, left, right)
    groups = k.shape[1], q.shape[1] // k.shape[1]
    for rows, keys in _sequences(cu_q, cu_k):
        scores, slope = _scores(q[rows], k[keys], scale, left, right, softcap)
        probabilities = (scores - lse[:, rows, None]).exp()
        grad, wide_out, wide_q = dout[rows].float(), out[rows].float(), q[rows].float()
        delta = (grad * wide_out).sum(-1).T[..., None]
        d_scores = torch.einsum("qhd,khd->hqk", grad, _for_queries(v[keys], q)) - delta
        d_scores = d_scores * probabilities * slope * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", d_scores, _for_queries(k[keys], q)).to(q.dtype)
        dk[keys] = torch.einsum("hqk,qhd->khd", d_scores, wide_q).unflatten(1, groups).sum(2).to(k.dtype)
        dv[keys] = torch.einsum("hqk,qhd->khd", probabilities, grad).unflatten(1, groups).sum(2).to(v.dtype)


def _require(condition, message):
    if not condition:
        raise RuntimeError(f"FlashAttention: {message}")


def _check_inputs(tensors, cu_q, cu_k, max_q, max_k):
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    _require(q.dtype in (torch.float16, torch.bfloat16), f"only half precision, got {q.dtype}")
    for name, x in tensors.items():
        _require(x.dtype == q.dtype, f"{name} is {x.dtype}, q is {q.dtype}")
        _require(x.dim() == 3 and x.stride(-1) == 1, f"the last dimension of {name} is not contiguous")
        strides = [x.stride(i) * x.element_size() for i in (0, 1) if x.shape[i] > 1]
        _require(not any(stride % ALIGNMENT for stride in strides), f"rows of {name} are not aligned")
        _require(x.data_ptr() % ALIGNMENT == 0, f"{name} is not aligned")
    _require(q.shape[2] <= 256 and q.shape[2] % 8 == 0, f"head_dim {q.shape[2]}")
    _require(k.shape == v.shape and k.shape[2] == q.shape[2], "shapes of q, k and v")
    _require(q.shape[1] % k.shape[1] == 0, "query heads are no multiple of key-value heads")
    for name, cu, x, longest in (("q", cu_q, q, max_q), ("k", cu_k, k, max_k)):
        _require(cu.dtype == torch.int32 and cu.is_contiguous(), f"cu_seqlens_{name} is not contiguous int32")
        _require(len(cu) > 1 and int(cu[0]) == 0 and int(cu[-1]) <= len(x), f"cu_seqlens_{name} goes past the end")
        _require(int(cu.diff().min()) > 0, f"an empty sequence of {name}")
        _require(int(cu.diff().max()) <= longest, f"max_seqlen_{name} {longest} is too small")
    _require(len(cu_q) == len(cu_k), "cu_seqlens of different lengths")


def _normalize_window(max_q, max_k, causal, left, right):
    left, right = (-1 if side >= max_k else side for side in (left, right))
    if max_q == 1:
        causal = False  # a single query, the last, sees all keys
    if causal:
        right = 0
    return causal, left, right


def _sequences(cu_q, cu_k):
    q, k = cu_q.tolist(), cu_k.tolist()
    return [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]


def _for_queries(x, q):
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _scores(q, k, scale, left, right, softcap):
    """Masked scores (H, Lq, Lk) in float32, bottom-right aligned, and their derivative by the scaled product."""
    scores = torch.einsum("qhd,khd->hqk", q.float(), _for_queries(k, q)) * scale
    slope = 1.0
    if softcap:
        squashed = (scores / softcap).tanh()
        scores, slope = softcap * squashed, 1 - squashed**2
    last_key = torch.arange(len(q))[:, None] + len(k) - len(q)
    key = torch.arange(len(k))
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    if right >= 0:
        hidden |= key > last_key + right
    if left >= 0:
        hidden |= key < last_key - left
    return scores.masked_fill(hidden, -torch.inf), slope


# Under flash-attn's own interface


def extension() -> types.ModuleType:
    """A module `flash_attn_2_cuda` with the two variable-length functions."""

    def varlen_fwd(q, k, v, out, cu_q, cu_k, seqused_k, leftpad_k, block_table, alibi, max_q, max_k, dropout, scale,
                   zero_tensors, causal, left, right, softcap, return_softmax, generator):  # fmt: skip
        unused = out, seqused_k, leftpad_k, block_table, alibi, generator
        _require(
            all(x is None for x in unused) and not dropout and not return_softmax, "an option that is not emulated"
        )
        out, lse = dense_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap)
        return out, lse, torch.empty(0, dtype=q.dtype), torch.zeros(2, dtype=torch.int64)

    def varlen_bwd(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, alibi, max_q, max_k, dropout, scale, zero_tensors,
                   causal, left, right, softcap, deterministic, generator, rng_state):  # fmt: skip
        _require(alibi is None and generator is None and not dropout, "an option that is not emulated")
        gradients = dq, dk, dv
        dense_backward(
            dout, q, k, v, out, lse, *gradients, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap
        )
        return *gradients, torch.empty(q.shape[1], len(q) + 128 * (len(cu_q) - 1))

    module = types.ModuleType("flash_attn_2_cuda")
    module.varlen_fwd, module.varlen_bwd = varlen_fwd, varlen_bwd
    return module


def import_flash_attn() -> types.ModuleType | None:
    """flash-attn's own Python interface over the emulation, on CPU tensors; None if the package is not installed."""
    sys.modules.setdefault("flash_attn_2_cuda", extension())
    try:
        from flash_attn import flash_attn_interface
    except ImportError:
        return None
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        op = getattr(flash_attn_interface, name)
        op.register_kernel("cpu")(op._init_fn)
    return flash_attn_interface


def hub_package(name: str = "flash_attn2") -> dict[str, types.ModuleType]:
    """The modules of the Hub's FlashAttention-2, by their names, over the emulation. The signatures are flash-attn's."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, causal, window_size_left=-1, window_size_right=-1,
                softcap=0.0):  # fmt: skip
        sides = window_size_left, window_size_right
        return *dense_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, *sides, softcap), None, None

    def backward(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, dropout, scale, causal, left, right,
                 softcap, alibi, deterministic):  # fmt: skip
        sizes = cu_q, cu_k, max_q, max_k
        dense_backward(dout, q, k, v, out, lse, dq, dk, dv, *sizes, scale, causal, left, right, softcap)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        sizes = cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k)
        scale = softmax_scale or q.shape[-1] ** -0.5
        return dense_forward(q, k, v, *sizes, scale, causal, -1, -1, 0.0)[0]

    def batched(q, k, v, softmax_scale=None, causal=False):
        lengths = [torch.arange(len(x) + 1, dtype=torch.int32) * x.shape[1] for x in (q, k)]
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        return varlen(*flat, *lengths, q.shape[1], k.shape[1], softmax_scale, causal).view_as(q)

    package, interface = types.ModuleType(name), types.ModuleType(f"{name}.flash_attn_interface")
    interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward = forward, backward
    package.flash_attn_varlen_func, package.flash_attn_func, package.flash_attn_with_kvcache = varlen, batched, varlen
    return {package.__name__: package, interface.__name__: interface}


# Under torch's operators


@contextmanager
def emulated_torch_flash() -> Iterator[None]:
    """torch's FlashAttention operators on CPU tensors."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, return_mask, *, scale=None, window_size_left=None,
                window_size_right=None, seqused_k=None, alibi_slopes=None, **options):  # fmt: skip
        left, right = _sides(window_size_left, window_size_right)
        out, lse = dense_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, 0.0)
        return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0, dtype=q.dtype)

    def backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *, scale=None,
                 window_size_left=None, window_size_right=None):  # fmt: skip
        left, right = _sides(window_size_left, window_size_right)
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        dout, out = dout.contiguous(), out.contiguous()  # as the operator does itself
        dense_backward(dout, q, k, v, out, lse, *gradients, cu_q, cu_k, max_q, max_k, scale, causal, left, right, 0.0)
        return tuple(gradients)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def _sides(left, right):
    return (-1 if side is None else side for side in (left, right))
