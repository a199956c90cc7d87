"""Answers with their thinking (DeepSeek-R1 and its kin) to `prompt`, `completion`: paper, section 5.2.

The instruction and the thinking are the input, the answer is the output: the input is long and cut into chunks, the
output is learnt.

    columns = {"instruction": "problem", "thinking": None, "response": "generations"}  # open-r1/OpenR1-Math-220k
    dataset.map(r1_distill_row, fn_kwargs=columns, remove_columns=dataset.column_names, features=r1_distill_features())

The defaults are the columns of tuanha1305/DeepSeek-R1-Distill and Congliu/Chinese-DeepSeek-R1-Distill-data-110k. Look
at a row first: public readers disagree whether `content` or `reasoning_content` holds the answer.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Features

_TAG = re.compile(r"</?think>")


def r1_distill_row(
    row: dict[str, Any],
    instruction: str = "input",
    thinking: str | None = "reasoning_content",
    response: str = "content",
) -> dict[str, Any]:
    """One row of an instruction, thinking and an answer as columns that are present, with one type, in every row.

    Args:
        row: the columns named by the other arguments, which `Dataset.map(fn_kwargs=...)` passes on.
        instruction: text, or a list of `{"role", "content"}` messages. Of these everything up to the last user turn is
            kept as it is, and the thinking is added to that turn.
        thinking: text, with or without its tags; None, or empty in a row, where the response holds `<think>` tags.
        response: text, or a list of generations, of which the first with thinking and an answer is taken, else the
            first with an answer.

    Returns:
        - `prompt` (messages): the instruction, a blank line and the thinking, without tags;
        - `completion` (messages): the answer, in an assistant turn. In tagged text it is what follows the last
          `</think>`, as in the chat templates of these models;
        - `miso_status`: `"split"`; `"no_thinking"`, where there is none and `prompt` is the instruction alone; or why
          `completion` is empty and the row will be dropped: `"no_instruction"`, `"no_response"` (no text, or thinking
          that was cut off before an answer), `"swapped columns? ..."` (there is text after `</think>` in the thinking
          column, or thinking without an answer in the response column). A row cut off there looks the same, so it is
          no error: exchange the names where most rows say so.

    Raises:
        ValueError: a column is missing, or is not text (or the lists that are named above).
    """
    needed = [name for name in (instruction, thinking, response) if name is not None]
    if missing := [name for name in needed if name not in row]:
        raise ValueError(
            f"R1 row {row.get('id')!r:.80}: got columns {list(row)!r:.300}; expected {missing} too. Fix: name your columns in "
            "Dataset.map(fn_kwargs={'instruction': ..., 'thinking': ..., 'response': ...}), thinking=None where the response "
            "holds its thinking in <think> tags."
        )
    prompt = _instruction(row, instruction)
    if not prompt:
        return _columns("no_instruction", [], "")

    column = _text(row[thinking], row, thinking) if thinking is not None else ""
    thoughts, leftover = _split(column) if "</think>" in column else (_untagged(column), "")
    responses = row[response] if isinstance(row[response], list) else [row[response]]
    texts = [_text(text, row, response) for text in responses]
    found = [(thoughts or own, answer) for own, answer in map(_split, texts)]
    answered = [pair for pair in found if pair[1]]
    if leftover or (thoughts and not answered and any(map(_TAG.search, texts))):
        status = f"swapped columns? where {thinking!r} is the answer, give thinking={response!r}, response={thinking!r}"
        return _columns(status, prompt, "")
    if not answered:
        return _columns("no_response", prompt, "")

    thoughts, answer = next((pair for pair in answered if pair[0]), answered[0])
    if not thoughts:
        return _columns("no_thinking", prompt, answer)
    *earlier, user = prompt
    return _columns("split", [*earlier, user | {"content": f"{user['content']}\n\n{thoughts}"}], answer)


def r1_distill_features() -> "Features":
    """The types of `r1_distill_row`'s columns, for `Dataset.map(features=...)`."""
    from datasets import Features, List, Value

    messages = List({"role": Value("string"), "content": Value("string")})
    return Features(prompt=messages, completion=messages, miso_status=Value("string"))


def _split(text: str) -> tuple[str, str]:
    """(thinking, answer) of a response, each empty where it has none.

    >>> _split("<think>\\nHm.\\n</think>\\n\\nYes.")
    ('Hm.', 'Yes.')
    """
    thoughts, closing, answer = text.rpartition("</think>")
    if "<think>" in answer:  # opened and never closed: the text was cut off in the thinking
        return _untagged(text), ""
    return _untagged(thoughts), (answer.strip() if closing else answer * bool(answer.strip()))


def _untagged(text: str) -> str:
    return _TAG.sub("", text).strip()


def _instruction(row: dict[str, Any], column: str) -> list[dict[str, str]]:
    """The messages up to the last user turn; none where that says nothing."""
    value = row[column]
    if not isinstance(value, list):
        value = [{"role": "user", "content": _text(value, row, column)}]
    if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value):
        raise _wrong_type(value, row, column)
    messages = [{"role": turn["role"], "content": _text(turn.get("content"), row, column)} for turn in value]
    end = max((i for i, message in enumerate(messages, 1) if message["role"] == "user"), default=0)
    return messages[:end] if end and messages[end - 1]["content"].strip() else []


def _text(value: Any, row: dict[str, Any], column: str) -> str:
    if not isinstance(value, str | None):
        raise _wrong_type(value, row, column)
    return value or ""


def _wrong_type(value: Any, row: dict[str, Any], column: str) -> ValueError:
    return ValueError(
        f"R1 row {row.get('id')!r:.80}: got {value!r:.300} in column {column!r}; expected text (an instruction may be a list "
        "of `role` and `content` messages, a response a list of texts). Fix: name another column in Dataset.map(fn_kwargs=...), "
        "or convert it first."
    )


def _columns(status: str, prompt: list[dict[str, str]], answer: str) -> dict[str, Any]:
    completion = [{"role": "assistant", "content": answer}] if answer else []
    return {"prompt": prompt, "completion": completion, "miso_status": status}
