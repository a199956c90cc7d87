"""The forwards that TRL and accelerate set on a trainer's model, which stay with the trainer.

TRL's forward, which fuses the LM head with the loss, otherwise calls the forward of the model that it was made for: a `deepcopy` of a
model that kept it would compute with the weights of the original. accelerate's runs mixed precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from trl_miso.attention.support import base_of

_NAMES = ("forward", "_original_forward")  # the second is accelerate's note of what it replaced

Attributes = list[dict[str, Any]]  # of each of the models


def own_forwards(model: Any) -> Attributes:
    """The forwards set on a model object and on the model inside its adapters, before TRL has it; none for the path of a model."""
    return _now(_models(model)) if isinstance(model, nn.Module) else []


class Forwards:
    """The forwards of a trainer, which `model` has now, and the model's ordinary ones (see `own_forwards`)."""

    def __init__(self, model: nn.Module, ordinary: Attributes):
        self._models = _models(model)
        self._of_trainer = _now(self._models)
        # The trainer may have put adapters around the model.
        around: Attributes = [{} for _ in range(len(self._models) - len(ordinary))]
        self._ordinary = around + ordinary

    def set_ordinary(self) -> None:
        self._set(self._ordinary)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The trainer's forwards on the model, and on exit those that the model had."""
        before = _now(self._models)
        self._set(self._of_trainer)
        try:
            yield
        finally:
            self._of_trainer = _now(self._models)  # accelerate may have set one
            self._set(before)

    def _set(self, forwards: Attributes) -> None:
        for attributes, own in zip(self._models, forwards, strict=True):
            for name in _NAMES:
                attributes.pop(name, None)
            attributes.update(own)


def _models(model: nn.Module) -> list[dict[str, Any]]:
    """The attributes of a model, and of the model inside its adapters."""
    base = base_of(model)
    return [vars(model)] if base is model else [vars(model), vars(base)]


def _now(models: list[dict[str, Any]]) -> Attributes:
    return [{name: attributes[name] for name in _NAMES if name in attributes} for attributes in models]
