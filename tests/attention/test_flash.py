"""FlashAttention-2 kernels without a GPU: over an emulation that is stricter than the compiled functions.

`.ci/flash` installs flash-attn's Python interface, under which the emulation also runs. With `TRITON_INTERPRET=1` and
`FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE` flash-attn's own Triton kernels run instead of the emulation: float16, no windows, no softcap.
"""

import importlib.metadata
import os
import sys
import types

import pytest
import torch

from tests.support.flash_emulation import emulated_torch_flash, extension, import_flash_attn
from tests.support.models import rotation
from trl_miso.attention import flash
from trl_miso.attention.flash import HUB_REPOSITORY, FlashAttn, HubFlash, TorchFlash, why_no_flash
from trl_miso.attention.kernels import KERNELS, KernelOptions, resolve_kernel
from trl_miso.attention.mixture import miso_attention
from trl_miso.segments import parallel, single, successive
from trl_miso.segments.packed import Varlen, pack

TRITON = os.environ.get("FLASH_ATTENTION_TRITON_AMD_ENABLE") == "TRUE"
H, G = 4, 2
CUDA = torch.device("cuda", 0)
CALL = Varlen(torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([0, 3, 9], dtype=torch.int32), 3, 6)
CACHES = (
    flash.why_no_flash_attn,
    flash._import_flash_attn,
    flash.why_no_hub_flash,
    flash._load_hub_flash,
    flash._capability,
)


@pytest.fixture(autouse=True)
def fresh_caches():
    for cached in CACHES:
        cached.cache_clear()
    yield
    for cached in CACHES:
        cached.cache_clear()


@pytest.fixture
def emulated(request, monkeypatch):
    """A function from a kernel's name to the kernel over the emulation."""

    def kernel(name):
        if name == "torch_flash":
            if TRITON:
                pytest.skip("torch's operators have no Triton kernels")
            context = emulated_torch_flash()
            context.__enter__()
            request.addfinalizer(lambda: context.__exit__(None, None, None))
            return KERNELS[name]
        interface = _triton_interface() if TRITON else import_flash_attn()
        if interface is None:
            pytest.skip("needs flash-attn's Python interface (.ci/flash installs it)")
        monkeypatch.setattr(flash, "_import_flash_attn", lambda: interface)
        if name == "hub_flash":
            package = types.ModuleType("flash_attn2")
            monkeypatch.setitem(sys.modules, "flash_attn2", package)
            monkeypatch.setitem(sys.modules, "flash_attn2.flash_attn_interface", interface)
            monkeypatch.setattr(flash, "load_and_register_attn_kernel", lambda repository: package)
        return KERNELS[name]

    return kernel


def _triton_interface():
    """flash-attn's interface over its Triton kernels, whose log-sum-exp is (total_q, H), as (H, total_q)."""
    pytest.importorskip("flash_attn")
    pytest.importorskip("triton")
    from flash_attn import flash_attn_interface as interface

    def forward(*args, **kwargs):
        out, lse, *rest = interface._flash_attn_varlen_forward._init_fn(*args, **kwargs)
        return out, lse.T.contiguous(), *rest

    def backward(dout, q, k, v, out, lse, *args):
        return interface._flash_attn_varlen_backward._init_fn(dout, q, k, v, out, lse.T.contiguous(), *args)

    return types.SimpleNamespace(_flash_attn_varlen_forward=forward, _flash_attn_varlen_backward=backward)


def _batch(kind):
    contexts = [list(range(20)) + [100 + i] * n for i, n in enumerate((12, 3, 7))]
    if kind == "shared":
        return [parallel(contexts, 9, [0.5, 0.3, 0.2], "successive")[1], single(13)]
    if kind == "one token":
        return [parallel(contexts, 1, [0.5, 0.3, 0.2], "successive")[1]]
    if kind == "successive":
        return [successive([6, 4, 9], 5), single(1)]
    return [single(17), single(4)]


def _gradients(leaves, grad, packed, kernel, options):
    """(out, dq, dk, dv) of the mixture."""
    turn = rotation(leaves[0].shape[-1])
    out = miso_attention(*leaves, packed, kernel, options, turn)
    return [out, *torch.autograd.grad((out.double() * grad.double()).sum(), leaves)]


CASES = [
    ("shared", "uniform", 16, {}),
    ("shared", "fid", 20, {}),
    ("shared", "vanilla", 16, {}),
    ("one token", "uniform", 16, {}),
    ("successive", "uniform", 16, {}),
    ("plain", "uniform", 16, {}),
    ("shared", "uniform", 16, {"window": 14}),
    ("shared", "fid", 16, {"window": 14}),
    ("one token", "uniform", 16, {"window": 14}),
    ("plain", "uniform", 16, {"window": 5}),
    ("shared", "uniform", 16, {"softcap": 2.0}),
    ("shared", "fid", 20, {"softcap": 2.0}),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "weighting", "head_dim", "extra"), CASES)
@pytest.mark.parametrize("name", ["flash_attn", "hub_flash", "torch_flash"])
def test_within_twice_the_error_of_dense(emulated, name, kind, weighting, head_dim, extra, dtype):
    """Against float64, the root mean square error of the output and of each gradient is at most twice that of dense torch."""
    if name == "torch_flash" and "softcap" in extra:
        pytest.skip("refused: no softcap")
    if TRITON and (extra or dtype == torch.bfloat16 or name == "hub_flash"):
        pytest.skip("flash-attn's Triton kernels have no windows and no softcap; the interpreter has no bfloat16")
    kernel, options = emulated(name), KernelOptions(head_dim**-0.5, **extra)
    _, _, packed = pack(_batch(kind), weighting, window=1)
    total = sum(example.num_tokens for example in _batch(kind))
    errors, budgets = torch.zeros(4), torch.zeros(4)
    for seed in range(1 if TRITON else 4):
        generator = torch.Generator().manual_seed(seed)
        leaves = [torch.randn(total, heads, head_dim, generator=generator) for heads in (H, G, G, H)]
        *leaves, grad = (x.to(dtype) for x in leaves)
        results = []
        for which, precision in ((kernel, dtype), (KERNELS["reference"], dtype), (KERNELS["reference"], torch.float64)):
            inputs = [x.to(precision).requires_grad_() for x in leaves]
            results.append(_gradients(inputs, grad, packed, which, options))
        for squared, part in ((errors, results[0]), (budgets, results[1])):
            for i, (x, y) in enumerate(zip(part, results[2], strict=True)):
                squared[i] += (x.double() - y).detach().square().sum()
    ratios = (errors / budgets.clamp(min=1e-30)).sqrt()
    assert (errors <= 4 * budgets + 1e-12).all(), f"error of out, dq, dk, dv over that of dense: {ratios}"


def _raw(dtype=torch.float16, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    shapes = (5, H, head_dim), (9, G, head_dim), (9, G, head_dim), (5, H, head_dim)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def _refuses(call, match):
    with pytest.raises(RuntimeError, match=match):
        call()


@pytest.mark.skipif(TRITON, reason="of the emulation")
def test_the_emulation_refuses_what_compiled_code_would_read_wrongly():
    compiled = extension()
    q, k, v, dout = _raw()
    sizes = CALL.cu_seqlens_q, CALL.cu_seqlens_k

    def forward(q=q, k=k, v=v, sizes=sizes, max_q=3, max_k=6):
        arguments = *sizes, *[None] * 4, max_q, max_k, 0.0, 0.3, False, True, -1, 0, 0.0, False, None
        return compiled.varlen_fwd(q, k, v, None, *arguments)

    def backward(lse, max_q=3):
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        arguments = *sizes, None, max_q, 6, 0.0, 0.3, False, True, -1, 0, 0.0, False, None, None
        return compiled.varlen_bwd(dout, q, k, v, out, lse, *gradients, *arguments)

    out, lse, *_ = forward()
    assert all(torch.isfinite(x).all() for x in backward(lse)[:3])
    _refuses(lambda: backward(lse.T.contiguous().T), "lse is not contiguous")
    _refuses(lambda: backward(lse.double()), "lse is not float32")
    _refuses(lambda: backward(lse.T), "lse is not float32 .H, total_q.")
    _refuses(lambda: backward(lse, max_q=2), "max_seqlen_q 2 is too small")
    _refuses(lambda: forward(max_k=5), "max_seqlen_k 5 is too small")
    _refuses(lambda: forward(sizes=(CALL.cu_seqlens_q, CALL.cu_seqlens_k + 1)), "goes past the end")
    _refuses(lambda: forward(sizes=(CALL.cu_seqlens_q.long(), CALL.cu_seqlens_k)), "int32")
    _refuses(lambda: forward(q=q.transpose(1, 2).contiguous().transpose(1, 2)), "last dimension of q")
    _refuses(lambda: forward(q=q.float()), "half precision")
    _refuses(lambda: forward(*(x[..., :12] for x in (q, k, v))), "head_dim 12")
    _refuses(lambda: forward(k=k.new_zeros(9, G, 17)[..., 1:]), "not aligned")


@pytest.mark.skipif(TRITON, reason="of the emulation")
def test_the_emulation_leaves_nan_where_nothing_is_written():
    """More keys than the sequences read have no gradient: whoever passes them sees NaN."""
    compiled = extension()
    q, k, v, dout = _raw()
    cu_k = torch.tensor([0, 3, 8], dtype=torch.int32)
    arguments = CALL.cu_seqlens_q, cu_k, None, 3, 6, 0.0, 0.3, False, True, -1, 0, 0.0, False, None, None
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    compiled.varlen_bwd(dout, q, k, v, q, torch.zeros(H, 5), *gradients, *arguments)
    assert torch.isfinite(gradients[1][:8]).all() and torch.isnan(gradients[1][8:]).all()


@pytest.mark.parametrize("name", ["flash_attn", "torch_flash"])
def test_the_backward_copies_no_contiguous_rows(emulated, name, monkeypatch):
    """Models hand over views (T, H, D) of a fused projection, whose heads are contiguous."""
    if TRITON:
        pytest.skip("of the emulation")
    kernel = emulated(name)
    fused = torch.randn(9, H + 2 * G, 16, dtype=torch.float16)
    q, k, v = fused[:5, :H], fused[:, H : H + G], fused[:, H + G :]
    dout = torch.randn_like(q)
    out, lse = kernel.forward(q, k, v, CALL, KernelOptions(0.3))
    copies = []
    original = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copies.append(x.shape) or original(x))
    module = FlashAttn if name == "flash_attn" else TorchFlash
    monkeypatch.setattr(flash, "_rows_contiguous", lambda x: x if x.stride(-1) == 1 else pytest.fail("a copy"))
    gradients = module().backward(dout, q, k, v, out, lse, CALL, KernelOptions(0.3))
    expected = KERNELS["reference"].backward(dout, q, k, v, out, lse, CALL, KernelOptions(0.3))
    for got, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=4e-3)
    # What the emulated operator copies, the real one copies itself: dout and out, where these have gaps.
    assert all(shape == q.shape for shape in copies)


# The choice


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes the machine look like one with a GPU of some compute capability."""

    def look(capability=(8, 0), hip=None, built=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
        flash._capability.cache_clear()

    look()
    return look


@pytest.fixture
def installed(monkeypatch):
    """A function that makes versions of packages look installed, with the given module under flash-attn's name."""
    real = importlib.metadata.version

    def install(version=None, module=None):
        def versions(name):
            if name != "flash-attn":
                return real(name)
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", versions)
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn") if module else None)
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
        for cached in CACHES:
            cached.cache_clear()

    install()
    return install


def _resolve(requested="auto", base="sdpa", device=CUDA, dtype=torch.bfloat16, head_dim=64, **options):
    return resolve_kernel(requested, base, torch.device(device), dtype, head_dim, KernelOptions(0.3, **options))


def test_auto_takes_the_first_that_can_run(gpu, installed):
    assert _resolve(device="cpu", dtype=torch.float32).name == "cpu"
    assert _resolve(device="cpu", softcap=30.0).name == "reference"
    assert _resolve(dtype=torch.float32).name == "reference"
    assert _resolve().name == "torch_flash"
    assert _resolve(softcap=30.0).name == "reference"
    installed("2.8.3.post2", types.ModuleType("interface"))
    assert _resolve().name == "flash_attn"
    assert _resolve(softcap=30.0).name == "flash_attn"


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "the flash-attn package is not installed"),  # also with flash-attn-4, which has the same folder
        ("2.7.4", "flash-attn 2.7.4 is installed, its functions are known for >=2.8,<2.9"),
        ("3.0.0b1", "flash-attn 3.0.0b1 is installed"),
        ("2.8.3", "flash-attn 2.8.3 cannot be imported"),
    ],
)
def test_a_flash_attn_that_cannot_be_used_hinders_nothing(gpu, installed, version, reason):
    installed(version)
    assert _resolve().name == "torch_flash"
    with pytest.raises(ValueError, match=f"(?s)Got attention_kernel='flash_attn'.*{reason}.*Expected.*Fix"):
        _resolve("flash_attn")


def test_a_run_on_a_cpu_never_imports_flash_attn(installed, monkeypatch):
    installed("2.8.3")
    monkeypatch.setattr(flash, "_import_flash_attn", lambda: pytest.fail("imported"))
    assert _resolve(device="cpu", dtype=torch.float32).name == "cpu"
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        _resolve("flash_attn", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("machine", "head_dim", "reason"),
    [
        ({"capability": (7, 5)}, 64, "needs a GPU of compute capability 8.0 .Ampere., got 7.5"),
        ({"capability": (7, 0)}, 64, "got 7.0"),
        (
            {"capability": (8, 6)},
            200,
            "no gradient for head_dim 193 to 224 on a GPU of compute capability 8.6, got 200",
        ),
        ({"capability": (8, 9)}, 224, "compute capability 8.9"),
        ({"capability": (12, 0)}, 193, "compute capability 12.0"),
        ({}, 257, "head_dim up to 256, got 257"),
        ({"hip": "6.4"}, 64, "on ROCm"),
        ({"built": False}, 64, "this build of torch has no FlashAttention"),
    ],
)
def test_what_a_gpu_cannot_do_is_asked_before(gpu, installed, machine, head_dim, reason):
    gpu(**machine)
    assert _resolve(head_dim=head_dim).name == "reference"
    with pytest.raises(ValueError, match=f"(?s)Got attention_kernel='torch_flash'.*{reason}.*Fix"):
        _resolve("torch_flash", head_dim=head_dim)


@pytest.mark.parametrize(
    ("capability", "head_dim"), [((8, 0), 200), ((9, 0), 200), ((8, 6), 192), ((12, 0), 256), ((10, 0), 200)]
)
def test_other_heads_are_taken(gpu, capability, head_dim):
    gpu(capability)
    assert why_no_flash(CUDA, torch.bfloat16, head_dim) is None


def test_the_hubs_kernel_is_taken_where_the_model_has_it(gpu, installed, monkeypatch):
    package = types.ModuleType("flash_attn2")
    monkeypatch.setitem(sys.modules, "flash_attn2", package)
    monkeypatch.setitem(sys.modules, "flash_attn2.flash_attn_interface", types.ModuleType("interface"))
    loaded = []
    monkeypatch.setattr(flash, "load_and_register_attn_kernel", lambda name: loaded.append(name) or package)
    assert _resolve().name == "torch_flash" and loaded == []
    for base in (HUB_REPOSITORY, f"{HUB_REPOSITORY}@v2"):
        kernel = _resolve(base=base)
        assert isinstance(kernel, HubFlash) and loaded.pop() == base
    assert _resolve("hub_flash").repository == HUB_REPOSITORY


def test_a_hub_kernel_that_cannot_be_loaded_leaves_torchs(gpu, installed, monkeypatch):
    def fail(name):
        raise ImportError("no kernels package")

    monkeypatch.setattr(flash, "load_and_register_attn_kernel", fail)
    assert _resolve(base=HUB_REPOSITORY).name == "torch_flash"
    with pytest.raises(ValueError, match=f"{HUB_REPOSITORY} cannot be loaded .no kernels package."):
        _resolve("hub_flash")


def test_flash_attention_2_takes_flash_kernels_alone(gpu, installed):
    for base in ("flash_attention_2", HUB_REPOSITORY):
        for kernel in ("cpu", "reference"):
            with pytest.raises(ValueError, match=f"with attn_implementation='{base}'.*no FlashAttention-2 kernel"):
                _resolve(kernel, base)


# Limits


def test_too_many_sequences_are_refused():
    call = Varlen(torch.arange(65_537, dtype=torch.int32), torch.arange(65_537, dtype=torch.int32), 1, 1)
    with pytest.raises(ValueError, match="(?s)Got a batch with 65536 pairs.*expected at most 65535.*Fix"):
        TorchFlash().forward(*(torch.zeros(65_536, 1, 8, dtype=torch.float16),) * 3, call, KernelOptions(1.0))


def test_much_padding_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(flash.logger, "warning_once", said.append)
    q = torch.empty(1000, 32, 128, device="meta")
    for sequences in (100, 1000):
        flash.warn_about_padding(Varlen(torch.arange(sequences + 1), torch.arange(sequences + 1), 1, 1), q)
    assert len(said) == 1 and "2.0 GiB for 1000 pairs" in said[0]
