"""Standard inference of a checkpoint: one context, greedy; which constraints its answers satisfy, and where they look."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.miniature.language import (
    MAX_TOKENS,
    build_tokenizer,
    draw_rows,
    messages,
    prompt,
    satisfied,
    well_formed,
)

SETS = ("IFE", "Flat", "Dense")
BATCH = 256

Rows = list[dict[str, Any]]


def examination(split: str, few: int, dense: int) -> dict[str, Rows]:
    """Rows of each set: IFE (1 to 3 constraints), Flat (each of IFE's constraints alone), Dense (3 to 7)."""
    ife = draw_rows(split, "IFE", [1 + i % 3 for i in range(few)])
    flat = [row | {"constraints": [constraint]} for row in ife for constraint in row["constraints"]]
    return {"IFE": ife, "Flat": flat, "Dense": draw_rows(split, "Dense", [3 + i % 5 for i in range(dense)])}


def examine(folder: Path, rows: dict[str, Rows], device: str) -> dict[str, dict[str, Any]]:
    """Of each set: `verdicts`, a string of 0 and 1 a prompt, a character a constraint; `malformed`, a character a prompt;
    `mass`, see `attention_mass`.
    """
    model = LlamaForCausalLM.from_pretrained(folder).to(device).eval()
    watched = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").to(device).eval()
    found = {}
    for name, members in rows.items():
        texts = answers(model, members, device)
        found[name] = {
            "verdicts": [
                "".join(str(int(satisfied(constraint, text))) for constraint in row["constraints"])
                for row, (text, _) in zip(members, texts, strict=True)
            ],
            "malformed": "".join(
                str(int(not (ended and well_formed(text, row["topic"]))))
                for row, (text, ended) in zip(members, texts, strict=True)
            ),
            "mass": attention_mass(watched, members, device),
        }
    return found


@torch.inference_mode()
def answers(model: LlamaForCausalLM, rows: Rows, device: str) -> list[tuple[str, bool]]:
    """The text that the model writes for each row's full prompt, greedily, and whether it came to an end."""
    tokenizer = build_tokenizer()
    made: dict[int, tuple[str, bool]] = {}
    order = sorted(range(len(rows)), key=lambda i: len(prompt(rows[i])))
    for at in range(0, len(order), BATCH):
        part = order[at : at + BATCH]
        prompts = [messages("user", prompt(rows[i])) for i in part]
        batch = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        ).to(device)
        out = model.generate(**batch, do_sample=False, max_new_tokens=MAX_TOKENS)[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        ended = (out == tokenizer.eos_token_id).any(1).tolist()
        made |= dict(zip(part, zip(texts, ended, strict=True), strict=True))
    return [made[i] for i in range(len(rows))]


@torch.inference_mode()
def attention_mass(model: LlamaForCausalLM, rows: Rows, device: str) -> float:
    """The share of attention that the tokens of the rows' own texts give to all constraints' tokens under standard inference,
    the mean over texts' tokens, layers and heads. `model` has eager attention.

    The texts are the rows', not the model's, so that every model is asked about the same tokens.
    """
    tokenizer = build_tokenizer()
    total = count = 0.0
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        dialogues = [messages("user", prompt(row)) + messages("assistant", row["text"]) for row in part]
        batch = tokenizer.apply_chat_template(
            dialogues, padding=True, padding_side="right", return_dict=True, return_tensors="pt"
        ).to(device)
        attentions = model(**batch, output_attentions=True).attentions
        mean = torch.stack(attentions).mean((0, 2)).double()  # (rows, queries, keys), over layers and heads
        for row, weights in zip(part, mean, strict=True):
            first = 1 + len(row["request"].split())
            last = first + len(" ".join(row["constraints"]).split())
            spoken = slice(last + 1, last + 1 + len(row["text"].split()))
            total += float(weights[spoken, first:last].sum())
            count += spoken.stop - spoken.start
    return total / count
