"""UltraIF's rows (kkk-an/UltraIF-sft-175k and similar ones) to `prompt`, `constraints`, `completion`.

    dataset.map(ultraif_row, remove_columns=dataset.column_names, features=ultraif_features())

The columns of UltraIF's training data are `instruction`, `output` and `history`, a list of ShareGPT's `{"from", "value"}` turns.
Constraints were worked into the instruction and are not stored, so a row keeps one context. UltraIF gives the loss to `output` alone,
and so do rows of `prompt` and `completion` here. Data sets of this kind differ in their columns: see `ultraif_row`.
"""

from typing import TYPE_CHECKING, Any

from trl_miso.sources.sharegpt import sharegpt_row
from trl_miso.sources.tulu_persona import constraint_texts, split_last_turn, tulu_persona_features

if TYPE_CHECKING:
    from datasets import Features

_INSTRUCTIONS = ("instruction", "prompt", "query")
_RESPONSES = ("output", "response", "responses")
_CONSTRAINTS = ("constraints", "constraint")


def ultraif_row(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a row of instruction and response into a prompt and a completion, split where its constraints are sentences of it.

    Every row gets the same columns with the same types.

    Args:
        row: The instruction is text in `instruction`, `prompt` or `query`. The response is in `output`, `response` or `responses`,
            text or a list of which the first with text is taken. Optional are the earlier turns in `history`, and `constraints`
            or `constraint`, text or a list.

    Returns:
        The columns of `tulu_persona_row`. `miso_status` is `"no_constraints"` without such a column, as in UltraIF's own data;
        `"split"` or `"not_verbatim"` with it; or why `completion` is empty and the row will be dropped: `"no_user"`,
        `"no_assistant"` if the instruction or the response has no text, `"bad_history"` if the earlier turns are no conversation.

    Raises:
        ValueError: If the instruction or the response is missing, or a column has another type.
    """
    instruction, response = _column(row, _INSTRUCTIONS), _column(row, _RESPONSES)
    values = row[response] if isinstance(row[response], list) else [row[response]]
    answers = [text for text in (_text(row, response, value) for value in values) if text.strip()]
    asked = {"role": "user", "content": _text(row, instruction, row[instruction])}
    constraints = constraint_texts(row, next((name for name in _CONSTRAINTS if row.get(name)), _CONSTRAINTS[0]))
    if not asked["content"].strip() or not answers:
        return split_last_turn([], [], [], "no_assistant" if asked["content"].strip() else "no_user")

    history, answer = row.get("history") or [], {"role": "assistant", "content": answers[0]}
    if not isinstance(history, list):
        raise _wrong_type(row, "history", history)
    messages = sharegpt_row({"id": row.get("id"), "messages": [*history, asked, answer]})["messages"]
    if messages[-2:] != [asked, answer]:  # it ended before, at an answer to an empty request
        return split_last_turn([], [], [], "bad_history")
    return split_last_turn(messages[:-1], messages[-1:], constraints, "split")


def ultraif_features() -> "Features":
    """The types of `ultraif_row`'s columns, for `Dataset.map(features=...)`."""
    return tulu_persona_features()


def _column(row: dict[str, Any], names: tuple[str, ...]) -> str:
    """The first of these columns that the row has."""
    for name in names:
        if name in row:
            return name
    raise ValueError(
        f"UltraIF row {row.get('id')!r:.80}: got columns {list(row)!r:.300}; expected one of {', '.join(names)}. Fix: rename your "
        "column to one of these."
    )


def _text(row: dict[str, Any], column: str, value: Any) -> str:
    """Text, with null as empty text."""
    if not isinstance(value, str | None):
        raise _wrong_type(row, column, value)
    return value or ""


def _wrong_type(row: dict[str, Any], column: str, value: Any) -> ValueError:
    return ValueError(
        f"UltraIF row {row.get('id')!r:.80}: got {value!r:.300} in column {column!r}; expected text (a response may be a list of "
        "texts, the history is a list of turns). Fix: convert the column first."
    )
