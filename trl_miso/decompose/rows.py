"""Rows whose instructions hold their constraints become rows of para: base instruction, constraints, the full prompt verbatim.

    split = split_text("Name a river. The answer must end with a period and contain at most 5 words.")
    split.base         # "Name a river."
    split.texts        # ["The answer must end with a period", "contain at most 5 words"]
    split.left_out     # ["and"]

Every word of the instruction is in the base, in one constraint, or in `left_out`; nothing else is in any of them.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Features, List, Value

from trl_miso.decompose.checkers import checker_of
from trl_miso.decompose.rules import Found, find_constraints, is_about_requirements, is_lead, last_request, sentences

_WORD = re.compile(r"\w")
# What is left at the end of a clause whose continuation was taken out.
_OPEN_END = re.compile(r"(?:[\s,;:]|\b(?:and|but|while|with)\b)+\Z")
_MESSAGES = List({"role": Value("string"), "content": Value("string")})


class Split(NamedTuple):
    """An instruction's base, its constraints in order, and the words of neither: what joins, announces or justifies them."""

    base: str
    constraints: list[Found]
    left_out: list[str]

    @property
    def texts(self) -> list[str]:
        return [constraint.text for constraint in self.constraints]


def split_text(text: str) -> Split:
    """Split an instruction by `rules.find_constraints`. Without constraints, or without a base, the base is the whole text."""
    return _split_at(text, find_constraints(text))


def split_by_quotes(text: str, quotes: Sequence[str]) -> tuple[Split, list[str]]:
    """Split an instruction at quotations from it, as a model gives them; return the split and the quotations that are none.

    A quotation is looked up behind the one before, then anywhere; its case and spaces may differ. One that overlaps another
    is left out with those that do not stand in the instruction.
    """
    begin, end = last_request(text)
    found: list[Found] = []
    invented = []
    at = begin
    for quote in quotes:
        words = quote.strip().split()
        pattern = re.compile(r"\s+".join(map(re.escape, words)), re.IGNORECASE)
        match = pattern.search(text, at, end) or pattern.search(text, begin, end)
        if not (match and _WORD.search(quote)) or any(match.start() < c.end and c.begin < match.end() for c in found):
            invented.append(quote)
            continue
        found.append(Found(*match.span(), match[0], "model"))
        at = match.end()
    return _split_at(text, sorted(found)), invented


def _split_at(text: str, found: list[Found]) -> Split:
    if not found:
        return Split(text, [], [])
    begin, end = last_request(text)
    kept, left_out = [text[:begin]], []
    at = begin
    units = _units(text, begin, end, found)
    for number, (start, stop) in enumerate([*units, (end, end)]):
        gap, at = text[at:start], stop
        within = [c for c in found if c.begin < stop and c.end > start]
        if not within:
            sentence = text[start:stop]
            # The first sentence asks for something, even if it announces the constraints too.
            if number > 0 and is_about_requirements(sentence, _next_is_list(found, stop)):
                left_out.append(sentence)
            else:
                kept += [gap, sentence]
            continue
        request, others = _request(text, start, stop, within)
        left_out += others
        if request:
            mark = "?" if text[start:stop].rstrip().endswith("?") else "."
            kept += [gap, request if request.endswith((".", "!", "?")) else request + mark]
    base = "".join(kept).rstrip() + (text[end:] if text[end:].strip() else "")
    if not _WORD.search(base[begin:] if begin < len(base) else ""):
        return Split(text, [], [])
    return Split(base, found, [part.strip() for part in left_out if _WORD.search(part)])


def _units(text: str, begin: int, end: int, found: list[Found]) -> list[tuple[int, int]]:
    """The sentences between two positions; those that a constraint joins are one."""
    units: list[tuple[int, int]] = []
    for start, stop in sentences(text, begin, end):
        if units and any(c.begin < units[-1][1] and start < c.end for c in found):
            start = units.pop()[0]
        units.append((start, stop))
    return units


def _request(text: str, start: int, stop: int, within: list[Found]) -> tuple[str, list[str]]:
    """What is asked for beside the constraints of a sentence, and what is left out.

    Between and behind constraints that a rule found there are reasons; a model also quotes from the middle of a request.
    """
    head = text[start : within[0].begin]
    request = "" if is_lead(head) else _OPEN_END.sub("", head)
    left_out = [head[len(request) :]]
    for constraint, following in zip(within, [*(c.begin for c in within[1:]), stop], strict=True):
        gap = text[constraint.end : following]
        if constraint.rule != "model" or is_lead(gap):
            left_out.append(gap)
        else:
            stated = gap.lstrip(" ,;:")
            kept = _OPEN_END.sub("", stated)
            left_out.append(stated[len(kept) :])
            request = f"{request} {kept}".strip()
    return request, left_out


def decompose_row(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a row with an instruction and an answer into a row of para, by the rules.

    Args:
        row: `messages`, or `prompt` and `completion`: messages, or strings, which become messages. The instruction is the last turn
            before the answer; earlier turns stay.

    Returns:
        - `prompt`, `full_prompt`, `completion` (messages): the base instruction, the instruction verbatim, the answer;
        - `constraints`: parts of the instruction, verbatim; `constraint_spans`: for each, its first character in the instruction and the
          one after its last; `constraint_rules`: what found it, the rule `"list"` or `"clause"`, or a `"model"`;
        - `instruction_id_list`, `kwargs`: for each constraint IFEval's id of its checker, or null; and the checkers' keyword arguments,
          as JSON of a list;
        - `answer_follows`: for each constraint whether the answer follows it; null until `answers.with_verdicts` has checked it;
        - `left_out`: words of the instruction in neither the base nor a constraint;
        - `not_found`: quotations of a model that do not stand in the instruction, or overlap others; they are not used;
        - `train_turns`: `"last"` for rows that were split, `"all"` for the others;
        - `miso_status`: `"split"`, or why not: `"no_constraints"`, `"only_constraints"` (no base would be left), `"no_answer"` (a model
          was asked, without a readable answer), `"bad_messages"` (no instruction by a user before an answer; the completion is empty,
          so that training drops the row).

    Raises:
        ValueError: If the row has other columns or values, or has constraints or contexts already.
    """
    messages = _conversation(row)
    roles = [message["role"] for message in messages]
    if roles[-1:] != ["assistant"] or roles[-2:-1] != ["user"] or not messages[-1]["content"].strip():
        return _columns(messages, [], "bad_messages")
    text = messages[-2]["content"]
    found = find_constraints(text)
    return _split_columns(messages[:-1], messages[-1:], _split_at(text, found), bool(found))


def with_quotes(row: dict[str, Any], quotes: dict[str, list[str]]) -> dict[str, Any]:
    """A row of `decompose_row`, split at the quotations of a model (by instruction) instead; `"no_answer"` if there are none for it."""
    prompt, answer = row["full_prompt"], row["completion"]
    text = prompt[-1]["content"]
    if text not in quotes:
        return _columns(prompt, answer, "no_answer")
    split, not_found = split_by_quotes(text, quotes[text])
    stands = len(quotes[text]) > len(not_found)
    return _split_columns(prompt, answer, split, stands) | {"not_found": not_found}


def decomposed_features() -> Features:
    """The types of `decompose_row`'s columns."""
    text = Value("string")
    return Features(
        prompt=_MESSAGES,
        constraints=List(text),
        completion=_MESSAGES,
        full_prompt=_MESSAGES,
        constraint_spans=List(List(Value("int64"))),
        constraint_rules=List(text),
        instruction_id_list=List(text),
        kwargs=text,
        answer_follows=List(Value("bool")),
        left_out=List(text),
        not_found=List(text),
        train_turns=text,
        miso_status=text,
    )


def _split_columns(
    prompt: list[dict[str, str]], answer: list[dict[str, str]], split: Split, stated: bool
) -> dict[str, Any]:
    """The columns of a row with that split; `stated`: constraints stand in the instruction, perhaps without a base."""
    if not split.constraints:
        return _columns(prompt, answer, "only_constraints" if stated else "no_constraints")
    text = prompt[-1]["content"]
    checkers, kwargs = [], []
    for constraint in split.constraints:
        checker = checker_of(constraint.text)
        checkers.append(checker)
        kwargs.append(checker.kwargs if checker else {})
        if checker and checker.id == "combination:repeat_prompt":
            kwargs[-1] = {"prompt_to_repeat": f"{text[: constraint.begin].rstrip()}{text[constraint.end :]}".strip()}
    return _columns(prompt, answer, "split") | {
        "prompt": [*prompt[:-1], {"role": "user", "content": split.base}],
        "constraints": split.texts,
        "constraint_spans": [[constraint.begin, constraint.end] for constraint in split.constraints],
        "constraint_rules": [constraint.rule for constraint in split.constraints],
        "instruction_id_list": [checker.id if checker else None for checker in checkers],
        "kwargs": json.dumps(kwargs, ensure_ascii=False),
        "answer_follows": [None] * len(checkers),
        "left_out": split.left_out,
    }


def _columns(prompt: list[dict[str, str]], completion: list[dict[str, str]], status: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "constraints": [],
        "completion": completion,
        "full_prompt": prompt,
        "constraint_spans": [],
        "constraint_rules": [],
        "instruction_id_list": [],
        "kwargs": "[]",
        "answer_follows": [],
        "left_out": [],
        "not_found": [],
        "train_turns": "last" if status == "split" else "all",
        "miso_status": status,
    }


def _conversation(row: dict[str, Any]) -> list[dict[str, str]]:
    """The row's turns, prompt and answer."""
    for name in ("constraints", "full_prompt", "contexts"):
        if row.get(name) and row[name] != row.get("prompt"):
            raise ValueError(
                f"Got a row with `{name}`, expected rows whose instructions are whole. Fix: train on these rows as they are."
            )
    if row.get("messages") is not None:
        turns = row["messages"]
    elif row.get("prompt") is not None and row.get("completion") is not None:
        turns = _turns(row["prompt"], "user") + _turns(row["completion"], "assistant")
    else:
        raise ValueError(
            f"Got columns {list(row)}, expected `messages`, or `prompt` and `completion`. Fix: rename your columns to these."
        )
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("role", "content")):
            raise ValueError(
                f"Got the turn {turn!r:.200}, expected a role and a content, both text. Fix: correct the row."
            )
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _turns(value: Any, role: str) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def _next_is_list(found: list[Found], position: int) -> bool:
    """Whether the next constraint behind a position is an item of a list."""
    return next((c.rule == "list" for c in found if c.begin >= position), False)
