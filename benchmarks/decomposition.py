"""
How well the rules of `trl-miso decompose` find the constraints of instructions whose constraints are known.

    python -m benchmarks.decomposition ROWS.jsonl     # columns prompt, constraints; optional pattern
    python -m benchmarks.decomposition ROWS.jsonl --ifeval input_data.jsonl

Each constraint of a row is paired with at most one that was found. A pair counts if their words overlap: the F1 of the two bags of words is
at least 0.8. Recall, precision, and "exact", the share of rows in which everything was found and nothing else, beside two simple
rules on the same rows: every sentence after the first, and every clause with a modal verb.

With --ifeval also how well IFEval's own prompts, worded by people, are matched with their checkers: a checker counts if its id and all of its
keyword arguments are those of the prompt.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.common.measure import print_table
from trl_miso.decompose.checkers import find_checkers
from trl_miso.decompose.rules import find_constraints

AT_LEAST = 0.8


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def after_the_first(text: str) -> list[str]:
    return sentences(text)[1:]


def modal_verbs(text: str) -> list[str]:
    parts = [
        part
        for sentence in sentences(text)
        for part in re.split(r", (?=and |ensuring )| and (?=must |should )", sentence)
    ]
    return [part for part in parts if re.search(r"\b(must|should|ensure|ensuring|need to)\b", part, re.IGNORECASE)]


def rules(text: str) -> list[str]:
    return [found.text for found in find_constraints(text)]


METHODS: dict[str, Callable[[str], list[str]]] = {
    "every sentence after the first": after_the_first,
    "modal verbs": modal_verbs,
    "trl-miso decompose, rules": rules,
}


def overlap(one: str, other: str) -> float:
    """F1 of two bags of words."""
    first, second = (Counter(re.findall(r"\w+", text.lower())) for text in (one, other))
    common = sum((first & second).values())
    return 2 * common / max(1, sum(first.values()) + sum(second.values()))


def matched(constraints: list[str], found: list[str]) -> int:
    """Pairs that count, each text in one of them; the closest are paired first."""
    pairs = [(overlap(c, f), i, j) for i, c in enumerate(constraints) for j, f in enumerate(found)]
    left, right = set(range(len(constraints))), set(range(len(found)))
    count = 0
    for closeness, i, j in sorted(pairs, reverse=True):
        if closeness >= AT_LEAST and i in left and j in right:
            left.remove(i)
            right.remove(j)
            count += 1
    return count


def score(rows: list[dict], method: Callable[[str], list[str]]) -> list[float]:
    """Recall, precision and the share of exact rows."""
    pairs = expected = given = exact = 0
    for row in rows:
        found = method(row["prompt"])
        count = matched(row["constraints"], found)
        pairs, expected, given = pairs + count, expected + len(row["constraints"]), given + len(found)
        exact += count == len(row["constraints"]) == len(found)
    return [pairs / expected, pairs / max(1, given), exact / len(rows)]


def checkers_found(prompts: list[dict]) -> list[float]:
    """Recall and precision of the checkers found in IFEval's prompts, with their keyword arguments."""
    right = given = expected = 0
    for prompt in prompts:
        stated = []
        for name, kwargs in zip(prompt["instruction_id_list"], prompt["kwargs"], strict=True):
            stated.append(_checker(name, {key: value for key, value in kwargs.items() if value is not None}))
        expected += len(stated)
        for _, _, checker in find_checkers(prompt["prompt"]):
            given += 1
            if _checker(checker.id, checker.kwargs) in stated:
                stated.remove(_checker(checker.id, checker.kwargs))
                right += 1
    return [right / expected, right / max(1, given)]


def _checker(name: str, kwargs: dict) -> tuple[str, str]:
    """A checker for comparison. The prompt to repeat is the prompt itself, without this instruction."""
    values = {key: value for key, value in kwargs.items() if key != "prompt_to_repeat"}
    return name, json.dumps(values, sort_keys=True).lower()


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--ifeval", type=Path, metavar="FILE", help="IFEval's input_data.jsonl")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N rows that are not exact")
    options = parser.parse_args()
    rows = read_rows(options.rows)
    patterns = {"all": rows}
    for row in rows:
        if "pattern" in row:
            patterns.setdefault(row["pattern"], []).append(row)
    lines = []
    for pattern, part in patterns.items():
        for name, method in METHODS.items():
            lines.append([f"{pattern} ({len(part)})", name, *(f"{value:.2f}" for value in score(part, method))])
    print_table(
        f"Constraints found in {len(rows)} instructions", ["rows", "method", "recall", "precision", "exact"], lines
    )
    if options.ifeval:
        prompts = read_rows(options.ifeval)
        recall, precision = checkers_found(prompts)
        cells = [[f"IFEval ({len(prompts)})", f"{recall:.2f}", f"{precision:.2f}"]]
        print_table("Checkers found in prompts", ["prompts", "recall", "precision"], cells)
    shown = 0
    for row in rows:
        found = rules(row["prompt"])
        if shown < options.show and not matched(row["constraints"], found) == len(found) == len(row["constraints"]):
            shown += 1
            print(f"\n--- {row.get('pattern')}\n{row['prompt'][-900:]}\nEXPECTED", *row["constraints"], sep="\n  ")
            print("FOUND", *found, sep="\n  ")


if __name__ == "__main__":
    main()
