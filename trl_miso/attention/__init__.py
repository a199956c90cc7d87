"""MISO attention: kernels, the mixture and its backward, and their place in transformers."""

from trl_miso.attention.transformers_attention import register_miso_attention

__all__ = ["register_miso_attention"]
