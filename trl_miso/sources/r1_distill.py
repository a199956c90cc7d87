"""Rows distilled with their thinking (from DeepSeek-R1 and similar models) to `prompt`, `completion`: paper, section 5.2.

The instruction and the thinking are the input, the answer is the output. MISO-succ cuts the long input into chunks.

    columns = {"instruction": "problem", "thinking": None, "response": "generations"}  # open-r1/OpenR1-Math-220k
    dataset.map(r1_distill_row, fn_kwargs=columns, remove_columns=dataset.column_names, features=r1_distill_features())

The defaults are the columns of tuanha1305/DeepSeek-R1-Distill and Congliu/Chinese-DeepSeek-R1-Distill-data-110k. Look at a row
first: published code disagrees on whether `content` or `reasoning_content` holds the answer.
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
    """Turn a row of instruction, thinking and answer into a prompt and a completion.

    Every row gets the same columns with the same types.

    Args:
        row: Has the columns named by the other arguments, which `Dataset.map(fn_kwargs=...)` passes on.
        instruction: Column with text or a list of `{"role", "content"}` messages. Messages up to the last user turn are kept,
            and the thinking is appended to that turn.
        thinking: Column with text, with or without its tags. None if the response holds the thinking in `<think>` tags; the
            response's tags also count in rows where the column is empty.
        response: Column with text or a list of generations. Of generations, the first with both thinking and an answer is
            taken, otherwise the first with an answer.

    Returns:
        - `prompt` (messages): the instruction, a blank line and the thinking without its tags;
        - `completion` (messages): the answer as an assistant turn. In tagged text the answer follows the last `</think>`, as in
          the chat templates of these models;
        - `miso_status`: `"split"`; `"no_thinking"` if there is none, and `prompt` is the instruction alone; or the reason why
          `completion` is empty and the row will be dropped. `"no_instruction"`; `"no_response"`: no text, or thinking that was
          cut off before an answer; `"swapped columns? ..."`: the thinking column has text after `</think>`, or the response
          column has thinking but no answer. A single row that was cut off looks the same as swapped columns, so this is not an
          error. Exchange the names if most rows have this status.

    Raises:
        ValueError: If a column is missing, or holds neither text nor one of the lists above.
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
    answered = []
    for tagged, answer in map(_split, texts):
        if answer:
            answered.append((thoughts or tagged, answer))
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
    """(thinking, answer) of a response, either of them empty if missing.

    >>> _split("<think>\\nHm.\\n</think>\\n\\nYes.")
    ('Hm.', 'Yes.')
    """
    thoughts, closing, answer = text.rpartition("</think>")
    if "<think>" in answer:  # opened and never closed: the text was cut off in the thinking
        return _untagged(text), ""
    if closing or not answer.strip():
        answer = answer.strip()
    return _untagged(thoughts), answer  # an answer without tags is kept verbatim


def _untagged(text: str) -> str:
    return _TAG.sub("", text).strip()


def _instruction(row: dict[str, Any], column: str) -> list[dict[str, str]]:
    """The messages up to the last user turn; empty if that turn is missing or has no text."""
    value = row[column]
    if not isinstance(value, list):
        value = [{"role": "user", "content": _text(value, row, column)}]
    if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value):
        raise _wrong_type(value, row, column)
    messages = [{"role": turn["role"], "content": _text(turn.get("content"), row, column)} for turn in value]
    end = max((i for i, message in enumerate(messages, 1) if message["role"] == "user"), default=0)
    return messages[:end] if end and messages[end - 1]["content"].strip() else []


def _text(value: Any, row: dict[str, Any], column: str) -> str:
    """Text, with null as empty text."""
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
