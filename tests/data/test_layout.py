"""Tokenized answers to one example."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_miso.data.layout import Layout
from trl_miso.data.options import DataOptions
from trl_miso.data.tokenization import Tokenized

# (tokens before an answer, its tokens): few values, so that an answer's own tokens look like the end of its turn.
TURNS = st.lists(
    st.tuples(st.lists(st.integers(1, 3), min_size=2, max_size=5), st.lists(st.integers(1, 3), min_size=1, max_size=5)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("mode", ["single", "succ"])
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(turns=TURNS, seed=st.integers(0, 99), data=st.data())
def test_answers_that_later_turns_repeat_are_trained_whole(mode, turns, seed, data):
    """Wherever a chunk of a later input ends, and whichever token is taken for the end of the turn."""
    answers, history = [], []
    for before, answer in turns:
        context = [*history, *before[:-1]]
        output, labels = [before[-1], *answer], [-100, *answer]
        turn = data.draw(st.integers(1, len(output)))
        answers.append(Tokenized([context], output, labels, turn))
        history = context + output
    layout = Layout(DataOptions(seed=seed, chunk_probs=(0.4, 0.2, 0.2, 0.2)))
    columns = layout(answers, mode, [None] * len(answers))
    trained = [label for label in columns["labels"] if label != -100]
    assert sorted(trained) == sorted(token for _, answer in turns for token in answer)


@pytest.mark.parametrize("added", range(3))
@pytest.mark.parametrize("mode", ["single", "succ"])
def test_what_a_template_adds_after_the_last_turn_is_not_trained_in_earlier_ones(mode, added):
    """The later turn then shares the tokens of the earlier answer, up to the end of its turn."""
    end, extra = 9, [8] * added
    first = Tokenized([[1]], [2, 3, end, *extra], [-100, 3, end, *extra], turn=3)
    second = Tokenized([[1, 2, 3, end, 4]], [5, 6, end, *extra], [-100, 6, end, *extra], turn=3)
    layout = Layout(DataOptions(chunk_probs=(1.0,)))
    columns = layout([first, second], mode, [None, None])
    run = [1, 2, 3, end, 4, 5, 6, end, *extra]
    assert columns["input_ids"] == run
    assert columns["labels"] == [-100, -100, 3, end, -100, -100, 6, end, *extra]
