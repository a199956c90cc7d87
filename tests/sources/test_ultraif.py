"""UltraIF's instruction, output and history, and the columns of similar data sets."""

import pytest

from trl_miso.sources.ultraif import ultraif_row


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def turn(speaker, text):
    return {"from": speaker, "value": text}


def test_the_history_comes_before_the_request():
    history = [turn("human", "Name a lake."), turn("gpt", "Como")]
    out = ultraif_row({"instruction": "Name a river in capitals.", "output": "NILE", "history": history})
    prompt = [user("Name a lake."), assistant("Como"), user("Name a river in capitals.")]
    columns = {"prompt": prompt, "full_prompt": prompt, "constraints": [], "completion": [assistant("NILE")]}
    assert out == columns | {"miso_status": "no_constraints"}


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"instruction": "Sing. Rhyme.", "response": "La", "constraints": ["Rhyme."]}, "split"),
        ({"prompt": "Sing. Rhyme.", "responses": ["", "La", "Lo"], "constraint": "Rhyme."}, "split"),
        ({"query": "Sing. Rhyme.", "response": "La", "constraints": None, "constraint": ["Rhyme"]}, "split"),
        ({"query": "Sing. Rhyme.", "response": "La", "constraints": ["It should rhyme."]}, "not_verbatim"),
        ({"query": "Sing. Rhyme.", "response": "La", "history": None}, "no_constraints"),
    ],
)
def test_columns_of_similar_data_sets(row, status):
    out = ultraif_row(row)
    assert out["miso_status"] == status
    assert out["completion"] == [assistant("La")] and out["full_prompt"] == [user("Sing. Rhyme.")]
    assert out["prompt"] == ([user("Sing.")] if status == "split" else out["full_prompt"])


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"instruction": " "}, "no_user"),
        ({"instruction": None}, "no_user"),
        ({"output": ""}, "no_assistant"),
        ({"output": []}, "no_assistant"),
        ({"history": [turn("human", "Hi"), turn("gpt", "a"), turn("human", ""), turn("gpt", "b")]}, "bad_history"),
        ({"history": [turn("human", "Hi"), turn("tool", "{}")]}, "bad_history"),
    ],
)
def test_rows_that_cannot_be_used_train_no_earlier_answer(change, status):
    row = {"instruction": "Sing.", "output": "La", "history": [turn("human", "Hi"), turn("gpt", "Hello")]}
    out = ultraif_row(row | change)
    assert out["miso_status"] == status and out["completion"] == out["prompt"] == out["full_prompt"] == []


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Sing."},
        {"output": "La"},
        {"instruction": 7, "output": "La"},
        {"instruction": "Sing.", "output": 7},
        {"instruction": "Sing.", "output": [None, 7]},
        {"instruction": "Sing.", "output": "La", "history": [["Hi", "Hello"]]},
        {"instruction": "Sing.", "output": "La", "history": "Hi"},
        {"instruction": "Sing.", "output": "La", "constraints": [7]},
    ],
)
def test_wrong_columns_are_named(row):
    with pytest.raises(ValueError, match=r"got .*expected .*Fix:"):
        ultraif_row(row)
