"""What a model runs with for a while, and is left as it was: its attention, and eval mode for checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel

from trl_miso.attention.rotation import Rotation, rotation_of, set_rotation
from trl_miso.attention.transformers_attention import base_implementation

_ADAPTER_STD = 0.01  # of the order that adapters reach in training


@dataclass(frozen=True)
class AttentionState:
    """The attention implementations that a model's config names, part by part, and the rotation of each module."""

    config: PreTrainedConfig
    implementations: dict[str, Any]
    rotations: list[tuple[nn.Module, Rotation | None]]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "AttentionState":
        rotations = [(module, rotation_of(module)) for module in model.modules()]
        return cls(model.config, _implementations(model.config), rotations)

    def now(self) -> "AttentionState":
        """The present state of the same model."""
        rotations = [(module, rotation_of(module)) for module, _ in self.rotations]
        return AttentionState(self.config, _implementations(self.config), rotations)

    @property
    def ordinary(self) -> "AttentionState":
        """The same without MISO: base implementations, and no rotations."""
        return AttentionState(
            self.config, _bases(self.implementations), [(module, None) for module, _ in self.rotations]
        )

    def set(self) -> None:
        """Put the state in force. Works on models that FSDP has wrapped, which refuse `set_attn_implementation`."""
        self.config._attn_implementation = self.implementations
        for module, rotation in self.rotations:
            if rotation_of(module) is not rotation:
                set_rotation(module, rotation)


@contextmanager
def restore_attention(model: PreTrainedModel) -> Iterator[None]:
    """On exit, restore the model's attention implementation, rotations and training mode."""
    state = AttentionState.of(model)
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        state.set()
        for module, training in modes:
            module.training = training


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for forwards that leave nothing behind: no module keeps another mode, cache, counter or packed weight.

    Of models that FSDP or DeepSpeed shards, whose modules keep the state of the sharding, the modes alone are restored.
    """
    modes = [(module, module.training) for module in model.modules()]
    memories = [] if _is_sharded(model) else [_Memory(module) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for memory in memories:
            memory.restore()
        for module, training in modes:
            module.training = training


@contextmanager
def adapters_at_work(model: nn.Module) -> Iterator[None]:
    """Give trainable parameters of a PEFT model that are zero throughout small random values.

    Adapters start without effect, so that what they do to a batch shows in no forward before the first step. Other models stay as they
    are. On exit these parameters are zero again.
    """
    has_adapters = any(hasattr(module, "peft_config") for module in model.modules())
    zeros = [_local(p) for p in model.parameters() if has_adapters and p.requires_grad and not _local(p).any()]
    generator = torch.Generator().manual_seed(0)
    for values in zeros:
        values.copy_(torch.randn(values.shape, generator=generator) * _ADAPTER_STD)
    try:
        yield
    finally:
        for values in zeros:
            values.zero_()


def _local(parameter: nn.Parameter) -> torch.Tensor:
    """The values of a parameter that are on this rank."""
    values = parameter.data
    return values.to_local() if isinstance(values, DTensor) else values


class _Memory:
    """A module's attributes and the contents of those that can change in place: buffers, parameters, dicts, lists and sets."""

    def __init__(self, module: nn.Module):
        self.module = module
        # The reducer of a DDP module keeps its own state.
        self.attributes = {} if isinstance(module, DistributedDataParallel) else dict(vars(module))
        self.containers = [(x, x.copy()) for x in self.attributes.values() if isinstance(x, dict | list | set)]
        self.buffers = [(x, x.clone()) for x in module.buffers(recurse=False)]
        self.parameters = [(p, p.data) for p in module.parameters(recurse=False)]
        # Quantized parameters describe their data in attributes, themselves objects.
        self.descriptions = [(vars(p), dict(vars(p))) for p, _ in self.parameters]
        for p, _ in self.parameters:
            objects = [x for x in vars(p).values() if hasattr(x, "__dict__") and not isinstance(x, nn.Module)]
            self.descriptions += [(vars(x), dict(vars(x))) for x in objects]

    def restore(self) -> None:
        if self.attributes:
            _put_back(vars(self.module), self.attributes)
        for container, content in self.containers:
            if isinstance(container, list):
                container[:] = content
            elif isinstance(container, set):
                container.intersection_update(content)
                container.update(content)
            elif isinstance(content, dict):
                _put_back(container, content)
        for buffer, values in self.buffers:
            if not torch.equal(buffer, values):
                buffer.copy_(values)
        for parameter, data in self.parameters:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
        for described, attributes in self.descriptions:
            _put_back(described, attributes)


def _put_back(current: dict[Any, Any], content: dict[Any, Any]) -> None:
    for name in [name for name in current if name not in content]:
        del current[name]
    current.update(content)


def _is_sharded(model: nn.Module) -> bool:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters())


def _implementations(config: Any) -> dict[str, Any]:
    """Attention implementations of a config and of its sub-configs, in the form that `_attn_implementation` takes."""
    implementations = {"": config._attn_implementation}
    for name in config.sub_configs:
        sub_config = getattr(config, name, None)
        if sub_config is not None:
            implementations[name] = _implementations(sub_config)
    return implementations


def _bases(implementations: dict[str, Any]) -> dict[str, Any]:
    bases: dict[str, Any] = {}
    for part, value in implementations.items():
        bases[part] = _bases(value) if isinstance(value, dict) else base_implementation(value)
    return bases
