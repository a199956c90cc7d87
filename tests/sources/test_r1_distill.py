"""Which columns and tags hold the instruction, the thinking and the answer."""

import pytest

from trl_miso.sources.r1_distill import r1_distill_row


def user(text):
    return {"role": "user", "content": text}


def result(prompt, answer, status="split"):
    completion = [{"role": "assistant", "content": answer}] if answer is not None else []
    return {
        "prompt": [user(prompt)] if isinstance(prompt, str) else prompt,
        "completion": completion,
        "miso_status": status,
    }


def columns(thinking, response, instruction="Q?"):
    return {"input": instruction, "reasoning_content": thinking, "content": response}


def tagged(response):
    return r1_distill_row({"input": "Q?", "content": response}, thinking=None)


@pytest.mark.parametrize(
    "thinking", ["Hm.", "<think>Hm.</think>", "<think>\nHm.\n</think>\n", "\nHm.</think>", "<think>Hm."]
)
@pytest.mark.parametrize("response", ["A.", "<think>Other.</think>\n\nA.", "</think>A."])
def test_columns(thinking, response):
    assert r1_distill_row(columns(thinking, response)) == result("Q?\n\nHm.", "A.")
    renamed = {"a": "Q?", "b": thinking, "c": response, "id": 7}
    assert r1_distill_row(renamed, "a", "b", "c") == result("Q?\n\nHm.", "A.")


def test_texts_in_separate_columns_are_kept_verbatim():
    assert r1_distill_row(columns("Hm.", " A.\n", " Q?\n")) == result(" Q?\n\n\nHm.", " A.\n")


@pytest.mark.parametrize(
    "response",
    [
        "<think>Hm.</think>A.",
        "<think>\nHm.\n</think>\n\nA.\n",
        "Hm.</think>A.",
        "<think>Hm.",
        "<think><think>Hm.</think></think>A.",
    ],
)
def test_thinking_inside_the_response(response):
    expected = result("Q?\n\nHm.", "A.") if "</think>" in response else result("Q?", None, "no_response")
    assert tagged(response) == expected
    for empty in (None, "", " ", "<think>\n</think>"):
        assert r1_distill_row(columns(empty, response)) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think>\n<think>b</think>A.", result("Q?\n\na\nb", "A.")),
        (
            "<think>a</think>draft<think>b</think>A.",
            result("Q?\n\nadraftb", "A."),
        ),  # interleaved: the last part is the answer
        ("<think>close with </think> at the end</think>A.", result("Q?\n\nclose with  at the end", "A.")),
        ("<think>a</think>A. <think>more", result("Q?", None, "no_response")),
        ("<think>a</think> \n", result("Q?", None, "no_response")),
        ("<think>", result("Q?", None, "no_response")),
        ("", result("Q?", None, "no_response")),
        (" \n", result("Q?", None, "no_response")),
        (None, result("Q?", None, "no_response")),
        (" A.\n", result("Q?", " A.\n", "no_thinking")),
        ("<think>\n\n</think>\n\nA.", result("Q?", "A.", "no_thinking")),
        ("</think>A.", result("Q?", "A.", "no_thinking")),
    ],
)
def test_tags(response, expected):
    assert tagged(response) == expected


@pytest.mark.parametrize(
    ("generations", "expected"),
    [
        (["<think>a</think>A.", "<think>b</think>B."], result("Q?\n\na", "A.")),
        (["<think>a", None, "C.", "<think>b</think>B."], result("Q?\n\nb", "B.")),
        (["<think>a", "C.", "<think></think>D."], result("Q?", "C.", "no_thinking")),
        (["<think>a", "", None], result("Q?", None, "no_response")),
        ([], result("Q?", None, "no_response")),
    ],
)
def test_the_first_generation_with_thinking_and_an_answer(generations, expected):
    assert tagged(generations) == expected
    row = {"problem": "Q?", "generations": generations, "messages": None}
    assert r1_distill_row(row, instruction="problem", thinking=None, response="generations") == expected


def test_generations_beside_a_thinking_column():
    assert r1_distill_row(columns("Hm.", ["<think>cut", "A."])) == result("Q?\n\nHm.", "A.")


@pytest.mark.parametrize(
    "row",
    [
        columns("<think>Hm.</think>A.", "A."),
        columns("Hm.</think>\n\nA.", None),
        columns("<think></think>A.", "Hm."),
        columns("A.", "<think>Hm."),
        columns("A.", "<think>Hm.</think>"),
        columns("A.", "Hm.</think>\n"),
        columns("A.", ["<think>Hm.", ""]),
    ],
)
def test_columns_that_look_swapped(row):
    out = r1_distill_row(row)
    names = "thinking='content', response='reasoning_content'"
    status = f"swapped columns? where 'reasoning_content' is the answer, give {names}"
    assert out == result("Q?", None, status)


def test_instructions_of_messages():
    system, first, answer = {"role": "system", "content": "Be."}, user("Q1?"), {"role": "assistant", "content": "A1."}
    for after in ([], [{"role": "assistant", "content": "old"}], [{"role": "assistant", "content": None}]):
        out = r1_distill_row(columns("Hm.", "A.", [system, first, answer, user("Q?") | {"tool_calls": None}, *after]))
        assert out == result([system, first, answer, user("Q?\n\nHm.")], "A.")
    out = r1_distill_row(columns(None, "A.", [system, user("Q?")]))
    assert out == result([system, user("Q?")], "A.", "no_thinking")


@pytest.mark.parametrize(
    "instruction", [None, "", " \n", [], [{"role": "system", "content": "Be."}], [user(" ")], [user(None)]]
)
def test_rows_without_an_instruction(instruction):
    assert r1_distill_row(columns("Hm.", "A.", instruction)) == result([], None, "no_instruction")


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (columns("Hm.", "A.", 7), "input"),
        (columns("Hm.", "A.", ["Q?"]), "input"),
        (columns("Hm.", "A.", [{"role": None, "content": "Q?"}]), "input"),
        (columns("Hm.", "A.", [user(["Q?"])]), "input"),
        (columns("Hm.", "A.", [{"from": "human", "value": "Q?"}]), "input"),
        (columns(7, "A."), "reasoning_content"),
        (columns(["Hm."], "A."), "reasoning_content"),
        (columns("Hm.", b"A."), "content"),
        (columns("Hm.", {"role": "assistant"}), "content"),
        (columns("Hm.", [["A."]]), "content"),
    ],
)
def test_wrong_types_are_named(row, column):
    with pytest.raises(ValueError, match=rf"R1 row 'r7': got .* in column '{column}'; expected .*Fix:"):
        r1_distill_row({"id": "r7"} | row)


def test_missing_columns_are_named():
    row = {"problem": "Q?", "generations": []}
    with pytest.raises(
        ValueError, match=r"got columns \['problem', 'generations'\]; expected \['input', 'reasoning_.*Fix:"
    ):
        r1_distill_row(row)
    with pytest.raises(ValueError, match=r"expected \['reasoning_content'\] too.*thinking=None where"):
        r1_distill_row(row, instruction="problem", response="generations")
