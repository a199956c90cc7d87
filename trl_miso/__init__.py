"""Mixture-of-Contexts (MISO) fine-tuning for TRL."""

from trl_miso.config import MISOSFTConfig
from trl_miso.evaluation.callback import MISOEvalCallback
from trl_miso.generation import miso_generate
from trl_miso.training.trainer import MISOSFTTrainer
from trl_miso.version import __version__

__all__ = ["MISOEvalCallback", "MISOSFTConfig", "MISOSFTTrainer", "__version__", "miso_generate"]
