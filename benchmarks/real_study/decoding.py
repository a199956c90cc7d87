"""Decoding of a batch of prompts from which finished answers drop out."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from trl_miso.generation.generate import cache_argument


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts_ids: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float | None = None,
) -> list[list[int]]:
    """Answers without padding, the eos token included. Answers that ended leave the batch.

    Greedy decoding equals `greedy_responses`. `generate` computes on until the last answer of a batch has ended, which doubles
    the work of a study on a CPU.

    Args:
        temperature: Sample from the 50 likeliest tokens at this temperature; None: greedy.
    """
    width = max(map(len, prompts_ids))
    pads = [width - len(prompt) for prompt in prompts_ids]
    tokens = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts_ids, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    options = {cache_argument(model): cache, "logits_to_keep": 1}
    answers: list[list[int]] = [[] for _ in prompts_ids]
    open_answers = list(range(len(prompts_ids)))
    for _ in range(max_tokens):
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, **options).logits
        tokens = _pick(logits[:, -1], temperature)
        for i, token in zip(open_answers, tokens[:, 0].tolist(), strict=True):
            answers[i].append(token)
        going_on = (tokens[:, 0] != tokenizer.eos_token_id).nonzero()[:, 0]
        if not len(going_on):
            break
        if len(going_on) < len(open_answers):
            cache.batch_select_indices(going_on)
            tokens, mask, positions = tokens[going_on], mask[going_on], positions[going_on]
            open_answers = [open_answers[i] for i in going_on.tolist()]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
    return answers


def _pick(logits: torch.Tensor, temperature: float | None) -> torch.Tensor:
    """The next token of each row (rows, vocabulary), as (rows, 1)."""
    if temperature is None:
        return logits.argmax(-1, keepdim=True)
    values, tokens = logits.float().topk(50)
    return tokens.gather(1, (values / temperature).softmax(-1).multinomial(1))
