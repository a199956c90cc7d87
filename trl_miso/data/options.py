"""The settings that decide what a row becomes, in one frozen object."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class DataOptions:
    """The fields of `MISOSFTConfig` that preparation reads; see its docstring for what each does.

    Preparation is cached under a hash of these values, so settings that change no prepared row (number of processes,
    packing, shuffling) are not among them. `seed` is the config's `data_seed`, or its `seed` if that is not set.
    """

    context_mode: str = "auto"
    include_full: bool = True
    include_bare: bool = True
    para_prob: float = 1.0
    chunk_probs: tuple[float, ...] = (0.55, 0.15, 0.15, 0.15)
    train_turns: str = "auto"
    response_template: str | None = None
    full_context_weight: float | None = None
    output_positions: str = "successive"
    assistant_only_loss: bool = False
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    seed: int = 42

    @classmethod
    def of(cls, config: Any) -> "DataOptions":
        """The options of a `MISOSFTConfig`."""
        values = {field.name: getattr(config, field.name) for field in fields(cls)}
        values["chunk_probs"] = tuple(config.chunk_probs)
        values["seed"] = config.seed if config.data_seed is None else config.data_seed
        return cls(**values)


DEFAULTS = DataOptions()
