"""Rows whose instructions hold their constraints become rows of para: base instruction, constraints, the full prompt verbatim.

    split = split_text("Name a river. The answer must end with a period and contain at most 5 words.")
    split.base         # "Name a river."
    split.texts        # ["The answer must end with a period", "contain at most 5 words"]
    split.left_out     # ["and"]

Every word of the instruction is in the base, in one constraint, or in `left_out`; nothing else is in any of them.
"""

import re
from typing import Any, NamedTuple

from datasets import Features, List, Value

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


def _split_at(text: str, found: list[Found]) -> Split:
    if not found:
        return Split(text, [], [])
    begin, end = last_request(text)
    kept, left_out = [text[:begin]], []
    at = begin
    for start, stop in [*sentences(text, begin, end), (end, end)]:
        gap, at = text[at:start], stop
        within = [c for c in found if c.begin < stop and c.end > start]
        if not within:
            sentence = text[start:stop]
            if is_about_requirements(sentence, _next_is_list(found, stop)):
                left_out.append(sentence)
            else:
                kept += [gap, sentence]
            continue
        head = text[start : within[0].begin]
        if is_lead(head):
            left_out.append(head)
        else:
            request = _OPEN_END.sub("", head)
            left_out.append(head[len(request) :])
            kept += [gap, request if request.endswith((".", "!", "?")) else f"{request}."]
        ends = [c.end for c in within]
        begins = [c.begin for c in within[1:]]
        left_out += [text[a:b] for a, b in zip(ends, [*begins, stop], strict=True)]
    base = "".join(kept).rstrip() + (text[end:] if text[end:].strip() else "")
    if not _WORD.search(base[begin:] if begin < len(base) else ""):
        return Split(text, [], [])
    return Split(base, found, [part.strip() for part in left_out if _WORD.search(part)])


def decompose_row(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a row with an instruction and an answer into a row of para.

    Args:
        row: `messages`, or `prompt` and `completion`: messages, or strings, which become messages. The instruction is the last turn
            before the answer; earlier turns stay.

    Returns:
        - `prompt`, `full_prompt`, `completion` (messages): the base instruction, the instruction verbatim, the answer;
        - `constraints`: parts of the instruction, verbatim; `constraint_spans`: for each, its first character in the instruction and the
          one after its last; `constraint_rules`: the rule that found it, `"list"` or `"clause"`;
        - `left_out`: words of the instruction in neither the base nor a constraint;
        - `train_turns`: `"last"` for rows that were split, `"all"` for the others;
        - `miso_status`: `"split"`, or why not: `"no_constraints"`, `"only_constraints"` (no base would be left), `"bad_messages"` (no
          instruction by a user before an answer; the completion is empty, so that training drops the row).

    Raises:
        ValueError: If the row has other columns or values.
    """
    messages = _conversation(row)
    roles = [message["role"] for message in messages]
    if roles[-1:] != ["assistant"] or roles[-2:-1] != ["user"] or not messages[-1]["content"].strip():
        return _columns(messages, [], "bad_messages")
    prompt, answer = messages[:-1], messages[-1:]
    text = prompt[-1]["content"]
    found = find_constraints(text)
    split = _split_at(text, found)
    if not split.constraints:
        return _columns(prompt, answer, "only_constraints" if found else "no_constraints")
    return _columns(prompt, answer, "split") | {
        "prompt": [*prompt[:-1], {"role": "user", "content": split.base}],
        "constraints": split.texts,
        "constraint_spans": [[constraint.begin, constraint.end] for constraint in split.constraints],
        "constraint_rules": [constraint.rule for constraint in split.constraints],
        "left_out": split.left_out,
    }


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
        left_out=List(text),
        train_turns=text,
        miso_status=text,
    )


def _columns(prompt: list[dict[str, str]], completion: list[dict[str, str]], status: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "constraints": [],
        "completion": completion,
        "full_prompt": prompt,
        "constraint_spans": [],
        "constraint_rules": [],
        "left_out": [],
        "train_turns": "last" if status == "split" else "all",
        "miso_status": status,
    }


def _conversation(row: dict[str, Any]) -> list[dict[str, str]]:
    """The row's turns, prompt and answer."""
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
