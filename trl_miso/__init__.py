"""
Mixture-of-Contexts (MISO) fine-tuning for TRL (arXiv 2505.11922).

An instruction becomes several input contexts (the full instruction, each constraint alone, the bare request; or successive chunks),
each processed by itself, and the output's attention is a weighted mix of its attention to each of them. Afterwards the model is
used like any other.

    from trl_miso import MISOSFTConfig, MISOSFTTrainer  # in place of SFTConfig, SFTTrainer

    trainer = MISOSFTTrainer(model="...", args=MISOSFTConfig(output_dir="..."), train_dataset=dataset)
    trainer.train()

Rows have a column `constraints` beside `prompt` and `completion`; or `contexts`; or any columns that `SFTTrainer` takes.
`trl_miso.data.contexts` lists them, and `trl-miso preview ROWS` shows what becomes of rows.

    MISOSFTTrainer    TRL's SFTTrainer, training on mixtures of contexts
    MISOSFTConfig     its settings; the defaults are the paper's
    MISOEvalCallback  IFEval during training
    miso_generate     one answer from several contexts
    trl-miso          the command line: sft, preview, verify, readout, report, eval, recipes
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_miso.config import MISOSFTConfig
    from trl_miso.evaluation.callback import MISOEvalCallback
    from trl_miso.generation import miso_generate
    from trl_miso.training.trainer import MISOSFTTrainer
    from trl_miso.version import __version__

__all__ = ["MISOEvalCallback", "MISOSFTConfig", "MISOSFTTrainer", "__version__", "miso_generate"]

# Imported at their first use: torch and TRL take seconds, which `trl-miso --help` does not need.
_MODULES = {
    "MISOEvalCallback": "trl_miso.evaluation.callback",
    "MISOSFTConfig": "trl_miso.config",
    "MISOSFTTrainer": "trl_miso.training.trainer",
    "__version__": "trl_miso.version",
    "miso_generate": "trl_miso.generation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'trl_miso' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
