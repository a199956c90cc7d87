"""Generation from several contexts: `miso_generate`."""

from trl_miso.generation.generate import miso_generate

__all__ = ["miso_generate"]
