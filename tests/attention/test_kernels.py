"""Kernels: arguments, shapes and dtypes without a GPU; results against those of the CPU on a GPU."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from trl_miso.attention.kernels import KERNELS, KernelOptions, resolve_kernel
from trl_miso.attention.mixture import miso_attention
from trl_miso.attention.rotation import ModelRotation
from trl_miso.segments import parallel, single
from trl_miso.segments.packed import Varlen, pack

H, G, D = 4, 2, 16
CALL = Varlen(torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([0, 3, 9], dtype=torch.int32), 3, 6)
WEIGHTINGS_AND_WINDOWS = [("uniform", 0), ("fid", 0), ("vanilla", 0), ("uniform", 40), ("fid", 40)]
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _tensors(device="cpu", dtype=torch.float64, head_dim=D):
    generator = torch.Generator().manual_seed(0)
    shapes = (5, H, head_dim), (9, G, head_dim), (9, G, head_dim), (5, H, head_dim)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize(
    "options", [KernelOptions(0.3), KernelOptions(0.3, causal=False), KernelOptions(0.3, window=2)]
)
def test_cpu_and_reference_equal_autograd(options):
    """Bottom-right causality with keys longer than queries, GQA, windows."""
    q, k, v, dout = _tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    outs, lses = [], []
    for rows, keys in ((slice(0, 3), slice(0, 3)), (slice(3, 5), slice(3, 9))):
        kk, vv = (x[keys].repeat_interleave(H // G, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], kk) * options.scale
        n_q, n_k = scores.shape[1:]
        distance = torch.arange(n_k - n_q, n_k)[:, None] - torch.arange(n_k)
        hidden = ((distance < 0) if options.causal else False) | (distance >= (options.window or 99))
        scores = scores.masked_fill(torch.as_tensor(hidden).expand(n_q, n_k), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vv))
        lses.append(scores.logsumexp(-1))
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    gradients = torch.autograd.grad((out * dout).sum(), leaves)
    for name in ("cpu", "reference"):
        got, got_lse = KERNELS[name].forward(q.detach(), k.detach(), v.detach(), CALL, options)
        torch.testing.assert_close(got, out, rtol=0, atol=1e-12)
        torch.testing.assert_close(got_lse, lse, rtol=0, atol=1e-12)
        back = KERNELS[name].backward(dout, q.detach(), k.detach(), v.detach(), got, got_lse, CALL, options)
        for a, b in zip(back, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_log_sum_exp_is_float32_at_least(dtype):
    q, k, v, _ = _tensors(dtype=dtype)
    for name in ("cpu", "reference"):
        out, lse = KERNELS[name].forward(q, k, v, CALL, KernelOptions(0.3))
        assert out.dtype == dtype and lse.dtype == torch.float32 and lse.shape == (H, 5)


@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize(
    "options", [KernelOptions(0.3), KernelOptions(0.3, causal=False), KernelOptions(0.3, window=4)]
)
def test_torch_flash_shapes_on_meta(head_dim, options):
    """torch checks the arguments of the real operator on meta tensors. 20 is not a multiple of 8 and must be padded."""
    q, k, v, dout = _tensors("meta", torch.bfloat16, head_dim)
    call = Varlen(CALL.cu_seqlens_q.to("meta"), CALL.cu_seqlens_k.to("meta"), 3, 6)
    out, lse = KERNELS["torch_flash"].forward(q, k, v, call, options)
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    assert lse.shape == (H, 5) and lse.dtype == torch.float32
    gradients = KERNELS["torch_flash"].backward(dout, q, k, v, out, lse, call, options)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def _trained(device, dtype, kernel, weighting, window):
    """Forward and backward of a batch with shared prefixes, offsets and a single run, with the rotation of Llama."""
    config = LlamaConfig(head_dim=64, num_attention_heads=8)
    rotation = ModelRotation(LlamaRotaryEmbedding(config).to(device), None, apply_rotary_pos_emb)
    contexts = [list(range(100)) + [1000 + i] * (10 * i + 1) for i in range(6)]
    batch = [parallel(contexts, 70, [1 / 6] * 6, "successive")[1], single(130)]
    _, _, packed = pack(batch, weighting, window)
    moved = {key: x.to(device) if torch.is_tensor(x) else x for key, x in packed.to_batch().items()}
    total = sum(example.num_tokens for example in batch)
    leaves = [torch.randn(total, h, 64, device=device, dtype=dtype, requires_grad=True) for h in (8, 2, 2)]
    packed = type(packed).from_batch(moved)

    def step():
        out = miso_attention(*leaves, packed, kernel, KernelOptions(0.1, window=window), rotation)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


@pytest.mark.parametrize(("weighting", "window"), WEIGHTINGS_AND_WINDOWS)
def test_a_layer_waits_for_no_value(weighting, window):
    """On the meta device, any read of a tensor's value fails. So no layer waits for the GPU."""
    gradients = _trained("meta", torch.bfloat16, KERNELS["torch_flash"], weighting, window)()
    assert [g.shape[1] for g in gradients] == [8, 2, 2]


@gpu
@needs_cuda
@pytest.mark.parametrize(("weighting", "window"), WEIGHTINGS_AND_WINDOWS)
def test_a_layer_does_not_synchronize(weighting, window):
    step = _trained("cuda", torch.bfloat16, KERNELS["torch_flash"], weighting, window)
    step()  # loads libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _resolve(requested, base="sdpa", device="cpu", dtype=torch.float32, head_dim=64, **options):
    return resolve_kernel(requested, base, torch.device(device), dtype, head_dim, KernelOptions(0.3, **options)).name


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"requested": "flash_attn"}, "needs CUDA tensors"),
        ({"requested": "torch_flash"}, "needs CUDA tensors"),
        ({"requested": "torch_flash", "device": "cuda"}, "float16 and bfloat16"),
        ({"requested": "torch_flash", "device": "cuda", "dtype": torch.bfloat16, "softcap": 3.0}, "no softcap"),
        ({"requested": "cpu", "device": "cuda"}, "runs on CPU tensors"),
        ({"requested": "cpu", "base": "flash_attention_2"}, "no FlashAttention-2 kernel"),
        ({"requested": "auto", "base": "flash_attention_2"}, "flash_attention_2.*needs CUDA tensors"),
    ],
)
def test_explicit_requests_are_honoured_or_refused(arguments, reason):
    with pytest.raises(ValueError, match=f"Got attention_kernel.*{reason}.*Fix"):
        _resolve(**arguments)


@gpu
@needs_cuda
@pytest.mark.parametrize("name", ["torch_flash", "flash_attn", "hub_flash"])
@pytest.mark.parametrize("weighting", ["uniform", "fid", "vanilla"])
@pytest.mark.parametrize("head_dim", [64, 128, 20])
def test_cuda_kernels_equal_cpu(name, weighting, head_dim):
    """bf16 on the GPU against float32 on the CPU: forward and gradients agree within the error of bf16, in both forms."""
    kernel = KERNELS[name]
    options = KernelOptions(head_dim**-0.5)
    reason = kernel.refuses(torch.device("cuda"), torch.bfloat16, head_dim, options)
    if reason:
        pytest.skip(reason)
    contexts = [list(range(100)) + [1000 + i] * (10 * i + 1) for i in range(6)]
    batch = [parallel(contexts, 70, [1 / 6] * 6, "after_longest")[1], single(130)]
    windows = (0, 40) if weighting != "vanilla" else (0,)
    for window in windows:
        if window:
            batch = [parallel([contexts[5]] * 3, 70, [1 / 3] * 3, "successive")[1], single(130)]
        _, _, packed = pack(batch, weighting, window=1)
        results = []
        for device, dtype, which in (("cpu", torch.float32, KERNELS["cpu"]), ("cuda", torch.bfloat16, kernel)):
            generator = torch.Generator().manual_seed(0)
            total = sum(example.num_tokens for example in batch)
            leaves = [torch.randn(total, h, head_dim, generator=generator) for h in (8, 2, 2)]
            grad = torch.randn(total, 8, head_dim, generator=generator).to(device, dtype)
            leaves = [x.bfloat16().to(device, dtype).requires_grad_() for x in leaves]
            moved = {key: x.to(device) if torch.is_tensor(x) else x for key, x in packed.to_batch().items()}
            on_device = type(packed).from_batch(moved)
            out = miso_attention(*leaves, on_device, which, KernelOptions(options.scale, window=window))
            results.append([x.float().cpu() for x in (out, *torch.autograd.grad((out * grad).sum(), leaves))])
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * b.abs().max()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [5], [1, 7, 3]])
def test_one_query_per_sequence(lengths, groups, causal):
    """As in generation. There may be more keys than the sequences read."""
    q, k, v = (
        torch.randn(n, heads, 8, dtype=torch.float64) for n, heads in ((len(lengths), 4), (20, groups), (20, groups))
    )
    cu_q, cu_k = torch.arange(len(lengths) + 1, dtype=torch.int32), torch.tensor([0, *lengths]).cumsum(0).int()
    call, options = Varlen(cu_q, cu_k, 1, max(lengths)), KernelOptions(0.4, causal=causal)
    for got, expected in zip(
        *(KERNELS[name].forward(q, k, v, call, options) for name in ("cpu", "reference")), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
