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
_MARKER = re.compile(r"\s*(?:[-#*>]|\d+\.)\s+")
_TWO_SENTENCES = re.compile(r"[.!?]['\")\]]* +[^\W\d_a-z]")
_LINES = r"(?P<list>[^\n]+(?:\n[^\n]+)*)"
# Atomic groups, (?>...), and possessive repeats keep their first match. Backtracking would take hours on a long text.
_FRAMES = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        # {instruction}, a sentence that announces the constraints, the list
        rf"(?>(?P<base>.*)\n\n[^\n]*following constraints)[^\n]*[.:]\n{_LINES}",
        # the list, then the instruction under a label
        rf"{_LINES}\n\nQuery:\n(?P<base>.*)",
        # both under labels, with an opening and perhaps a closing paragraph around them
        (
            r"(?>.*?(?:Instructions\**|need to do): )(?>(?P<base>.*)\n[^\n]*"
            rf"(?:Additional (?:Constraints|Restrictions)\**|keep in mind):)\s*+{_LINES}(?:\n\n[^\n]*)?"
        ),
        # the list, then the instruction on the next line. Only the markers separate the two; with a blank line between them
        # the list would be the beginning of an instruction
        r"(?P<list>(?P<marker>[-#*>]) [^\n]+\n(?:(?P=marker) [^\n]+\n)*+)(?=\S)(?P<base>.*)",
        # {instruction}, the last blank line, the list
        rf"(?P<base>.*)\n[ \t]*\n{_LINES}",
        # {instruction}, a space at the end of its line, the list. The frame above has failed, so there is no blank line
        rf"(?P<base>.*) \n{_LINES}",
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
          `"no_constraints"` is a forward row in which no list was recognised. `"bad_messages"` rows have no prompt, a role
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
        prompt=messages, constraints=List(text), completion=messages, full_prompt=messages, miso_status=text
    )


def read_constraints(text: str) -> tuple[str, list[str]] | None:
    """Split a user turn of Crab into base instruction and constraints; None where no list is recognised.

    Several sentences on one line give None: they are prose, or constraints joined by spaces, whose boundaries were not recorded.

    >>> read_constraints("Describe the sea.\\n\\n- Use no commas.\\n- Write one sentence.")
    ('Describe the sea.', ['Use no commas.', 'Write one sentence.'])
    """
    for frame in _FRAMES:
        if match := frame.fullmatch(text.strip()):
            base, constraints = match["base"].strip(), _constraints(match["list"].strip())
            if base and constraints:
                return base, constraints
            if "marker" not in match.groupdict():  # an instruction may open with a marked list of its own
                return None
    return None


def _constraints(lines: str) -> list[str]:
    """The constraints of a list without their markers; empty if the lines cannot be such a list (see the module)."""
    stripped = [line.strip() for line in lines.split("\n")]
    marked = [bool(_MARKER.match(line)) for line in stripped]
    if any(marked) != all(marked) or any(not line or line[-1].isalnum() for line in stripped):
        return []
    if all(marked):
        return [_MARKER.sub("", line, count=1) for line in stripped]
    if len(stripped) == 1 and _TWO_SENTENCES.search(lines):
        return []
    return stripped


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
    }
