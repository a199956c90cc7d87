"""Alpaca's instruction and input are one request."""

import pytest

from trl_miso.sources.alpaca import alpaca_row

ROW = {"instruction": "Name the longest one.", "input": "Nile, Rhine", "output": " Nile", "text": "Below is ..."}


@pytest.mark.parametrize(
    ("given", "request_text"),
    [
        ("Nile, Rhine", "Name the longest one.\n\nNile, Rhine"),
        ("", "Name the longest one."),
        (None, "Name the longest one."),
        (" \n", "Name the longest one."),
        ("<noinput>", "Name the longest one."),
    ],
)
def test_instruction_and_input_are_one_request(given, request_text):
    assert alpaca_row(ROW | {"input": given}) == {
        "prompt": [{"role": "user", "content": request_text}],
        "completion": [{"role": "assistant", "content": " Nile"}],
        "miso_status": "plain",
    }


@pytest.mark.parametrize(
    ("change", "status"),
    [({"instruction": ""}, "no_instruction"), ({"output": " "}, "no_output"), ({"output": None}, "no_output")],
)
def test_rows_that_cannot_be_used(change, status):
    out = alpaca_row(ROW | change)
    assert out["miso_status"] == status and out["completion"] == []


def test_wrong_columns_are_named():
    assert alpaca_row({"instruction": "Sing.", "output": "La"})["miso_status"] == "plain"
    with pytest.raises(ValueError, match=r"got columns \['instruction'\]; expected .*Fix:"):
        alpaca_row({"instruction": "Sing."})
    with pytest.raises(ValueError, match=r"got 7 in column 'input'; expected text\. Fix:"):
        alpaca_row(ROW | {"input": 7})
