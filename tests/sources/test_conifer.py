"""Conifer's conversations, and whose answers of them are trained."""

import pytest

from trl_miso.sources.conifer import conifer_row

TURNS = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Nile."},
    {"role": "user", "content": "Name a river in one word."},
    {"role": "assistant", "content": "Nile"},
]


@pytest.mark.parametrize(
    ("kind", "turns"), [("Easy-to-Hard", "all"), ("easy_to_hard", "all"), (None, "all"), ("Process Feedback", "last")]
)
def test_every_answer_is_trained_unless_it_is_corrected(kind, turns):
    row = {"prompt": "Name a river.", "messages": TURNS, "type": kind}
    assert conifer_row(row) == {"messages": TURNS, "miso_status": "plain", "train_turns": turns}


def test_conversations_that_cannot_be_used():
    assert conifer_row({"messages": TURNS[:1], "type": "Easy-to-Hard"})["miso_status"] == "no_assistant"
    assert conifer_row({"messages": None}) == {"messages": [], "miso_status": "empty", "train_turns": "all"}
    with pytest.raises(ValueError, match=r"got columns \['prompt'\]; expected .*Fix:"):
        conifer_row({"prompt": "Hi"})
    with pytest.raises(ValueError, match=r"row 'c7': got 'Hi' in column 'messages'; expected .*Fix:"):
        conifer_row({"id": "c7", "messages": "Hi"})
