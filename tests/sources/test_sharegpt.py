"""ShareGPT conversations: speakers, turns that are removed, statuses of unusable rows."""

import pytest

from trl_miso.sources.sharegpt import sharegpt_row


def conversation(*turns):
    return {"id": "Qa7_0", "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def messages(*turns):
    return [{"role": role, "content": text} for role, text in turns]


HI = messages(("user", "Hi"), ("assistant", "Hello"))


@pytest.mark.parametrize("user", ["human", "user", "Human", "USER"])
@pytest.mark.parametrize("assistant", ["gpt", "chatgpt", "bing", "bard", "assistant", "ChatGPT", "GPT "])
def test_speakers_become_roles(user, assistant):
    out = sharegpt_row(conversation(("System", "Be brief."), (user, "Hi"), (assistant, "Hello")))
    assert out == {"messages": messages(("system", "Be brief.")) + HI, "miso_status": "split"}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        # cut within a conversation: an answer without its request
        ([("gpt", "and so on."), ("human", "Hi"), ("gpt", "Hello")], HI),
        (
            [("system", "Be brief."), ("gpt", "..."), ("human", "Hi"), ("gpt", "Hello")],
            messages(("system", "Be brief.")) + HI,
        ),
        # turns after the last answer
        ([("human", "Hi"), ("gpt", "Hello"), ("human", "So?"), ("system", "End.")], HI),
        ([("human", "Hi"), ("gpt", "Hello"), ("human", "So?"), ("gpt", "")], HI),
        # turns without text
        ([("human", "Hi"), ("gpt", " \n"), ("gpt", None), ("tool", ""), ("gpt", "Hello")], HI),
        # two answers that a turn without text leaves in a row: the conversation ends before the second one
        ([("human", "Hi"), ("gpt", "Hello"), ("human", " "), ("gpt", "So."), ("human", "Hi"), ("gpt", "a")], HI),
        ([("human", "Hi"), ("gpt", "Hello"), ("gpt", ""), ("human", None), ("gpt", "So."), ("tool", "{}")], HI),
        ([("gpt", "a"), ("human", ""), ("gpt", "b"), ("human", "Hi"), ("gpt", "Hello")], HI),  # removed in any case
        (
            [("human", "Hi"), ("gpt", ""), ("human", "Hi"), ("gpt", "Hello")],  # two requests and their answer
            messages(("user", "Hi")) + HI,
        ),
        # the other turns are verbatim and not merged
        (
            [("human", " Hi\n"), ("human", "Hi"), ("gpt", "a"), ("gpt", "b")],
            messages(("user", " Hi\n"), ("user", "Hi"), ("assistant", "a"), ("assistant", "b")),
        ),
    ],
)
def test_turns_that_are_removed(turns, expected):
    assert sharegpt_row(conversation(*turns)) == {"messages": expected, "miso_status": "split"}


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"id": "1", "conversations": None}, "empty"),
        ({"id": "1", "conversations": []}, "empty"),
        ({"conversations": None, "messages": None}, "empty"),
        (conversation(("human", ""), ("gpt", None)), "empty"),
        (conversation(("human", "Hi")), "no_assistant"),
        (conversation(("human", "Hi"), ("gpt", "")), "no_assistant"),
        (conversation(("gpt", "Hello")), "no_user"),
        (conversation(("system", "Be brief."), ("gpt", "Hello"), ("human", "So?")), "no_user"),
        (conversation(("human", "Hi"), ("tool", "{}"), ("gpt", "Hello")), "unknown_role 'tool'"),
        (conversation(("", "Hi"), ("gpt", "Hello")), "unknown_role ''"),
    ],
)
def test_conversations_that_cannot_be_used(row, status):
    assert sharegpt_row(row) == {"messages": [], "miso_status": status}


def test_rows_of_messages_and_rows_that_arrow_gave_the_keys_of_both():
    assert sharegpt_row({"messages": HI}) == {"messages": HI, "miso_status": "split"}
    assert sharegpt_row({"messages": HI, "conversations": None})["messages"] == HI
    mixed = [{"from": None, "value": None, **HI[0]}, {"from": "gpt", "value": "Hello", "role": None, "content": None}]
    assert sharegpt_row({"conversations": mixed})["messages"] == HI
    assert sharegpt_row({"messages": [turn | {"tool_calls": None} for turn in HI]})["messages"] == HI


@pytest.mark.parametrize(
    "turns",
    [
        "Hi",
        7,
        {"from": "human", "value": "Hi"},
        ["Hi"],
        [None],
        [{"from": "human", "value": 7}],
        [{"from": "human", "value": ["Hi"]}],
        [{"from": 7, "value": "Hi"}],
        [{"value": "Hi"}],
    ],
)
def test_wrong_types_are_named(turns):
    for column in ("conversations", "messages"):
        with pytest.raises(ValueError, match=rf"ShareGPT row 'Qa7': got .* in column '{column}'; expected .*Fix:"):
            sharegpt_row({"id": "Qa7", column: turns})


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match=r"got columns \['id', 'text'\]; expected `conversations` or `messages`.*Fix:"):
        sharegpt_row({"id": "1", "text": "Hi"})
