"""FlashAttention-2 as kernels of the mixture: the flash-attn package's, the Hub's and torch's. The only file that knows them.

All three run the same algorithm with the same layouts: q (T, H, D), k and v (S, G, D), log-sum-exp (H, T) in float32.
"""

import importlib
import importlib.metadata
import re
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.integrations.hub_kernels import load_and_register_attn_kernel
from transformers.utils import logging

from trl_miso.attention.kernel_interface import KernelOptions
from trl_miso.segments.packed import Varlen

logger = logging.get_logger(__name__)

HUB_REPOSITORY = "kernels-community/flash-attn2"
# From 2.8.0 to before 2.9 the private functions used below have these signatures. The Hub's are those of 2.8.3.
_FLASH_ATTN_RANGE = ((2, 8), (2, 9))
_MAX_SEQUENCES = 65_535  # of one call: a dimension of the kernels' launch grid
_LARGE_PADDING = 1 << 30


class FlashAttn:
    """The flash-attn package's raw functions (`pip install flash-attn --no-build-isolation`)."""

    name = "flash_attn"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions) -> str | None:
        # The package is imported last, so that a broken one hinders no run that could not use it.
        return why_no_flash(device, dtype, head_dim) or self.why_no_functions()

    def why_no_functions(self) -> str | None:
        return why_no_flash_attn()

    def functions(self) -> Any:
        return _import_flash_attn()

    def forward(self, q, k, v, call, options):
        check_sequences(call)
        out, lse, *_ = self.functions()._flash_attn_varlen_forward(
            *(_pad_heads(x) for x in (q, k, v)),
            *call.sizes,
            0.0,
            options.scale,
            options.causal,
            window_size_left=options.window - 1,
            window_size_right=_window_right(options),
            softcap=options.softcap,
        )
        return out[..., : q.shape[-1]], lse

    def backward(self, dout, q, k, v, out, lse, call, options):
        warn_about_padding(call, q)
        dout, q_, k_, v_, out = (_pad_heads(x) for x in (dout, q, k, v, out))
        # The functions fill gradients of rows in order, whatever the order of the inputs' dimensions in memory.
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_, k_, v_)]
        self.functions()._flash_attn_varlen_backward(
            *(dout, q_, k_, v_, out),
            lse,
            *gradients,
            *call.sizes,
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


class HubFlash(FlashAttn):
    """The same functions, compiled, from the Hub (`pip install kernels`).

    Args:
        repository: `kernels-community/flash-attn2`, as `attn_implementation` takes it: with a revision after "@" or without.
    """

    def __init__(self, repository: str = HUB_REPOSITORY):
        self.repository = repository
        self.name = "hub_flash" if repository == HUB_REPOSITORY else repository

    def why_no_functions(self) -> str | None:
        return why_no_hub_flash(self.repository)

    def functions(self) -> Any:
        return _load_hub_flash(self.repository)


class TorchFlash:
    """torch's built-in FlashAttention-2: the same kernel and layouts without an extra package, but no softcap."""

    name = "torch_flash"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions) -> str | None:
        if options.softcap:
            return "torch's built-in FlashAttention has no softcap"
        reason = why_no_flash(device, dtype, head_dim)
        if reason is None and not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no FlashAttention"
        return reason

    def forward(self, q, k, v, call, options):
        check_sequences(call)
        out, lse, *_ = _operators()._flash_attention_forward(
            *(_rows_contiguous(_pad_heads(x)) for x in (q, k, v)),
            *call.sizes,
            0.0,
            options.causal,
            False,
            **_keywords(options),
        )
        return out[..., : q.shape[-1]], lse

    def backward(self, dout, q, k, v, out, lse, call, options):
        warn_about_padding(call, q)
        rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # read only under dropout
        unused = torch.empty(0, device=q.device)
        gradients = _operators()._flash_attention_backward(
            *(_rows_contiguous(_pad_heads(x)) for x in (dout, q, k, v, out)),
            lse,
            *call.sizes,
            0.0,
            options.causal,
            rng,
            unused,
            **_keywords(options),
        )
        return [gradient[..., : q.shape[-1]] for gradient in gradients]


def why_no_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlashAttention-2 cannot train on this device with these heads, whoever built it; None if it can."""
    if device.type != "cuda":
        return f"FlashAttention-2 needs CUDA tensors, got {device.type}"
    if torch.version.hip:
        return (
            "FlashAttention-2 on ROCm lays its log-sum-exp out in another way, which nobody has tried with the mixture"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention-2 takes float16 and bfloat16, got {dtype}"
    if head_dim > 256:
        return f"FlashAttention-2 takes head_dim up to 256, got {head_dim}"
    capability = _capability(device)
    if capability < (8, 0):
        return f"FlashAttention-2 needs a GPU of compute capability 8.0 (Ampere), got {_dotted(capability)}"
    # Of the gradient: these GPUs have less shared memory than 8.0 and 9.0.
    if 192 < head_dim <= 224 and (capability in ((8, 6), (8, 9)) or capability[0] == 12):
        return f"FlashAttention-2 has no gradient for head_dim 193 to 224 on a GPU of compute capability {_dotted(capability)}, got {head_dim}"
    return None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@cache
def why_no_flash_attn() -> str | None:
    """Why the flash-attn package cannot be used; None if it can."""
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "the flash-attn package is not installed (pip install flash-attn --no-build-isolation, which needs CUDA)"
    low, high = _FLASH_ATTN_RANGE
    if not low <= tuple(int(part) for part in version.split(".")[:2]) < high:
        return f"flash-attn {version} is installed, its functions are known for >={_dotted(low)},<{_dotted(high)}"
    try:
        _import_flash_attn()
    except Exception as error:  # an undefined symbol, after torch was upgraded, or a driver that is missing
        return f"flash-attn {version} cannot be imported ({error})"
    return None


@cache
def _import_flash_attn() -> ModuleType:
    return importlib.import_module("flash_attn.flash_attn_interface")


def is_hub_flash(implementation: str) -> bool:
    """Whether an `attn_implementation` is the Hub's FlashAttention-2."""
    return re.split("[@:]", implementation)[0] == HUB_REPOSITORY


def is_flash(implementation: str) -> bool:
    """Whether an `attn_implementation` is FlashAttention-2, of the package or of the Hub."""
    return implementation == "flash_attention_2" or is_hub_flash(implementation)


@cache
def why_no_hub_flash(repository: str) -> str | None:
    """Why the Hub's FlashAttention-2 cannot be used; None if it can. Loads it, from the cache or the Hub."""
    try:
        _load_hub_flash(repository)
    except Exception as error:  # the kernels package is missing, no network, no build for this torch
        return f"{repository} cannot be loaded ({error})"
    return None


@cache
def _load_hub_flash(repository: str) -> ModuleType:
    package = load_and_register_attn_kernel(repository)
    return importlib.import_module(f"{package.__name__}.flash_attn_interface")


def check_sequences(call: Varlen) -> None:
    """Raise ValueError for more sequences than one call takes. A sequence is an output for one of its contexts."""
    sequences = len(call.cu_seqlens_q) - 1
    if sequences > _MAX_SEQUENCES:
        raise ValueError(
            f"Got a batch with {sequences} pairs of a context and an output, expected at most {_MAX_SEQUENCES}: FlashAttention-2 takes no "
            "more. Fix: lower per_device_train_batch_size, or max_length if rows are packed."
        )


def warn_about_padding(call: Varlen, q: torch.Tensor) -> None:
    """The backward pads each sequence's float32 gradient of q by up to 128 rows: say so where that is much."""
    sequences = len(call.cu_seqlens_q) - 1
    padding = 128 * sequences * q.shape[1] * q.shape[2] * 4
    if padding > _LARGE_PADDING:
        logger.warning_once(
            f"FlashAttention-2's backward allocates {padding / 2**30:.1f} GiB for {sequences} pairs of a context and a short output in one "
            "batch. Lower per_device_train_batch_size, or max_length if rows are packed, if memory runs out."
        )


def _operators() -> Any:
    """torch's operators; FlashAttention-3 or 4 stands behind them after `torch.nn.attention.activate_flash_attention_impl`."""
    return torch.ops.aten


def _keywords(options: KernelOptions) -> dict[str, Any]:
    window = {}
    if options.window:
        window = {"window_size_left": options.window - 1, "window_size_right": _window_right(options)}
    return {"scale": options.scale, **window}


def _window_right(options: KernelOptions) -> int:
    """Keys to the right of a query: none (0) if causal, else all (-1)."""
    return 0 if options.causal else -1


def _pad_heads(x: torch.Tensor) -> torch.Tensor:
    """Pad the head dimension to a multiple of 8, as the raw functions require; zeros change no score."""
    return pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The last dimension without gaps, as the operators require. flash-attn's functions see to that themselves."""
    return x if x.stride(-1) == 1 else x.contiguous()
