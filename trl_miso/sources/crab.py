"""Crab-SFT rows (THU-KEG/Crab-SFT) to `prompt`, `constraints`, `completion`.

    dataset.map(crab_row, remove_columns=dataset.column_names, features=crab_features())

Crab does not store its constraints as a list: they are formatted into the last user turn, by templates that changed
between versions of the data. What holds in all of them: a constraint has no newline, ends in punctuation and is rarely
more than one sentence, and the lines of one list all carry the same marker (`-`, `#`, `*`, `>`, `1.`) or none.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Features

_KNOWN = {"system", "user", "assistant"}
_MARKER = re.compile(r"\s*(?:[-#*>]|\d+\.)\s+")
_TWO_SENTENCES = re.compile(r"[.!?]['\")\]]* +[^\W\d_a-z]")
_LINES = r"(?P<list>[^\n]+(?:\n[^\n]+)*)"
# Atomic groups, (?>...), and possessive repeats settle on one place: trying each in turn takes hours on a long text.
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
        # the list, then the instruction right below it: only the markers tell them apart, and a blank line in between
        # would make it an instruction that opens with a list
        r"(?P<list>(?P<marker>[-#*>]) [^\n]+\n(?:(?P=marker) [^\n]+\n)*+)(?=\S)(?P<base>.*)",
        # {instruction}, the last blank line, the list
        rf"(?P<base>.*)\n[ \t]*\n{_LINES}",
        # {instruction}, a space at the end of its line, the list; no blank line anywhere, as the frame above has failed
        rf"(?P<base>.*) \n{_LINES}",
    )
)


def crab_row(row: dict[str, Any]) -> dict[str, Any]:
    """One Crab-SFT row as columns that are present, with one type, in every row.

    Args:
        row: `{"id", "cnt_id", "source", "messages"}`; each message is `{"role": str, "content": str}`. An id that is
            not text names no kind, as a ShareGPT row's.

    Returns:
        - `prompt` (messages): everything before the answer, the last user turn holding the base instruction alone;
        - `constraints` (list of str): what was taken out of that turn; empty where the row was not split;
        - `completion` (messages): the final assistant turn, alone;
        - `full_prompt` (messages): everything before the answer, verbatim;
        - `miso_status`: `"split"`, or why the row was not, in which case `prompt` equals `full_prompt`: `"reverse"` and
          `"fewshot"` rows ask the model to write constraints, `"plain"` rows (ShareGPT) have none, `"no_constraints"`
          is a forward row in which no list was recognised, `"bad_messages"` has no prompt, a role other than system, user
          and assistant, or no answer in a last assistant turn (then `completion` is empty: it will be dropped).

    Raises:
        ValueError: there is no `id` or `messages` column, or `messages` is not a list of dicts with a text `role` and
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

    # the turns before are demonstrations, not requests: they stay as they are
    found = read_constraints(prompt[-1]["content"]) if prompt[-1]["role"] == "user" else None
    if found is None:
        return _columns("no_constraints", prompt, completion)
    base, constraints = found
    columns = _columns("split", prompt, completion)
    return columns | {"prompt": [*prompt[:-1], {"role": "user", "content": base}], "constraints": constraints}


def crab_features() -> "Features":
    """The types of `crab_row`'s columns, for `Dataset.map(features=...)`.

    Without them `datasets` takes the types from its first 1,000 rows, and where none of these was split `constraints`
    becomes a list of nulls that the first constraint does not fit.
    """
    from datasets import Features, List, Value

    messages, text = List({"role": Value("string"), "content": Value("string")}), Value("string")
    return Features(
        prompt=messages, constraints=List(text), completion=messages, full_prompt=messages, miso_status=text
    )


def read_constraints(text: str) -> tuple[str, list[str]] | None:
    """Split a user turn of Crab into its base instruction and its constraints, or None where no list is recognised.

    Several sentences on one line are constraints that a template joined by spaces, or prose: where one ends and the
    next begins was not recorded, so they give None.

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
    """The constraints of a list, markers removed; none where the lines cannot be such a list (module docstring)."""
    stripped = [line.strip() for line in lines.split("\n")]
    marked = [bool(_MARKER.match(line)) for line in stripped]
    if any(marked) != all(marked) or any(not line or line[-1].isalnum() for line in stripped):
        return []
    if all(marked):
        return [_MARKER.sub("", line, count=1) for line in stripped]
    return [] if len(stripped) == 1 and _TWO_SENTENCES.search(lines) else stripped


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
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
