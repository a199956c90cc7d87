"""The base model: a small Llama, trained on exchanges in the language by a plain loop."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.folders import atomic_folder
from benchmarks.miniature.language import WORDS, build_tokenizer, draw_rows, messages, prompt

# hidden size, intermediate size, layers, heads, key-value heads
SIZES = {
    "smoke": (32, 64, 2, 2, 1),
    "quick": (128, 256, 2, 4, 4),
    "1m": (128, 384, 4, 4, 2),
    "30m": (512, 1536, 10, 8, 4),
}
# During the first 40 % of the steps, half of the exchanges ask to copy words. Without these a model this small never learns to read.
ECHO, ECHOING = 0.5, 0.4
# Shares of exchanges with 0, 1, 2, 3 constraints. A base that never saw two together does not learn to read several.
COUNTS = (0.05, 0.55, 0.3, 0.1)


@dataclass(frozen=True)
class Pretraining:
    """`steps` steps of `batch` exchanges each, loss on the answers, AdamW with warm-up and cosine decay."""

    size: str
    steps: int
    learning_rate: float = 3e-3
    batch: int = 32
    seed: int = 0


def build_model(size: str, seed: int) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, groups = SIZES[size]
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def pretrain(settings: Pretraining, folder: Path, device: str, advance: Callable[[], None]) -> None:
    """Train a base model and write it to `folder`; call `advance` after every step."""
    model = build_model(settings.size, settings.seed).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, settings.steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / settings.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for ids, labels in _pretraining_batches(settings):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=ids.to(device), labels=labels.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        advance()
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)


def _pretraining_batches(settings: Pretraining) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, labels) of exchanges of similar length, padded on the right; sorted by length in pools of 16 batches."""
    tokenizer = build_tokenizer()
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for at in range(0, settings.steps, 16):
        batches = min(16, settings.steps - at)
        rng = random.Random(f"{settings.seed}-{at}")
        echo = ECHO if at < ECHOING * settings.steps else 0.0
        counts = rng.choices(range(len(COUNTS)), COUNTS, k=batches * settings.batch)
        rows = draw_rows("train", f"pretraining-{settings.seed}-{at}", counts)
        exchanges = [_echo(rng) if rng.random() < echo else (prompt(row), row["text"]) for row in rows]
        dialogues = [messages("user", request) + messages("assistant", answer) for request, answer in exchanges]
        pool = tokenizer(tokenizer.apply_chat_template(dialogues, tokenize=False), add_special_tokens=False).input_ids
        pool.sort(key=len)
        parts = [pool[i * settings.batch : (i + 1) * settings.batch] for i in range(batches)]
        rng.shuffle(parts)
        for part in parts:
            width = max(map(len, part))
            ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in part])
            answer = (ids == assistant).cumsum(1).bool() & (ids != assistant) & (ids != tokenizer.pad_token_id)
            yield ids, ids.masked_fill(~answer, -100)


def _echo(rng: random.Random) -> tuple[str, str]:
    """A request to copy words, and the answer."""
    words = " ".join(rng.choices(WORDS, k=rng.randint(2, 10)))
    return f"copy {words}", words
