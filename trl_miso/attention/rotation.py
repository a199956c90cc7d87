"""Rotary positions after the fact: turn keys that the model has already rotated by further positions.

Contexts of different lengths share the keys of their common prefix, but the output must follow each context directly. Rotary
attention depends on position differences only, so it is enough to turn the keys of a context by an offset (`segments/tree.py`).

Shapes: N rows, H heads, D head dimension.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn


class Rotation(Protocol):
    """Turn rotated vectors by further positions: `R(offset) x`, or `R(-offset) x` if `inverse`.

    Args:
        x_NHD: (N, H, D), keys or their gradients.
        offset_N: (N,) int64, in positions, each in `0..limit - 1`.
        limit: More than any offset; known on the CPU, so that nothing waits for the GPU.
    """

    def __call__(
        self, x_NHD: torch.Tensor, offset_N: torch.Tensor, limit: int, inverse: bool = False
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class ModelRotation:
    """The model's own rotary embedding as a `Rotation`.

    Equals, for x = R(p) k, `R(p + offset) k`; `R(-offset)` is the inverse. Computed in float32. The layout (halves or
    interleaved) and partial rotation are those of the model's `apply_rotary_pos_emb`. Latent attention rotates the end of a
    head, from dimension `start`.
    """

    rotary: nn.Module
    layer_type: str | None
    apply: Callable[..., Any]
    start: int = 0
    takes_key: bool = field(init=False)  # whether `apply` turns query and key together

    def __post_init__(self) -> None:
        object.__setattr__(self, "takes_key", "k" in inspect.signature(self.apply).parameters)

    def __call__(self, x_NHD: torch.Tensor, offset_N: torch.Tensor, limit: int, inverse: bool = False) -> torch.Tensor:
        half_precision = x_NHD.dtype in (torch.float16, torch.bfloat16)
        x = x_NHD.to(torch.float32 if half_precision else x_NHD.dtype).transpose(0, 1)[None]

        # One angle per position, gathered per row: contexts repeat positions, so there are fewer positions than rows.
        cos, sin = self._unit_angles(x, limit)
        cos, sin = cos[:, offset_N], sin[:, offset_N]
        if inverse:
            sin = -sin

        # Partial rotation: dimensions before `start`, and beyond those of the angles, stay.
        end = self.start + cos.shape[-1]
        turned = x[..., self.start : end]
        heads = (turned, turned[:, :0]) if self.takes_key else (turned,)
        turned = self.apply(*heads, cos, sin)
        if self.takes_key:
            turned = turned[0]
        if turned.shape != x.shape:
            turned = torch.cat([x[..., : self.start], turned, x[..., end:]], dim=-1)
        return turned[0].transpose(0, 1).to(x_NHD.dtype)

    def _unit_angles(self, x: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions `0..limit - 1`, without the factor by which long-context variants scale both."""
        arguments = () if self.layer_type is None else (self.layer_type,)
        positions = torch.arange(limit, device=x.device)[None]
        # `forward`, not a module call: ZeRO-3's hooks record the order of modules, which here differs from batch to batch, and
        # ranks with different orders wait for each other forever.
        angles = self.rotary.forward(x, positions, *arguments)
        if isinstance(angles, torch.Tensor):
            # DeepSeek-V2: cos + i sin of each pair of dimensions.
            cos, sin = (part.repeat_interleave(2, dim=-1) for part in (angles.real, angles.imag))
        else:
            cos, sin = angles
        norm = torch.hypot(cos, sin)
        return cos / norm, sin / norm

    def composes(self, head_dim: int) -> bool:
        """Whether `R(-d) R(p + d) x == R(p) x`. False for rotations whose angle is not linear in the position."""
        x = torch.randn(8, 1, head_dim, generator=torch.Generator().manual_seed(0)).to(self._device())
        position = torch.arange(8, device=x.device)
        try:
            far = self(x, 2 * position + 3, 32)
            back = self(far, position + 2, 32, inverse=True)
            return bool(torch.allclose(back, self(x, position + 1, 32), atol=1e-4))
        except (TypeError, RuntimeError, KeyError, AttributeError):
            return False

    def _device(self) -> torch.device:
        return next((buffer.device for buffer in self.rotary.buffers()), torch.device("cpu"))


def _turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of neighbouring dimensions, in place of `apply_rotary_emb`, which takes complex angles."""
    other = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + other * sin


def no_rotation(x_NHD: torch.Tensor, offset_N: torch.Tensor, limit: int, inverse: bool = False) -> torch.Tensor:
    """The `Rotation` of a layer without positions."""
    return x_NHD


def set_rotation(module: nn.Module, rotation: Rotation | None) -> None:
    """Attach a rotation to an attention module, as a plain attribute outside of the module's state; None takes it away."""
    if rotation is not None:
        object.__setattr__(module, "miso_rotation", rotation)
    elif "miso_rotation" in vars(module):
        object.__delattr__(module, "miso_rotation")


def rotation_of(module: nn.Module) -> Rotation | None:
    """The rotation attached to an attention module; None if there is none."""
    return getattr(module, "miso_rotation", None)


def candidate_rotations(model: nn.Module, attention: nn.Module) -> list[ModelRotation]:
    """Rotations that an attention module may use: each rotary embedding of the model, per layer type that fits."""
    source = sys.modules[type(attention).__module__]
    apply = getattr(source, "apply_rotary_pos_emb", None)
    if apply is None:
        if not hasattr(source, "apply_rotary_emb"):
            return []
        apply = _turn_pairs
    start = getattr(attention, "qk_nope_head_dim", 0)
    module_type = getattr(attention, "layer_type", None) or getattr(attention, "attention_type", None)
    rotations = []
    for rotary in model.modules():
        if not type(rotary).__name__.endswith("RotaryEmbedding"):
            continue
        layer_types: list[str | None] = [None]
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            layer_types = [module_type] if module_type else sorted(set(getattr(rotary, "layer_types", ())))
        rotations += [ModelRotation(rotary, layer_type, apply, start) for layer_type in layer_types]
    return rotations
