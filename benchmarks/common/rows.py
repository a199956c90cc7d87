"""Rows for benchmarks: in Crab's schema and shape, and long ones like those distilled from R1."""

import json
import random
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_miso.sources.crab import crab_features, crab_row
from trl_miso.sources.synthetic import synthetic_rows

_CONSTRAINTS = 7


def texts(prose: Path | None = None) -> list[dict[str, Any]]:
    """`{"prompt", "constraints", "completion"}` rows of a .jsonl file, or generated ones.

    Generated rows have about Crab's lengths: a request of 60 tokens, constraints of 20, an answer of 300.
    """
    if prose is not None:
        return [json.loads(line) for line in prose.read_text().splitlines()]
    rows = [crab_row(row) for row in synthetic_rows(3200, seed=7)]
    answers = [row["completion"][0]["content"] for row in rows]
    sentences = sorted({constraint for row in rows for constraint in row["constraints"]})
    joined = []
    # Generated texts are short: join several of them.
    for start in range(0, len(rows) - 7, 8):
        constraints = []
        for i in range(start, start + 7):
            constraints.append(f"{sentences[i % len(sentences)]} {sentences[(i + 97) % len(sentences)]}")
        prompt = f"{rows[start]['prompt'][-1]['content']} {answers[start - 1]}"
        completion = " ".join(answers[start : start + 7])
        joined.append({"prompt": prompt, "constraints": constraints, "completion": completion})
    return joined


def crab_shaped_rows(
    n: int, material: list[dict[str, Any]], seed: int = 0, demonstrations: bool = True
) -> list[dict[str, Any]]:
    """`n` forward rows in Crab's schema, each with 7 constraints drawn from all of the material.

    With `demonstrations`, half of the rows have 1 to 3 exchanges before the request.
    """
    rng = random.Random(seed)
    constraints = sorted({c for text in material for c in text["constraints"] if "\n" not in c})

    def exchange(number: int) -> list[dict[str, str]]:
        text = rng.choice(material)
        request = text["prompt"] + "\n\n" * bool(number) + "\n".join(rng.sample(constraints, number))
        return [{"role": "user", "content": request}, {"role": "assistant", "content": text["completion"]}]

    rows = []
    for i in range(n):
        shots = rng.randint(1, 3) if demonstrations and i % 2 else 0
        messages = [message for _ in range(shots) for message in exchange(rng.randint(0, _CONSTRAINTS))]
        messages += exchange(_CONSTRAINTS)
        rows.append({"id": f"row_{i}_forward", "cnt_id": str(i), "source": "benchmark", "messages": messages})
    return rows


def adapt(rows: Dataset) -> Dataset:
    """Apply Crab's adapter: columns prompt, constraints, completion, full_prompt, miso_status and train_turns."""
    return rows.map(crab_row, remove_columns=rows.column_names, features=crab_features())


def full_prompts(adapted: Dataset) -> Dataset:
    """The columns that plain SFT trains on: the full prompt as `prompt`, and the completion."""
    unused = [name for name in adapted.column_names if name not in ("prompt", "completion")]
    return adapted.map(lambda row: {"prompt": row["full_prompt"]}, remove_columns=unused)


def long_rows(
    n: int, material: list[dict[str, Any]], tokenizer: Any, inputs: int, outputs: int
) -> list[dict[str, list[dict[str, str]]]]:
    """`n` rows with a prompt of about `inputs` tokens and a completion of about `outputs` tokens, cut from joined answers."""
    stream = _tokens(material, tokenizer)
    rows = []
    for _ in range(n):
        turns = []
        for column, role, length in (("prompt", "user", inputs), ("completion", "assistant", outputs)):
            content = tokenizer.decode(list(islice(stream, length))).strip()
            turns.append((column, [{"role": role, "content": content}]))
        rows.append(dict(turns))
    return rows


def _tokens(material: list[dict[str, Any]], tokenizer: Any) -> Iterator[int]:
    """Token ids of the material's answers, over and over."""
    for i in count():
        text = material[i % len(material)]["completion"]
        yield from tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
