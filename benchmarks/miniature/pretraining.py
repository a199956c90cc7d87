"""A base model: a small Llama, trained by a plain loop on exchanges in the language."""

import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.miniature.language import WORDS, build_tokenizer, draw_rows, messages, prompt

# hidden size, intermediate size, layers, heads, key-value heads
SIZES = {
    "smoke": (32, 64, 2, 2, 1),
    "quick": (128, 256, 2, 4, 4),
    "1m": (128, 384, 4, 4, 2),
    "30m": (512, 1536, 10, 8, 4),
}
# Of the exchanges of the first 40 % of the steps half ask to copy words, from which a model of this size learns to read at all.
ECHO, ECHOING = 0.5, 0.4
# Shares of exchanges with 0, 1, 2, 3 constraints: a base that never saw two together does not learn to read several.
COUNTS = (0.05, 0.55, 0.3, 0.1)


@dataclass(frozen=True)
class Pretraining:
    """Steps of `batch` exchanges each, the answers learnt, AdamW with warm-up and cosine decay."""

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
    """Write a base model to `folder`. `advance` is called after every step."""
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
    with whole(folder) as made:
        model.save_pretrained(made)


def _pretraining_batches(settings: Pretraining) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of exchanges of like lengths, padded on the right; drawn in pools of 16 batches."""
    tokenizer = build_tokenizer()
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for at in range(0, settings.steps, 16):
        batches = min(16, settings.steps - at)
        rng = random.Random(f"{settings.seed}-{at}")
        echo = ECHO if at < ECHOING * settings.steps else 0.0
        counts = rng.choices(range(len(COUNTS)), COUNTS, k=batches * settings.batch)
        rows = draw_rows("train", f"pretraining-{settings.seed}-{at}", counts)
        exchanges = [_echo(rng) if rng.random() < echo else (prompt(row), row["text"]) for row in rows]
        dialogues = [messages("user", asked) + messages("assistant", said) for asked, said in exchanges]
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
    words = " ".join(rng.choices(WORDS, k=rng.randint(2, 10)))
    return f"copy {words}", words


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write to that gets its name when all of it is written."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
