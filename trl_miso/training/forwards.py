"""The forward that TRL and accelerate set on a trainer's model, which stays with the trainer.

TRL's forward, which fuses the LM head with the loss, otherwise calls the forward of the model that it was made for. A `deepcopy` of
a model that kept it would compute with the weights of the original.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from trl_miso.attention.support import base_of


def own_forward(model: Any) -> Any:
    """The `forward` set on a model object, before TRL has it; None where it is its class's, or for the path of a model."""
    return vars(base_of(model)).get("forward") if isinstance(model, nn.Module) else None


class Forwards:
    """The forward of a trainer, which `model` has now, and the model's ordinary one (see `own_forward`)."""

    def __init__(self, model: nn.Module, ordinary: Any):
        self._attributes = vars(model)
        self._ordinary = ordinary
        self._of_trainer = self._attributes.get("forward")

    def set_ordinary(self) -> None:
        self._set(self._ordinary)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The trainer's forward on the model, and on exit the forward that the model had."""
        before = self._attributes.get("forward")
        self._set(self._of_trainer)
        try:
            yield
        finally:
            self._of_trainer = self._attributes.get("forward")  # accelerate may have wrapped it
            self._set(before)

    def _set(self, forward: Any) -> None:
        if forward is None:
            self._attributes.pop("forward", None)
        else:
            self._attributes["forward"] = forward
