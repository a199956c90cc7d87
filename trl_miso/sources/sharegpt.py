"""ShareGPT conversations to `messages`, with the roles and keys of chat templates.

    dataset.map(sharegpt_row, remove_columns=dataset.column_names, features=sharegpt_features())

TRL itself renames the keys of `conversations` but not its roles, and fails on an empty conversation.
"""

from typing import TYPE_CHECKING, Any

from trl_miso.data.schema import ROLES

if TYPE_CHECKING:
    from datasets import Features

_KNOWN = {"system", "user", "assistant"}


def sharegpt_row(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a ShareGPT row into messages that end in an answer.

    Every row gets the same columns with the same types.

    Args:
        row: `{"id", "conversations": [{"from", "value"}]}`, or `{"messages": [{"role", "content"}]}`. Speakers are human, user,
            gpt, chatgpt, bing, bard, assistant and system, in upper or lower case.

    Returns:
        - `messages`: `{"role", "content"}` turns that end in an answer; every answer of them is trained. Turns without text, turns
          after the last answer, and answers before the first request (left by a cut in a longer conversation) are removed.
          Nothing is merged. Two answers without a request between them because its turn was empty are a conversation that
          nobody had: it ends before the second one;
        - `miso_status`: `"split"`, also if turns were removed, or the reason why `messages` is empty. `"empty"`: no turn with
          text; `"no_user"`: no request before an answer; `"no_assistant"`: no answer; `"unknown_role ..."`: a speaker of
          another name.

    Raises:
        ValueError: If both columns are missing, or the turns are not a list of dicts with a text speaker and text.
    """
    if "conversations" not in row and "messages" not in row:
        raise ValueError(
            f"ShareGPT row {row.get('id')!r:.80}: got columns {list(row)!r:.300}; expected `conversations` or `messages`. "
            "Fix: rename the column of turns to one of these."
        )
    column = "conversations" if row.get("messages") is None else "messages"
    messages = _without_empty_turns(_turns(row, column))
    if unknown := [message["role"] for message in messages if message["role"] not in _KNOWN]:
        return {"messages": [], "miso_status": f"unknown_role {unknown[0]!r:.40}"}

    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return {"messages": [], "miso_status": "no_assistant" if messages else "empty"}
    end = len(roles) - roles[::-1].index("assistant")
    if "user" not in roles[:end]:
        return {"messages": [], "miso_status": "no_user"}
    start = roles.index("user")
    kept = [message for i, message in enumerate(messages[:end]) if i >= start or message["role"] == "system"]
    return {"messages": kept, "miso_status": "split"}


def sharegpt_features() -> "Features":
    """The types of `sharegpt_row`'s columns, for `Dataset.map(features=...)`."""
    from datasets import Features, List, Value

    return Features(messages=List({"role": Value("string"), "content": Value("string")}), miso_status=Value("string"))


def _without_empty_turns(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns with text, up to an answer that followed a removed turn and would follow another answer now."""
    kept: list[dict[str, str]] = []
    asked = removed = False
    for turn in turns:
        if not turn["content"].strip():
            removed = True
            continue
        if asked and removed and turn["role"] == kept[-1]["role"] == "assistant":
            break
        asked, removed = asked or turn["role"] == "user", False
        kept.append(turn)
    return kept


def _turns(row: dict[str, Any], column: str) -> list[dict[str, str]]:
    """The turns with TRL's keys and roles, and with null as empty text."""
    turns = row.get(column)
    if not isinstance(turns, list | None) or not all(isinstance(turn, dict) for turn in turns or []):
        raise _wrong_type(row, column, turns)
    messages = []
    for turn in turns or []:
        # Arrow gives turns of both kinds in one column the keys of both, with nulls.
        speaker, text = ("role", "content") if turn.get("from") is None else ("from", "value")
        role, content = turn.get(speaker), turn.get(text)
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise _wrong_type(row, column, turn)
        role = role.strip().lower()
        messages.append({"role": ROLES.get(role, role), "content": content or ""})
    return messages


def _wrong_type(row: dict[str, Any], column: str, value: Any) -> ValueError:
    return ValueError(
        f"ShareGPT row {row.get('id')!r:.80}: got {value!r:.300} in column {column!r}; expected a list of turns, each with a "
        "text `from` and `value` (or `role` and `content`). Fix: convert the column first."
    )
