"""How many prompts a model answers at once, by the free memory."""

import logging
from typing import Any

import psutil
import torch

logger = logging.getLogger(__name__)

# Caps: a larger batch computes on for its longest response, and a kill loses more of it. On a CPU no batch above 32 was measured.
_LARGEST, _LARGEST_ON_CPU = 128, 32
# Where memory is not known.
_UNKNOWN = 8
# Of the free memory. The rest is for what is not counted: attention scores of eager attention, copies and gaps as caches grow.
_SHARE = 0.5
# Width of the activations that are alive at once, per token of a prompt and in multiples of the model's width: those of one layer.
_ALIVE_WIDTHS = 32


def default_batch_size(model: Any, longest: int, max_new_tokens: int) -> int:
    """Return the largest power of two such that a batch of that many prompts fits into half of the free memory.

    It is at most 128, on a CPU at most 32, and at least 1. It is 8, with a warning, where the device does not tell its free memory or
    the model shows no cache.

    Args:
        model: A transformers model, on its device.
        longest: Length of the longest prompt, in tokens.
        max_new_tokens: Limit per response, in tokens.
    """
    free, needed = free_memory(model.device), prompt_bytes(model, longest, max_new_tokens)
    if free is None or needed is None:
        unknown = "free memory" if free is None else "cache"
        logger.warning("The %s is not known: %d prompts per batch. Fix: give --batch_size.", unknown, _UNKNOWN)
        return _UNKNOWN
    fitting = max(1, int(free * _SHARE) // needed)
    largest = _LARGEST_ON_CPU if model.device.type == "cpu" else _LARGEST
    return min(largest, 2 ** (fitting.bit_length() - 1))


def free_memory(device: torch.device) -> int | None:
    """Return the device's free memory in bytes, with what torch has reserved and not allocated; None if the device does not tell."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    try:
        free, _ = torch.accelerator.get_memory_info(device)
    except RuntimeError:
        return None
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)


def prompt_bytes(model: Any, longest: int, max_new_tokens: int) -> int | None:
    """Estimate the memory that a prompt takes in a batch; None if the model shows no cache.

    It is the cache of prompt and response, one layer's activations for the prompt, and three float32 copies of one token's logits.
    The cache is measured, on one and on two tokens, since configs spell its size in many ways: what grows is counted per token (also in
    a sliding window, as if there were none), and the rest, such as the states of linear attention, once.
    """
    first, second = _cache_bytes(model, 1), _cache_bytes(model, 2)
    if not first:
        return None
    cache = first + (second - first) * (longest + max_new_tokens - 1)
    embeddings = model.get_input_embeddings().weight
    vocabulary, width = embeddings.shape
    return cache + _ALIVE_WIDTHS * width * embeddings.dtype.itemsize * longest + 3 * 4 * vocabulary


def _cache_bytes(model: Any, tokens: int) -> int:
    """Return the size of the cache after so many tokens: of all tensors that its layers hold."""
    ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
    with torch.inference_mode():
        cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    size = 0
    for layer in getattr(cache, "layers", []):
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, torch.Tensor):
                    size += tensor.nbytes
    return size
