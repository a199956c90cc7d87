"""Mixture-of-Contexts (MISO) fine-tuning for TRL."""

from trl_miso.config import MISOSFTConfig
from trl_miso.trainer import MISOSFTTrainer

__version__ = "0.1.0"
__all__ = ["MISOSFTConfig", "MISOSFTTrainer", "__version__"]
