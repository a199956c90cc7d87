"""Between transformers and `mixture.py`: the registered attention function, its mask, and the check of a model.

transformers hands the batch's `miso_` keys to the attention function of every layer as keyword arguments. With them it
runs `miso_attention`; without them (evaluation of other batches, generation) exactly what the model's own implementation does.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_flash_attention_utils import _flash_attention_forward, flash_attn_supports_top_left_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from trl_miso.attention.kernels import resolve_kernel
from trl_miso.attention.mixture import KernelOptions, Rotation, miso_attention
from trl_miso.attention.reference import reference_attention
from trl_miso.attention.shares import Shares
from trl_miso.segments import decode
from trl_miso.segments.packed import WEIGHTINGS, PackedSegments

logger = logging.get_logger(__name__)

# Registered names must not contain "flash", "sdpa" or "/": transformers takes these for kernels of its own.
_BASE_TAGS = {"sdpa": "torch", "eager": "eager", "flash_attention_2": "fa2"}
_KERNEL_TAGS = {"auto": "auto", "flash_attn": "fa2", "torch_flash": "torch", "cpu": "cpu", "reference": "reference"}
_REGISTERED: dict[str, str] = {}  # name -> base implementation


def register_miso_attention(base: str = "sdpa", kernel: str = "auto") -> str:
    """Register MISO attention over a base implementation with both of transformers' interfaces.

    Args:
        base: What runs without MISO metadata: `"sdpa"`, `"eager"` or `"flash_attention_2"`. The last also restricts MISO
            batches to FlashAttention-2 kernels.
        kernel: `attention_kernel` of the config.

    Returns:
        The name to pass to `model.set_attn_implementation`.

    Raises:
        ValueError: For another base.
    """
    if base not in _BASE_TAGS:
        raise ValueError(
            f"Got attn_implementation={base!r}, expected one of {sorted(_BASE_TAGS)}: the mixture needs a kernel that gives "
            "log-sum-exps. Fix: load the model with one of these; attention_kernel chooses the kernel."
        )
    name = f"miso_{_BASE_TAGS[base]}_{_KERNEL_TAGS[kernel]}"
    if name not in _REGISTERED:
        AttentionInterface.register(name, partial(_attention_forward, base=base, requested=kernel))
        AttentionMaskInterface.register(name, partial(_mask, base=base))
        _REGISTERED[name] = base
    return name


def register_over(base: str, suffix: str, forward: Callable[..., Any]) -> str:
    """Register `forward` in front of the attention that trains, which it is given as `trained`; the name to set."""
    trained = register_miso_attention(base)
    name = f"{trained}_{suffix}"
    AttentionInterface.register(name, partial(forward, trained=ALL_ATTENTION_FUNCTIONS[trained]))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[trained])
    return name


def base_implementation(name: str | None) -> str:
    """The base of a registered name, else the name itself (None: transformers' default, sdpa)."""
    return _REGISTERED.get(name or "sdpa", name or "sdpa")


class _LazyMask:
    """The base implementation's mask, made when an attention layer without MISO metadata asks for it.

    transformers makes masks before it knows the batch's metadata; for a packed batch sdpa's would be T x T.
    """

    def __init__(self, make: Callable[[], Any]):
        self._make, self._made, self._mask = make, False, None

    def __getitem__(self, index: Any) -> "_LazyMask":
        return _LazyMask(lambda: mask if (mask := self.get()) is None else mask[index])

    def get(self) -> Any:
        if not self._made:
            self._mask, self._made = self._make(), True
        return self._mask


def _mask(*args: Any, base: str, **kwargs: Any) -> Any:
    make = partial(ALL_MASK_ATTENTION_FUNCTIONS[base], *args, **kwargs)
    one_row = kwargs.get("batch_size") == 1 and kwargs.get("attention_mask") is None
    if one_row and kwargs.get("q_length") == kwargs.get("kv_length"):
        return _LazyMask(make)
    return make()


class Probe:
    """Passed as the model's keyword argument `miso_probe`: notes which attention modules receive keyword arguments.

    With `skip_attention` attention returns zeros: what is left are each layer's queries and keys at given positions. Not a dataclass:
    FSDP hands copies of those to the layers.
    """

    def __init__(self, skip_attention: bool = False):
        self.skip_attention = skip_attention
        self.heads: dict[nn.Module, torch.Tensor | None] = {}  # queries, then keys
        self.queries: dict[nn.Module, int] = {}  # how many of them are queries
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
    """transformers' calling convention: query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D), None."""
    if miso_probe is not None:
        other_size = value.shape[-1] if value.shape[-1] != query.shape[-1] else None
        unusual = {"sinks": kwargs.get("s_aux"), "position_bias": kwargs.get("position_bias"), "value_dim": other_size}
        miso_probe.record(module, query, key, **unusual)
        if miso_probe.skip_attention:
            return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    packed = PackedSegments.from_batch(kwargs)
    if packed is None:
        mask = attention_mask.get() if isinstance(attention_mask, _LazyMask) else attention_mask
        forward = _base_forward(base, module)
        kwargs |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
        return forward(module, query, key, value, mask, **kwargs)
    if dropout:
        raise ValueError(
            f"Got attention dropout {dropout} with MISO, expected 0: the mixture cannot represent it. Fix: set "
            "model.config.attention_dropout = 0."
        )
    dtype = compute_dtype(value)
    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    options = KernelOptions(score_scale(query, scaling), window=sliding_window or 0, softcap=softcap or 0.0)
    flash_only = base == "flash_attention_2"
    kernel = resolve_kernel(requested, flash_only, q_THD.device, dtype, q_THD.shape[-1], options)
    _log_kernel_once(kernel, requested, dtype)
    rotation = rotation_of(module)
    with torch.autocast(query.device.type, enabled=False):
        out = miso_attention(q_THD, k_TGD, v_TGD, packed, kernel, options, rotation, miso_shares)
    return out[None], None


def compute_dtype(value: torch.Tensor) -> torch.dtype:
    """What attention is computed in: the projection's own dtype, since rotation and norms may have widened query and key."""
    autocast = torch.is_autocast_enabled(value.device.type) and value.dtype == torch.float32
    return torch.get_autocast_dtype(value.device.type) if autocast else value.dtype


def score_scale(query: torch.Tensor, scaling: float | None) -> float:
    """The factor of the scores: the model's, else 1 / sqrt(D)."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def register_definition() -> str:
    """Register attention by its definition (`reference.py`), dense, for batches of one example in its own order.

    The batch says which in `miso_definition`, as `segments.encode` writes it. What a model is verified against.
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
    turned_and_limited = rotation_of(module), sliding_window or 0, softcap or 0.0
    with torch.autocast(query.device.type, enabled=False):
        out = reference_attention(q_THD, k_TGD, v_TGD, example, weighting, scale, *turned_and_limited)
    return out[None].to(value.dtype), None


def _log_kernel_once(kernel: Any, requested: str, dtype: torch.dtype) -> None:
    logger.info_once(f"MISO attention runs on the {kernel.name!r} kernel (attention_kernel={requested!r}, {dtype}).")
    if requested == "auto" and kernel.name == "reference":
        logger.warning_once(
            f"MISO attention runs on the dense reference kernel, since no other takes {dtype} tensors of this model on this "
            "device. It is slow: train in bf16 on CUDA to use FlashAttention-2."
        )


def _base_forward(base: str, module: nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return _flash_forward if base == "flash_attention_2" else ALL_ATTENTION_FUNCTIONS[base]


def _flash_forward(
    module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """transformers' flash_attention_forward, which reads the implementation's name from the model's config."""
    out = _flash_attention_forward(
        *(x.transpose(1, 2) for x in (query, key, value)),
        attention_mask,
        query_length=query.shape[2],
        is_causal=module.is_causal if is_causal is None else is_causal,
        softmax_scale=scaling,
        use_top_left_mask=flash_attn_supports_top_left_mask(),
        target_dtype=get_target_dtype(query, module),
        attn_implementation="flash_attention_2",
        **kwargs,
    )
    return out, None


@dataclass(frozen=True)
class ModelRotation:
    """Turns rotated keys by further positions with the model's own rotary embedding: `R(offset) x`.

    Equals, for x = R(p) k, `R(p + offset) k`; `R(-offset)` is its inverse. Computed in float32, layout (halves or
    interleaved) and partial rotation being those of the model's `apply_rotary_pos_emb`.
    """

    rotary: nn.Module
    layer_type: str | None
    apply: Callable[..., Any]

    def __call__(self, x_NHD: torch.Tensor, offset_N: torch.Tensor, limit: int, inverse: bool = False) -> torch.Tensor:
        wide = torch.float32 if x_NHD.dtype in (torch.float16, torch.bfloat16) else x_NHD.dtype
        x = x_NHD.to(wide).transpose(0, 1)[None]
        arguments = (self.layer_type,) if self.layer_type is not None else ()
        positions = torch.arange(limit, device=x.device)  # fewer than rows: contexts repeat them
        # Not called as a module: its hooks would tell ZeRO-3 of an order of modules that differs from batch to batch, in which
        # ranks wait for each other forever.
        cos, sin = self.rotary.forward(x, positions[None], *arguments)
        norm = torch.hypot(cos, sin)  # long-context variants scale both
        cos, sin = (cos / norm)[:, offset_N], (sin / norm * (-1 if inverse else 1))[:, offset_N]
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        turned = (
            self.apply(turned, turned[:, :0], cos, sin)[0] if _takes_key(self.apply) else self.apply(turned, cos, sin)
        )
        turned = torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
        return turned[0].transpose(0, 1).to(x_NHD.dtype)

    def composes(self, head_dim: int) -> bool:
        """Whether R(-d) R(p + d) x == R(p) x: false for rotations that are not by an angle linear in the position."""
        x = torch.randn(8, 1, head_dim, generator=torch.Generator().manual_seed(0)).to(self._device())
        at = torch.arange(8, device=x.device)
        try:
            there = self(x, 2 * at + 3, 32)
            return bool(torch.allclose(self(there, at + 2, 32, inverse=True), self(x, at + 1, 32), atol=1e-4))
        except (TypeError, RuntimeError, KeyError, AttributeError):
            return False

    def _device(self) -> torch.device:
        return next((b.device for b in self.rotary.buffers()), torch.device("cpu"))


@cache
def _takes_key(apply: Callable[..., Any]) -> bool:
    """Whether a model's `apply_rotary_pos_emb` turns query and key together."""
    return "k" in inspect.signature(apply).parameters


def set_rotation(module: nn.Module, rotation: Rotation | None) -> None:
    """Keep an attention module's rotation on the module: a plain attribute, not part of its state."""
    object.__setattr__(module, "miso_rotation", rotation)


def rotation_of(module: nn.Module) -> Rotation | None:
    return getattr(module, "miso_rotation", None)


def candidate_rotations(model: nn.Module, attention: nn.Module) -> list[ModelRotation]:
    """Rotations that an attention module of the model may be using."""
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return []
    own = getattr(attention, "layer_type", None) or getattr(attention, "attention_type", None)
    rotations = []
    for rotary in (m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")):
        typed = "layer_type" in inspect.signature(rotary.forward).parameters
        types = [own] if own else sorted(set(getattr(rotary, "layer_types", ())))
        rotations += [ModelRotation(rotary, layer_type, apply) for layer_type in (types if typed else [None])]
    return rotations


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Make the model use a registered attention. Raises ValueError if it does not take one."""
    model.set_attn_implementation(name)
    got = model.config.get_text_config()._attn_implementation
    if got != name:
        raise ValueError(
            f"Got {type(model).__name__}, which does not take a registered attention (it keeps {got!r}), expected a model on "
            "transformers' AttentionInterface. Fix: use a supported architecture (see the README)."
        )


@contextmanager
def restore_attention(model: PreTrainedModel) -> Iterator[None]:
    """Whatever is done to the model's attention, rotations and mode within, is undone after it."""
    before = _implementations(model.config)
    state = [(module, module.training, rotation_of(module)) for module in model.modules()]
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for module, training, rotation in state:
            module.training = training
            if rotation_of(module) is not rotation:
                set_rotation(module, rotation)


def _implementations(config: Any) -> dict[str, Any]:
    """Attention implementations of a config and those within it, as `set_attn_implementation` takes them."""
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    return {"": config._attn_implementation} | {name: _implementations(part) for name, part in parts.items()}


def skip_logits(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Arguments of a forward whose logits are not used. Not a number: with one, Gemma 4 leaves tokens out of its last layers."""
    return {"logits_to_keep": torch.zeros(1, dtype=torch.long)} if model._supports_logits_to_keep() else {}
