"""Standard inference (one context, greedy): instructions followed, attention on the constraints, and how answers go wrong."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.real_study.decoding import decode
from benchmarks.real_study.rows import conversation
from trl_miso.evaluation.ifeval import Scorer

# A word 4-gram that an answer repeats so often is a loop, and no figure of speech.
REPEATS = 5


def prompts_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as prompts with IFEval's columns."""
    return [
        {
            "key": row["key"],
            "prompt": row["full_prompt"],
            "instruction_id_list": row["instruction_id_list"],
            "kwargs": row["kwargs"],
        }
        for row in rows
    ]


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], max_tokens: int, batch: int
) -> list[tuple[str, bool]]:
    """Per prompt, the model's greedy answer, and whether it ended with the eos token."""
    chats = [conversation(prompt) for prompt in prompts]
    ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))  # batches of similar lengths need little padding
    by_prompt: dict[int, tuple[str, bool]] = {}
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        responses = decode(model, tokenizer, [ids[i] for i in part], max_tokens)
        for i, response in zip(part, responses, strict=True):
            text = tokenizer.decode(response, skip_special_tokens=True).strip()
            by_prompt[i] = text, response[-1] == tokenizer.eos_token_id
    return [by_prompt[i] for i in range(len(prompts))]


def repeats(text: str) -> bool:
    """Whether some four words in a row occur five times or more."""
    words = re.findall(r"\w+", text.lower())
    counts = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    return max(counts.values(), default=0) >= REPEATS


def examine(
    model: PreTrainedModel,
    tokenizer: Any,
    sets: dict[str, Sequence[dict[str, Any]]],
    scorers: dict[str, Scorer],
    max_tokens: int,
    batch: int,
) -> dict[str, dict[str, Any]]:
    """Answer the prompts of all sets and score the answers, each set by its scorer.

    Returns:
        For each set: `verdicts` and `loose`: one string per prompt with one character, 0 or 1, per instruction. `unfinished`,
        `repeating`, `empty`: one string with one such character per prompt. `words`: the mean length of an answer.
    """
    model.eval()
    texts = [prompt["prompt"] for prompts in sets.values() for prompt in prompts]
    given = iter(answers(model, tokenizer, texts, max_tokens, batch))
    return {name: _scored(prompts, list(islice(given, len(prompts))), scorers[name]) for name, prompts in sets.items()}


def _scored(prompts: Sequence[dict[str, Any]], given: list[tuple[str, bool]], score: Scorer) -> dict[str, Any]:
    verdicts = [score(prompt, text) for prompt, (text, _) in zip(prompts, given, strict=True)]
    return {
        "verdicts": [_flags(verdict.strict) for verdict in verdicts],
        "loose": [_flags(verdict.loose) for verdict in verdicts],
        "unfinished": _flags(not ended for _, ended in given),
        "repeating": _flags(repeats(text) for text, _ in given),
        "empty": _flags(not text for text, _ in given),
        "words": sum(len(text.split()) for text, _ in given) / len(given),
    }


def _flags(values: Any) -> str:
    return "".join(str(int(value)) for value in values)


@torch.inference_mode()
def attention_on_constraints(model: PreTrainedModel, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    """The attention on the constraints' tokens under standard inference, from 0 to 1.

    It is the sum over all constraints' tokens, and the mean over the rows' answer tokens (the same for all models), layers and
    heads.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    total = count = 0.0
    for row in rows:
        text = tokenizer.apply_chat_template(conversation(row["full_prompt"], row["completion"]), tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        constraints = "\n".join(row["constraints"])
        begin = text.index(constraints)
        end = begin + len(constraints)
        answer = text.rindex(row["completion"])
        spans = encoded["offset_mapping"]
        on_constraints = torch.tensor([begin <= start and stop <= end for start, stop in spans])
        in_answer = torch.tensor([answer <= start and stop <= answer + len(row["completion"]) for start, stop in spans])
        ids = torch.tensor([encoded["input_ids"]], device=model.device)
        attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
        mean = torch.stack([layer[0].float().mean(0) for layer in attentions]).mean(0).cpu()
        total += float(mean[in_answer][:, on_constraints].sum())
        count += int(in_answer.sum())
    model.set_attn_implementation(before)
    return total / count
