"""Alpaca's rows (tatsu-lab/alpaca, yahma/alpaca-cleaned and similar ones) to `prompt`, `completion`.

    dataset.map(alpaca_row, remove_columns=dataset.column_names, features=alpaca_features())

The columns of tatsu-lab/alpaca are `instruction`, `input`, `output` and `text`, all three in one template. The input is what the
instruction speaks of, not a constraint: alone it asks for nothing, and the instruction alone cannot be answered. Both are one
context.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Features

_NO_INPUT = ("", "<noinput>", "<no input>")  # self-instruct's word for an empty input


def alpaca_row(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a row of instruction, input and output into a prompt and a completion.

    Every row gets the same columns with the same types.

    Args:
        row: `{"instruction": str, "input": str, "output": str}`; `input` may be null, empty or missing.

    Returns:
        - `prompt` (messages): one user turn with the instruction, then, if there is one, a blank line and the input;
        - `completion` (messages): the output as an assistant turn;
        - `miso_status`: `"plain"`, since the row has no constraints; or the reason why `completion` is empty and the row will be
          dropped, `"no_instruction"` or `"no_output"`.

    Raises:
        ValueError: If column `instruction` or `output` is missing, or one of the three is not text.
    """
    instruction, given, output = (_text(row, column) for column in ("instruction", "input", "output"))
    if not instruction.strip():
        return {"prompt": [], "completion": [], "miso_status": "no_instruction"}
    request = instruction if given.strip().lower() in _NO_INPUT else f"{instruction}\n\n{given}"
    prompt = [{"role": "user", "content": request}]
    if not output.strip():
        return {"prompt": prompt, "completion": [], "miso_status": "no_output"}
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": output}], "miso_status": "plain"}


def alpaca_features() -> "Features":
    """The types of `alpaca_row`'s columns, for `Dataset.map(features=...)`."""
    from datasets import Features, List, Value

    messages = List({"role": Value("string"), "content": Value("string")})
    return Features(prompt=messages, completion=messages, miso_status=Value("string"))


def _text(row: dict[str, Any], column: str) -> str:
    """The text of a column, with null as empty text; column `input` may be missing."""
    if column not in row and column != "input":
        raise ValueError(
            f"Alpaca row {row.get('id')!r:.80}: got columns {list(row)!r:.300}; expected `instruction`, `output` and perhaps "
            "`input`. Fix: rename your columns to these."
        )
    value = row.get(column)
    if not isinstance(value, str | None):
        raise ValueError(
            f"Alpaca row {row.get('id')!r:.80}: got {value!r:.300} in column {column!r}; expected text. Fix: convert the column "
            "first."
        )
    return value or ""
