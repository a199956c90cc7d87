"""MISO attention: the definition, kernels, the mixture with its exact backward, and the attention function for transformers."""

from trl_miso.attention.transformers_attention import register_miso_attention

__all__ = ["register_miso_attention"]
