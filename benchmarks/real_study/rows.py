"""Rows of the study: real prompts, answers (the model's own, or given ones), and constraints back-translated from the answers.

No prompt of an evaluation is among the prompts of training: IFEval's are taken out, and the prompts are split before anything
else is drawn.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks.real_study.constraints import back_translate, restyle
from benchmarks.real_study.decoding import decode
from trl_miso.data.constraints import add_constraints
from trl_miso.evaluation.jsonl import read_jsonl

_SENTENCE_END = re.compile(r"[.!?][\"')]*(?=\s|$)")
# An answer that was cut off after the number of a list's next item.
_DANGLING_NUMBER = re.compile(r"(^|\s)\d+\.$")
MIN_WORDS = 15


def conversation(prompt: str, answer: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def normalized(prompt: str) -> str:
    """A prompt's words, by which equal prompts are found."""
    return " ".join(re.findall(r"\w+", prompt.lower()))


def read_prompts(file: str, excluded: Iterable[str], count: int, max_words: int) -> list[dict[str, str]]:
    """The study's prompts, in an order that depends on their texts alone.

    Args:
        file: JSON lines with `prompt` (and `answer`, for given answers).
        excluded: Prompts that must not be trained on.
        count: Number of prompts.
        max_words: Longer prompts are left out.
    """
    left_out = set(map(normalized, excluded))
    rows = {}
    for row in read_jsonl(file, {"prompt": str}):
        key = normalized(row["prompt"])
        if key not in left_out and len(row["prompt"].split()) <= max_words:
            rows[hashlib.sha256(key.encode()).hexdigest()] = row
    return [rows[digest] for digest in sorted(rows)][:count]


def whole_sentences(answer: str) -> str | None:
    """The answer up to its last end of a sentence, or None if that leaves fewer than 15 words."""
    ends = [match.end() for match in _SENTENCE_END.finditer(answer)]
    text = answer[: ends[-1]].strip() if ends else ""
    return text if len(text.split()) >= MIN_WORDS else None


def write_answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int) -> list[str | None]:
    """The model's answer to each prompt, sampled at temperature 0.7, as whole sentences; None for what is too short."""
    chats = [conversation(prompt) for prompt in prompts]
    ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    torch.manual_seed(0)
    answers: list[str | None] = []
    for response in decode(model, tokenizer, ids, max_tokens, temperature=0.7):
        text = tokenizer.decode(response, skip_special_tokens=True).strip()
        is_whole = response[-1] == tokenizer.eos_token_id and len(text.split()) >= MIN_WORDS
        answers.append(text if is_whole else whole_sentences(text))
    return answers


def constrained_row(prompt: str, answer: str, few: int, most: int, seed: str) -> dict[str, Any] | None:
    """A row with `few` to `most` constraints that its answer satisfies; None if the answer satisfies fewer.

    Columns: prompt, constraints, completion, full_prompt (the request as standard inference sees it), and IFEval's key,
    instruction_id_list and kwargs.
    """
    rng = random.Random(seed)
    answer, style = restyle(answer, rng)
    found = back_translate(answer, rng.randint(few, most), style, rng)
    if found is None:
        return None
    texts = [constraint.text for constraint in found]
    return {
        "key": int(hashlib.sha256(seed.encode()).hexdigest()[:8], 16),
        "prompt": prompt,
        "constraints": texts,
        "completion": answer,
        "full_prompt": add_constraints(prompt, texts),
        "instruction_id_list": [constraint.name for constraint in found],
        "kwargs": [constraint.kwargs for constraint in found],
    }


def make_splits(
    prompts: Sequence[dict[str, str]], answers: Sequence[str | None], dev: int, dense: int
) -> dict[str, list]:
    """Rows of the splits `dev` and `dense` (4 to 7 constraints, for testing) and `train` (2 to 6 constraints)."""
    splits: dict[str, list] = {"dev": [], "dense": [], "train": []}
    for row, answer in zip(prompts, answers, strict=True):
        if answer is None or _DANGLING_NUMBER.search(answer):
            continue
        name = "dense" if len(splits["dense"]) < dense else "dev" if len(splits["dev"]) < dev else "train"
        few, most = (2, 6) if name == "train" else (4, 7) if name == "dense" else (2, 7)
        made = constrained_row(row["prompt"], answer, few, most, f"{name} {row['prompt']}")
        if made is not None:
            splits[name].append(made)
    return splits
