"""Conifer's conversations (ConiferLM/Conifer) to `messages`.

    dataset.map(conifer_row, remove_columns=dataset.column_names, features=conifer_features())

The columns of ConiferLM/Conifer are `prompt` (the first request), `messages` (one to five exchanges) and `type`. In "Easy-to-Hard"
conversations every request repeats the question with one more constraint. In "Process Feedback" conversations the second request
says what is wrong with the first answer. The constraints are prose within a request, so a request is one context.
"""

from typing import TYPE_CHECKING, Any

from trl_miso.sources.sharegpt import sharegpt_features, sharegpt_row

if TYPE_CHECKING:
    from datasets import Features


def conifer_row(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a Conifer row into messages that end in an answer, and say whose answers are trained.

    Every row gets the same columns with the same types.

    Args:
        row: `{"prompt": str, "messages": [{"role", "content"}], "type": str}`; only `messages` has to be there.

    Returns:
        - `messages` and `miso_status`: as of `sharegpt_row`, with `"plain"` for `"split"`, since no constraints are separated;
        - `train_turns` (str): `"all"`, or `"last"` for process feedback, whose first answer is the one that is corrected.

    Raises:
        ValueError: If column `messages` is missing or not a list of messages.
    """
    columns = sharegpt_row({"id": row.get("id")} | {"messages": row["messages"]} if "messages" in row else row)
    if columns["miso_status"] == "split":
        columns["miso_status"] = "plain"
    return columns | {"train_turns": "last" if "feedback" in str(row.get("type")).lower() else "all"}


def conifer_features() -> "Features":
    """The types of `conifer_row`'s columns, for `Dataset.map(features=...)`."""
    from datasets import Features, Value

    return Features(sharegpt_features() | {"train_turns": Value("string")})
