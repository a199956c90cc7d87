"""Crab-SFT rows (THU-KEG/Crab-SFT) to columns `prompt`, `constraints`, `completion`.

    dataset.map(crab_row, remove_columns=dataset.column_names, features=crab_features())

Crab does not store its constraints as a list. They are formatted into the last user turn, by templates that changed between
versions of the data. In all versions a constraint has no newline, ends in punctuation and is rarely more than one sentence, and
the lines of a list either all carry the same marker (`-`, `#`, `*`, `>`, `1.`) or none.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Features

_KNOWN = {"system", "user", "assistant"}
_MARKER = re.compile(r"\s*([-#*>]|\d+\.)\s+")
_NEXT_SENTENCE = re.compile(r"[.!?]['\")\]]* +[^\W\d_a-z]")
_LINES = r"(?P<list>[^\n]+(?:\n[^\n]+)*)"
# Sentences of Crab's templates that only speak of the list. Beside the templates' labels, nothing else of a turn is left out.
_ANNOUNCEMENT = r"(?:When answering, )?[Pp]lease ensure that the following constraints are (?:also )?met[.:]"
_OPENING = (
    r"[^\n:]{0,99}(?:\b(?:[Ff]ollow(?:ing)?|considering) the (?:detailed )?(?:instructions|steps)\b[^\n:]{0,99}"
    r"\b(?:constraints|restrictions|rules)\b|\badhere to the following\b)[^\n:]{0,199}:?"
)
_CLOSING = r"[^\n:]{0,99}\b(?:these guidelines|attention to detail|what you come up with)\b[^\n:]{0,99}"
_LABEL = r"(?:- |1\. )?(?:Instructions|\*\*Instructions\*\*|Here's what you need to do): "
_LIST_LABEL = (
    r"(?:- |2\. )?(?:Additional Constraints|Additional Restrictions|\*\*Additional Constraints\*\*"
    r"|Just a couple of things to keep in mind):"
)
# Atomic groups, (?>...), keep their first match. Backtracking would take hours on a long text.
_FRAMES = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        # {instruction}, a sentence that announces the constraints, the list
        rf"(?>(?P<base>.*)\n\n{_ANNOUNCEMENT})\n{_LINES}",
        # the list, then the instruction under a label
        rf"{_LINES}\n\nQuery:\n(?P<base>.*)",
        # both under labels, with an opening and perhaps a closing paragraph around them
        rf"(?:{_OPENING}\n+)?{_LABEL}(?>(?P<base>.*)\n{_LIST_LABEL})\s*+{_LINES}(?:\n\n{_CLOSING})?",
        # a list under such a label in another frame, whose parts are not known
        rf"(?P<base>)(?P<list>)(?>.*\n[^\n]*{_LIST_LABEL}).*",
    )
)


def crab_row(row: dict[str, Any]) -> dict[str, Any]:
    """Split a Crab-SFT row into base instruction, constraints and answer.

    Every row gets the same columns with the same types.

    Args:
        row: `{"id", "cnt_id", "source", "messages"}`; each message is `{"role": str, "content": str}`. The id ends in the
            kind of the row; a row whose id is not text or has no kind is plain, as ShareGPT's are.

    Returns:
        - `prompt` (messages): everything before the answer, with the base instruction alone as last user turn;
        - `constraints` (list of str): the constraints of that turn; empty where the row was not split;
        - `completion` (messages): the final assistant turn;
        - `full_prompt` (messages): everything before the answer, verbatim;
        - `miso_status`: `"split"`, or the reason why the row was not split and `prompt` equals `full_prompt`. `"reverse"` and
          `"fewshot"` rows ask the model to write constraints. `"plain"` rows (ShareGPT) have no constraints.
          `"no_constraints"` is a forward row in which no list was recognised with certainty. `"bad_messages"` rows have no prompt, a role
          other than system, user and assistant, or no answer in a last assistant turn; their `completion` is empty, so they
          will be dropped.

    Raises:
        ValueError: If column `id` or `messages` is missing, or `messages` is not a list of dicts with a text `role` and
            `content`.
    """
    messages = _messages(row)
    roles = [message["role"] for message in messages]
    answered = roles[-1:] == ["assistant"] and messages[-1]["content"].strip()
    if not answered or "user" not in roles or not set(roles) <= _KNOWN:
        return _columns("bad_messages", messages, [])
    prompt, completion = messages[:-1], messages[-1:]

    kinds = ("forward", "reverse", "fewshot")
    kind = next((kind for kind in kinds if str(row["id"]).endswith(f"_{kind}")), "plain")
    if kind != "forward":
        return _columns(kind, prompt, completion)

    # Earlier turns are demonstrations, not requests: only the last user turn is split.
    parts = read_constraints(prompt[-1]["content"]) if prompt[-1]["role"] == "user" else None
    if parts is None:
        return _columns("no_constraints", prompt, completion)
    base, constraints = parts
    columns = _columns("split", prompt, completion)
    return columns | {"prompt": [*prompt[:-1], {"role": "user", "content": base}], "constraints": constraints}


def crab_features() -> "Features":
    """The types of `crab_row`'s columns, for `Dataset.map(features=...)`.

    Without them `datasets` takes the types from its first 1,000 rows. If none of these was split, `constraints` becomes a list of
    nulls, and the first constraint is an error.
    """
    from datasets import Features, List, Value

    messages, text = List({"role": Value("string"), "content": Value("string")}), Value("string")
    return Features(
        prompt=messages,
        constraints=List(text),
        completion=messages,
        full_prompt=messages,
        miso_status=text,
        train_turns=text,
    )


def read_constraints(text: str) -> tuple[str, list[str]] | None:
    """Split a user turn of Crab into base instruction and constraints; None where no list is recognised with certainty.

    All of the turn is in the base or in a constraint, without the markers of the list and what Crab's templates say about it:
    labels, an opening and a closing paragraph, a sentence that announces the list. Turns with other text at these places give
    None.

    So do several sentences on one line: they are prose, or constraints joined by spaces, whose boundaries were not recorded. So
    do lines that end in a colon, which belong to a text, and a turn that may both begin and end with its list.

    >>> read_constraints("Describe the sea.\\n\\n- Use no commas.\\n- Write one sentence.")
    ('Describe the sea.', ['Use no commas.', 'Write one sentence.'])
    """
    text = text.strip()
    for frame in _FRAMES:
        if match := frame.fullmatch(text):
            return _parts(match["base"].split("\n"), match["list"].split("\n"))

    # {instruction}, the list; or a marked list, then {instruction}. The longer list counts. A marked list at the beginning also
    # counts before a marked one at the end, which texts have too.
    lines = text.split("\n")
    start, length = _last_list(lines), _first_list(lines)
    last, marked = _parts(lines[:start], lines[start:]), bool(_marker(lines[0]))
    rival = len(last[1]) if last and not (marked and _marker(lines[start])) else 0
    if length <= rival:
        return last
    # Without a marker nothing separates the list from the instruction.
    separate = marked and (lines[length].strip() or not last)
    return _parts(lines[length:], lines[:length]) if separate else None


def _last_list(lines: list[str]) -> int:
    """The line at which the list begins: after the last blank line, or after a line that ends in the template's space."""
    start = len(lines)
    while start and lines[start - 1].strip(" \t"):
        start -= 1
    spaced = [i for i in range(start + 1, len(lines)) if lines[i - 1].endswith(" ")]
    marked = len(lines) - 1  # the last lines with the same marker
    while marked > start and _marker(lines[marked - 1]) == _marker(lines[marked]):
        marked -= 1
    if marked in spaced and _marker(lines[marked]):
        return marked
    return start or (spaced or [0])[-1]


def _first_list(lines: list[str]) -> int:
    """The number of lines at the beginning that look like a list of constraints, or 0."""
    marker = _marker(lines[0])
    length = 0
    while length < len(lines) and _is_sentence(lines[length]) and _marker(lines[length]) == marker:
        length += 1
    rest = lines[length:]
    # One blank line after a marked list: it is the instruction's.
    own = bool(marker) and rest[:1] == [""] and rest[1:2] != [""]
    return 0 if own or not rest or marker == "1." else length


def _parts(base: list[str], lines: list[str]) -> tuple[str, list[str]] | None:
    """The text of the instruction, and the constraints without their markers; None if the lines cannot be such a list."""
    instruction = "\n".join(base).strip()
    constraints = "\n".join(lines).strip().split("\n")
    if not instruction or not all(map(_is_sentence, constraints)) or len(set(map(_marker, constraints))) > 1:
        return None
    if _marker(constraints[0]):
        return instruction, [_MARKER.sub("", line, count=1).strip() for line in constraints]
    # Constraints have one or two sentences, rarely three. Longer lines, and several sentences on a line of its own, are prose.
    most = max(len(_NEXT_SENTENCE.findall(line)) for line in constraints)
    return None if most > (2 if len(constraints) > 1 else 0) else (instruction, [line.strip() for line in constraints])


def _is_sentence(line: str) -> bool:
    """Whether a line ends as a constraint does: not in a letter, and not as a heading, code or a table does."""
    end = line.rstrip()[-1:]
    return bool(end) and not end.isalnum() and end not in ":,;{|"


def _marker(line: str) -> str:
    """The marker of a line of a list, `1.` for all numbers; empty if it has none."""
    match = _MARKER.match(line)
    if not match:
        return ""
    return match[1] if len(match[1]) == 1 else "1."


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """The row's messages, checked, with role and content only."""
    if missing := [name for name in ("id", "messages") if name not in row]:
        raise ValueError(
            f"Crab row {row.get('id')!r:.80}: got columns {list(row)!r:.300}; expected {missing} too. Fix: load the "
            "data set's own train.jsonl, or rename your columns to its names first."
        )
    messages = row["messages"]
    if not (isinstance(messages, list) and all(_is_message(message) for message in messages)):
        raise ValueError(
            f"Crab row {row['id']!r:.80}: got messages = {messages!r:.300}; expected a list of dicts with a text `role` and "
            "`content`. Fix: load the data set's own train.jsonl, or map your columns to this form first."
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _columns(status: str, prompt: list[dict[str, str]], completion: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "constraints": [],
        "completion": completion,
        "full_prompt": prompt,
        "miso_status": status,
        "train_turns": "all" if status == "plain" else "last",
    }
