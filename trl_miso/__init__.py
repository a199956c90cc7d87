"""Mixture-of-Contexts (MISO) fine-tuning for TRL."""

from trl_miso.config import MISOSFTConfig
from trl_miso.evaluation.callback import MISOEvalCallback
from trl_miso.generation import miso_generate
from trl_miso.trainer import MISOSFTTrainer

__version__ = "0.1.0"
__all__ = ["MISOEvalCallback", "MISOSFTConfig", "MISOSFTTrainer", "__version__", "miso_generate"]
