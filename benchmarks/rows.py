"""Rows for benchmarks, in Crab's schema."""

import json
import random
from pathlib import Path
from typing import Any

from trl_miso.sources.synthetic import synthetic_rows


def crab_shaped_rows(n: int, prose: Path | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """`n` forward rows with 6 to 8 constraints, half of them after 1 to 3 demonstration turns.

    With `prose`, a .jsonl file of real `prompt`, `constraints` and `completion`, its requests and answers, and constraints
    drawn from all of its rows; else generated rows, which are shorter (see `trl_miso.sources.synthetic`).
    """
    if prose is None:
        return synthetic_rows(n, seed)
    rng = random.Random(seed)
    real = [json.loads(line) for line in prose.read_text().splitlines()]
    constraints = sorted({c for row in real for c in row["constraints"] if "\n" not in c})

    def exchange(count: int) -> list[dict[str, str]]:
        row = rng.choice(real)
        request = row["prompt"] + "\n\n" * bool(count) + "\n".join(rng.sample(constraints, count))
        return [{"role": "user", "content": request}, {"role": "assistant", "content": row["completion"]}]

    rows = []
    for i in range(n):
        shots = rng.randint(1, 3) if rng.random() < 0.5 else 0
        messages = [message for _ in range(shots) for message in exchange(rng.randint(0, 7))] + exchange(
            rng.randint(6, 8)
        )
        rows.append({"id": f"prose_{i}_forward", "cnt_id": str(i), "source": "prose", "messages": messages})
    return rows
