"""MISO attention as a transformers attention function: registration, calling convention, lazy masks, switching a model over.

transformers passes the batch's `miso_` keys as keyword arguments to the attention function of every layer. With these keys the
function runs `miso_attention`. Without them (other evaluation batches, generation) it runs the model's own implementation.

Shapes: T packed tokens, H query heads, G key-value heads, D head dimension of queries and keys, V of values.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_flash_attention_utils import _flash_attention_forward, flash_attn_supports_top_left_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from trl_miso.attention.flash import HUB_REPOSITORY, is_flash, is_hub_flash
from trl_miso.attention.kernels import KernelOptions, kernel_named, resolve_kernel
from trl_miso.attention.mixture import miso_attention
from trl_miso.attention.reference import reference_attention
from trl_miso.attention.rotation import rotation_of
from trl_miso.attention.shares import Shares
from trl_miso.segments import decode
from trl_miso.segments.packed import WEIGHTINGS, PackedSegments

logger = logging.get_logger(__name__)

# Registered names must not contain "flash", "sdpa" or "/": transformers interprets these as its own kernels.
_BASE_TAGS = {"sdpa": "torch", "eager": "eager", "flash_attention_2": "fa2"}
_KERNEL_TAGS = {
    "auto": "auto",
    "flash_attn": "fa2",
    "hub_flash": "hub",
    "torch_flash": "torch",
    "cpu": "cpu",
    "reference": "reference",
}
_REGISTERED: dict[str, str] = {}  # name -> base implementation


def register_miso_attention(base: str = "sdpa", kernel: str = "auto") -> str:
    """Register MISO attention over a base implementation with both of transformers' interfaces.

    Args:
        base: Implementation for batches without MISO metadata: `"sdpa"`, `"eager"`, `"flash_attention_2"` or the Hub's
            `"kernels-community/flash-attn2"`. The last two also restrict MISO batches to FlashAttention-2 kernels.
        kernel: `"auto"` or the name of a kernel, see `MISOSFTConfig.attention_kernel`.

    Returns:
        The name to pass to `model.set_attn_implementation`.

    Raises:
        ValueError: If `base` is another implementation.
    """
    check_base(base)
    tag = _BASE_TAGS.setdefault(base, f"hub{len(_BASE_TAGS)}")
    name = f"miso_{tag}_{_KERNEL_TAGS[kernel]}"
    if name not in _REGISTERED:
        AttentionInterface.register(name, partial(_attention_forward, base=base, requested=kernel))
        AttentionMaskInterface.register(name, partial(_mask, base=base))
        _REGISTERED[name] = base
    return name


def check_base(base: str) -> None:
    """Raise ValueError for a model's attention implementation beside which no kernel of the mixture is known."""
    if base not in _BASE_TAGS and not is_hub_flash(base):
        raise ValueError(
            f"Got attn_implementation={base!r}, expected 'sdpa', 'eager', 'flash_attention_2' or {HUB_REPOSITORY!r}: the mixture needs a "
            "kernel that returns log-sum-exps. Fix: load the model with one of these; attention_kernel selects the kernel."
        )


def register_over(base: str, suffix: str, forward: Callable[..., Any]) -> str:
    """Register `forward` in front of MISO attention and return its name. `forward` gets MISO attention as the argument `trained`."""
    trained = register_miso_attention(base)
    name = f"{trained}_{suffix}"
    AttentionInterface.register(name, partial(forward, trained=ALL_ATTENTION_FUNCTIONS[trained]))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[trained])
    return name


def base_implementation(name: str | None) -> str:
    """Base implementation of a registered name; any other name as it is. None stands for sdpa, transformers' default."""
    return _REGISTERED.get(name or "sdpa", name or "sdpa")


class LazyMask:
    """The base implementation's mask, computed when an attention layer without MISO metadata first reads it.

    transformers makes masks before it knows the batch's metadata. For a packed batch, sdpa's mask would be T x T.
    """

    def __init__(self, make: Callable[[], Any]):
        self._make, self._computed, self._mask = make, False, None

    def __getitem__(self, index: Any) -> "LazyMask":
        def sliced() -> Any:
            mask = self.get()
            return None if mask is None else mask[index]

        return LazyMask(sliced)

    def get(self) -> Any:
        if not self._computed:
            self._mask, self._computed = self._make(), True
        return self._mask


def _mask(*args: Any, base: str, **kwargs: Any) -> Any:
    masks_of = "flash_attention_2" if is_hub_flash(base) else base
    make = partial(ALL_MASK_ATTENTION_FUNCTIONS[masks_of], *args, **kwargs)
    one_row = kwargs.get("batch_size") == 1 and kwargs.get("attention_mask") is None
    if one_row and kwargs.get("q_length") == kwargs.get("kv_length"):
        return LazyMask(make)
    return make()


class Probe:
    """Passed as the model's keyword argument `miso_probe`: records which attention modules receive keyword arguments.

    With `skip_attention`, attention returns zeros and the probe keeps each layer's queries and keys, which then depend on the
    token and its position only. Not a dataclass: FSDP hands copies of dataclasses to the layers.
    """

    def __init__(self, skip_attention: bool = False):
        self.skip_attention = skip_attention
        self.heads: dict[nn.Module, torch.Tensor | None] = {}  # queries, then keys
        self.queries: dict[nn.Module, int] = {}  # number of query heads among them
        self.arguments: dict[str, Any] = {}

    def record(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, **arguments: Any) -> None:
        self.heads[module] = torch.cat([query, key], dim=1).detach() if self.skip_attention else None
        self.queries[module] = query.shape[1]
        self.arguments |= {name: value for name, value in arguments.items() if value is not None}


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    base: str,
    requested: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    miso_probe: Probe | None = None,
    miso_shares: Shares | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' calling convention: query (1, H, T, D), key (1, G, T, D), value (1, G, T, V) -> (1, T, H, V), None."""
    if miso_probe is not None:
        miso_probe.record(module, query, key, sinks=kwargs.get("s_aux"), position_bias=kwargs.get("position_bias"))
        if miso_probe.skip_attention:
            return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    # Without metadata: the model's own implementation.
    packed = PackedSegments.from_batch(kwargs)
    if packed is None:
        mask = attention_mask.get() if isinstance(attention_mask, LazyMask) else attention_mask
        forward = _base_forward(base, module)
        kwargs |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
        return forward(module, query, key, value, mask, **kwargs)
    if dropout:
        raise ValueError(
            f"Got attention dropout {dropout} with MISO, expected 0: the mixture cannot represent it. Fix: set "
            "model.config.attention_dropout = 0."
        )

    # With metadata: MISO attention of the packed row.
    dtype = compute_dtype(value)
    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1).to(dtype) for x in equal_head_sizes(query, key, value))
    options = KernelOptions(score_scale(query, scaling), window=sliding_window or 0, softcap=softcap or 0.0)
    kernel = kernel_named(_kernel_name(requested, base, q_THD.device, dtype, q_THD.shape[-1], options.softcap))
    rotation = rotation_of(module)
    with torch.autocast(query.device.type, enabled=False):
        out = miso_attention(q_THD, k_TGD, v_TGD, packed, kernel, options, rotation, miso_shares)
    return out[None, ..., : value.shape[-1]], None


def equal_head_sizes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad heads with zeros to one size, as kernels need it: latent attention has values of another size than keys.

    Zeros in queries and keys change no score; the scale stays that of the query before padding. Zeros in values add columns of
    zeros to the output, which the caller cuts off.
    """
    missing = query.shape[-1] - value.shape[-1]
    if missing > 0:
        value = pad(value, (0, missing))
    elif missing < 0:
        query, key = pad(query, (0, -missing)), pad(key, (0, -missing))
    return query, key, value


def compute_dtype(value: torch.Tensor) -> torch.dtype:
    """Dtype of the attention: that of the value projection, since rotation and norms may have widened query and key."""
    if torch.is_autocast_enabled(value.device.type) and value.dtype == torch.float32:
        return torch.get_autocast_dtype(value.device.type)
    return value.dtype


def score_scale(query: torch.Tensor, scaling: float | None) -> float:
    """Factor of the scores: the model's own, or 1 / sqrt(D)."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def register_definition() -> str:
    """Register the dense definition (`reference.py`), which `trl-miso verify` compares a model with, and return its name.

    It takes batches of one example in the example's own segment order. The batch key `miso_definition` holds the example, as
    `segments.encode` writes it.
    """
    name = "miso_definition"
    if name not in _REGISTERED:
        AttentionInterface.register(name, _definition_forward)
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
        _REGISTERED[name] = "sdpa"
    return name


def _definition_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    miso_definition: Sequence[int],
    miso_weighting: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    wide = torch.promote_types(value.dtype, torch.float32)
    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1).to(wide) for x in (query, key, value))
    scale = score_scale(query, scaling)
    example, weighting = next(decode(miso_definition)), WEIGHTINGS[miso_weighting]
    rotation, window = rotation_of(module), sliding_window or 0
    with torch.autocast(query.device.type, enabled=False):
        out = reference_attention(
            q_THD, k_TGD, v_TGD, example, weighting, scale, rotation, window=window, softcap=softcap or 0.0
        )
    return out[None].to(value.dtype), None


@torch.compiler.assume_constant_result
def _kernel_name(
    requested: str, base: str, device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float
) -> str:
    """The kernel that `resolve_kernel` chooses, logged once. A compiled layer asks when it is compiled."""
    kernel = resolve_kernel(requested, base, device, dtype, head_dim, KernelOptions(1.0, softcap=softcap))
    logger.info_once(f"MISO attention runs on the {kernel.name!r} kernel (attention_kernel={requested!r}, {dtype}).")
    if requested == "auto" and kernel.name == "reference":
        logger.warning_once(
            f"MISO attention runs on the dense reference kernel, since no other kernel takes {dtype} tensors of this model on "
            "this device. It is slow: train in bf16 on CUDA to use FlashAttention-2."
        )
    return kernel.name


def _base_forward(base: str, module: nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    if is_flash(base):
        return partial(_flash_forward, attn_implementation=base)
    return ALL_ATTENTION_FUNCTIONS[base]


def _flash_forward(
    module, query, key, value, attention_mask, attn_implementation, scaling=None, is_causal=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """transformers' `flash_attention_forward`, which cannot be called: it reads the implementation's name from the model's config."""
    out = _flash_attention_forward(
        *(x.transpose(1, 2) for x in equal_head_sizes(query, key, value)),
        attention_mask,
        query_length=query.shape[2],
        is_causal=module.is_causal if is_causal is None else is_causal,
        softmax_scale=score_scale(query, scaling),
        use_top_left_mask=flash_attn_supports_top_left_mask(),
        target_dtype=get_target_dtype(query, module),
        attn_implementation=attn_implementation,
        **kwargs,
    )
    return out[..., : value.shape[-1]], None


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Switch the model to a registered attention. Raises ValueError if the model does not take one."""
    model.set_attn_implementation(name)
    actual = model.config.get_text_config()._attn_implementation
    if actual != name:
        raise ValueError(
            f"Got {type(model).__name__}, which does not take a registered attention (it keeps {actual!r}), expected a model on "
            "transformers' AttentionInterface. Fix: use a supported architecture (docs/kernels.md lists them)."
        )


def skip_logits(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Arguments of a forward whose logits are not used.

    `logits_to_keep` is a tensor because with a number Gemma 4 leaves tokens out of its last layers.
    """
    return {"logits_to_keep": torch.zeros(1, dtype=torch.long)} if model._supports_logits_to_keep() else {}
