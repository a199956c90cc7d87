"""Standard inference of a checkpoint (one context, greedy): constraints that answers satisfy, attention that they pay them."""

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
from trl_miso.evaluation.greedy import greedy_responses

SETS = ("IFE", "Flat", "Dense")
BATCH = 256

Rows = list[dict[str, Any]]


def examination(split: str, few: int, dense: int) -> dict[str, Rows]:
    """The rows of each set: IFE (1 to 3 constraints), Flat (each of IFE's constraints alone), Dense (3 to 7).

    Args:
        few: Number of IFE rows.
        dense: Number of Dense rows.
    """
    ife = draw_rows(split, "IFE", [1 + i % 3 for i in range(few)])
    flat = [row | {"constraints": [constraint]} for row in ife for constraint in row["constraints"]]
    return {"IFE": ife, "Flat": flat, "Dense": draw_rows(split, "Dense", [3 + i % 5 for i in range(dense)])}


def examine(folder: Path, rows: dict[str, Rows], device: str) -> dict[str, dict[str, Any]]:
    """Answer each set's prompts with the model in `folder` and check the answers.

    Returns:
        Per set: `verdicts`, one string per prompt with one character, 0 or 1, per constraint; `malformed`, one string with one
        such character per prompt; `mass`, see `attention_mass`.
    """
    model = LlamaForCausalLM.from_pretrained(folder).to(device).eval()
    eager = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").to(device).eval()
    results = {}
    for name, members in rows.items():
        verdicts, malformed = [], ""
        for row, (text, ended) in zip(members, answers(model, members), strict=True):
            verdicts.append("".join(str(int(satisfied(constraint, text))) for constraint in row["constraints"]))
            malformed += str(int(not (ended and well_formed(text, row["topic"]))))
        mass = attention_mass(eager, members, device)
        results[name] = {"verdicts": verdicts, "malformed": malformed, "mass": mass}
    return results


@torch.inference_mode()
def answers(model: LlamaForCausalLM, rows: Rows) -> list[tuple[str, bool]]:
    """Per row, the model's greedy answer to the full prompt, and whether the answer ended with the eos token."""
    tokenizer = build_tokenizer()
    by_row: dict[int, tuple[str, bool]] = {}
    order = sorted(
        range(len(rows)), key=lambda i: len(prompt(rows[i]))
    )  # batches of similar lengths need little padding
    for at in range(0, len(order), BATCH):
        part = order[at : at + BATCH]
        chats = [messages("user", prompt(rows[i])) for i in part]
        ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
        responses = greedy_responses(model, tokenizer, ids, MAX_TOKENS)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        for i, text, response in zip(part, texts, responses, strict=True):
            by_row[i] = text, tokenizer.eos_token_id in response
    return [by_row[i] for i in range(len(rows))]


@torch.inference_mode()
def attention_mass(model: LlamaForCausalLM, rows: Rows, device: str) -> float:
    """The attention on the constraints' tokens under standard inference, from 0 to 1.

    It is the sum over all constraints' tokens and the mean over the text's tokens, layers and heads. The texts are those of the
    rows, not the model's answers, so that all models are compared on the same tokens. `model` must have eager attention.
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
        mean = torch.stack(attentions).mean((0, 2)).double()  # mean over layers and heads: (rows, queries, keys)
        for row, weights in zip(part, mean, strict=True):
            # <|user|> request constraints <|assistant|> text, one token per word
            start = 1 + len(row["request"].split())
            end = start + len(" ".join(row["constraints"]).split())
            text = slice(end + 1, end + 1 + len(row["text"].split()))
            total += float(weights[text, start:end].sum())
            count += text.stop - text.start
    return total / count
