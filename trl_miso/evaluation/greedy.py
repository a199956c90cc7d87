"""Greedy generation for a batch of prompts, padded on the left."""

from collections.abc import Sequence
from typing import Any

import torch


def greedy_responses(
    model: Any,
    tokenizer: Any,
    prompts_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    device: torch.device | str | None = None,
    **generate_kwargs: Any,
) -> list[list[int]]:
    """Generate one greedy response per prompt, all prompts in one batch.

    Equals `model.generate` on every prompt alone, up to the rounding that the shape of a batch decides. The model's mode stays as it
    is: call `model.eval()` first. A model's own penalties and stop strings (`generation_config.json`) hold.

    Args:
        model: A transformers model that can generate.
        tokenizer: The model's tokenizer. Without a pad token, its eos token pads.
        prompts_ids: Token ids of the prompts, rendered by the chat template with the generation prompt.
        max_new_tokens: Limit per response, in tokens.
        device: Device of the batch (default: `model.device`, which is wrong where weights are offloaded or sharded).
        **generate_kwargs: Further arguments of `model.generate`.

    Returns:
        The new token ids per prompt, all lists of the same length: a response that ended early is followed by pad tokens. Decode
        them with `tokenizer.batch_decode(responses, skip_special_tokens=True)`.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(len(prompt) for prompt in prompts_ids)
    input_ids, attention_mask = [], []
    for prompt in prompts_ids:
        padding = width - len(prompt)
        input_ids.append([pad] * padding + list(prompt))
        attention_mask.append([0] * padding + [1] * len(prompt))
    if model.generation_config.stop_strings:
        generate_kwargs["tokenizer"] = tokenizer  # needed to stop at text
    device = model.device if device is None else device
    tokens = model.generate(
        input_ids=torch.tensor(input_ids, device=device),
        attention_mask=torch.tensor(attention_mask, device=device),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        **generate_kwargs,
    )
    return tokens[:, width:].tolist()
