"""Weights that bitsandbytes has quantized: what of them can be trained exactly."""

from typing import Any

from torch import nn


def check_quantization(configs: list[Any]) -> None:
    """Raise ValueError for LLM.int8() with outliers.

    It picks the columns to compute in 16 bits by the largest activation in the whole batch, so that each row's loss depends on
    the rows and contexts beside it.

    Args:
        configs: Quantization configs, each an object, a dict or None.
    """
    for config in configs:
        options = config if isinstance(config, dict) else config.to_dict() if config is not None else {}
        threshold = options.get("llm_int8_threshold", 6.0)
        if options.get("load_in_8bit") and threshold:
            raise ValueError(
                f"Got load_in_8bit with llm_int8_threshold={threshold}, with which bitsandbytes chooses "
                "outlier columns over all tokens of a batch: contexts and rows would change each other's loss. Expected weights that treat "
                "each token alike. Fix: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), or load_in_4bit=True."
            )


def keep_unpacked(model: nn.Module) -> None:
    """Keep 4-bit weights in the format that has gradients.

    On CPUs with AVX512-BF16 bitsandbytes packs a layer's weights in its first forward in eval mode. Packed weights are rounded
    to bfloat16, and training on goes without their part of the gradient.

    Raises:
        ValueError: If weights are packed already.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "Got 4-bit weights that bitsandbytes has packed for inference on this CPU, expected weights as they are loaded: "
                "packed ones have no gradient. Fix: load the model again, and train it before anything else runs it in eval mode."
            )
        setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not an attribute of every module
