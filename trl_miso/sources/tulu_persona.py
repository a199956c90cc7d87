"""Tulu 3's persona instructions (allenai/tulu-3-sft-personas-instruction-following) to `prompt`, `constraints`, `completion`.

    dataset.map(tulu_persona_row, remove_columns=dataset.column_names, features=tulu_persona_features())

The columns of that data set are `id`, `prompt` (str), `messages` (the prompt and its answer) and `constraints` (list of str). The
constraints are types of IFEval, such as "length constraints:number of words", and not text of the prompt. Nothing can be learned
from a type's name, so such rows keep one context. Data sets with these columns whose constraints are sentences of the prompt are
split.
"""

from typing import TYPE_CHECKING, Any

from trl_miso.data.constraints import split_text
from trl_miso.sources.sharegpt import sharegpt_row

if TYPE_CHECKING:
    from datasets import Features


def tulu_persona_row(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a row of Tulu's columns into a prompt, its constraints and the answer.

    Every row gets the same columns with the same types.

    Args:
        row: `{"messages": [{"role", "content"}], "constraints": list of str}`; other columns are not read.

    Returns:
        - `prompt` (messages): everything before the last answer; if the row was split, without the constraints;
        - `constraints` (list of str): the constraints, if all are sentences of the last user turn; otherwise empty;
        - `completion` (messages): the last answer;
        - `full_prompt` (messages): everything before the answer, verbatim;
        - `miso_status`: `"split"`; `"no_constraints"`; `"not_verbatim"` if a constraint is not a sentence of the prompt, as names of
          types are not; or as of `sharegpt_row`, why the row will be dropped.

    Raises:
        ValueError: If column `messages` is missing or not a list of messages, or `constraints` is not a list of str.
    """
    cleaned = sharegpt_row({"id": row.get("id")} | {"messages": row["messages"]} if "messages" in row else row)
    messages = cleaned["messages"]
    return split_last_turn(messages[:-1], messages[-1:], constraint_texts(row, "constraints"), cleaned["miso_status"])


def tulu_persona_features() -> "Features":
    """The types of `tulu_persona_row`'s columns, for `Dataset.map(features=...)`."""
    from datasets import Features, List, Value

    messages, text = List({"role": Value("string"), "content": Value("string")}), Value("string")
    return Features(
        prompt=messages, constraints=List(text), completion=messages, full_prompt=messages, miso_status=text
    )


def split_last_turn(
    prompt: list[dict[str, str]], completion: list[dict[str, str]], constraints: list[str], status: str
) -> dict[str, Any]:
    """The columns of a row: split if it can be, unchanged if `status` is not `"split"`."""
    columns: dict[str, Any] = {"prompt": prompt, "constraints": [], "completion": completion, "full_prompt": prompt}
    if status == "split" and not constraints:
        status = "no_constraints"
    if status == "split":
        split = split_text(prompt[-1]["content"], constraints)
        if split.missing or split.obstacle or prompt[-1]["role"] != "user":
            status = "not_verbatim"
        else:
            columns |= {"prompt": [*prompt[:-1], {"role": "user", "content": split.bare}], "constraints": constraints}
    return columns | {"miso_status": status}


def constraint_texts(row: dict[str, Any], column: str) -> list[str]:
    """A row's constraints without blank ones; none if the column is null or missing."""
    values = row.get(column) or []
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(
            f"Row {row.get('id')!r:.80}: got {values!r:.300} in column {column!r}; expected a list of texts. Fix: convert the "
            "column first."
        )
    return [value.strip() for value in values if value.strip()]
