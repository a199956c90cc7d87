"""Splitting instructions: nothing is invented, lost or rewritten, whatever the text; and what the rules find."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.decomposition import matched, score
from benchmarks.decomposition import rules as found_by_rules
from tests.support.models import tiny_model
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.cli.main import run
from trl_miso.decompose.rows import decompose_row, decomposed_features, split_text

DATA = Path(__file__).parents[3] / "shared" / "data"

# Instructions in the shapes of lists, prose and worked examples, and their constraints.
CASES = {
    "list": (
        "Name a river.\nThe output must follow the following rules:\n    1. Use at most five words.\n    2. End with a period.",
        "Name a river.",
        ["Use at most five words.", "End with a period."],
    ),
    "bullets": (
        "Describe the sea.\n\n- Use no more than 20 words\n- Do not use commas\n- Write in lowercase letters only",
        "Describe the sea.",
        ["Use no more than 20 words", "Do not use commas", "Write in lowercase letters only"],
    ),
    "prose": (
        "Name a river. The answer must include the keyword 'Nile', use capitalized letters for each word, and end with a period.",
        "Name a river.",
        ["The answer must include the keyword 'Nile'", "use capitalized letters for each word", "end with a period."],
    ),
    "clause of the request": (
        "Write a poem about rain, ensuring that each line has at most 6 words. Thank you.",
        "Write a poem about rain. Thank you.",
        ["ensuring that each line has at most 6 words."],
    ),
    "joining words": (
        "Who was Ada? When answering, ensure that the response has at most 9 words. Additionally, it must end with a question mark.",
        "Who was Ada?",
        ["ensure that the response has at most 9 words.", "it must end with a question mark."],
    ),
    "condition": (
        "List the moons. If a table is used, it must not exceed three rows.",
        "List the moons.",
        ["If a table is used, it must not exceed three rows."],
    ),
    "reason": (
        "Explain tides. The answer must contain at least 3 sentences, as this is a requirement.",
        "Explain tides.",
        ["The answer must contain at least 3 sentences"],
    ),
    "request that announces its constraints": (
        'Write a sentence that meets these rules:\n- It must contain the word "tea"\n- It must be a question',
        "Write a sentence that meets these rules:",
        ['It must contain the word "tea"', "It must be a question"],
    ),
    "condition behind a joint": (
        "List the moons. The answer must include a level 2 heading, and if a table is used, it must not exceed 3 rows.",
        "List the moons.",
        ["The answer must include a level 2 heading", "if a table is used, it must not exceed 3 rows."],
    ),
    "limit at the end of a request": (
        "Write a story of no more than 100 words. Thank you.",
        "Write a story. Thank you.",
        ["of no more than 100 words."],
    ),
    "limit at the end of a question": (
        "Can you write a poem about rain in all capital letters?",
        "Can you write a poem about rain?",
        ["in all capital letters"],
    ),
    "request behind an introduction": (
        "Given a term, explain it, using at most 20 words.",
        "Given a term, explain it.",
        ["using at most 20 words."],
    ),
    "IFEval's descriptions": (
        "Describe the sea. There should be 3 paragraphs. Paragraphs are separated with the markdown divider: ***\nFinish your response "
        "with this exact phrase Ask away. No other words should follow this phrase.",
        "Describe the sea.",
        [
            "There should be 3 paragraphs. Paragraphs are separated with the markdown divider: ***",
            "Finish your response with this exact phrase Ask away. No other words should follow this phrase.",
        ],
    ),
    "words about the requirements": (
        "Explain tides. The answer must contain at least 3 sentences. These requirements must be considered in your format.",
        "Explain tides.",
        ["The answer must contain at least 3 sentences."],
    ),
}
# Texts without a constraint on the answer: requests, list of things, quoted requirements, questions.
PLAIN = [
    "Name a river.",
    "Answer in at most 50 words.",
    "Write a letter that's at least 300 words.",
    "Describe the faction: 1. Its name 2. Its ruler 3. Its ruler's background",
    "Buy these:\n- two apples\n- a loaf of bread\n- milk",
    "Correct the grammar of this sentence: he go home.",
    "Which rules must a driver follow?",
    "Given a sentence, provide a synonym for every word.\n\nThe fox jumped.",
    "Using the data, write a sentence about a wind turbine.",
    'Define the word "facetious" and use it in a sentence.',
    'Find a word that starts with "q" and ends with "y".',
    "Continue the chat.\n+ How are you?\n- I don't know. I have to write a paragraph with at least 5 words.",
    'Write a question for it.\n\nAnswer: The title of the book must be "Emma". It should use no commas.',
    "",
]


def words(text: str) -> Counter:
    return Counter(re.findall(r"\w+", text))


def check_split(text: str) -> None:
    """Each constraint is its span; base, constraints and left-out words are the words of the text, each once."""
    split = split_text(text)
    for constraint in split.constraints:
        assert text[constraint.begin : constraint.end] == constraint.text
        assert re.search(r"\w", constraint.text)
    ends = [0, *(constraint.end for constraint in split.constraints)]
    assert all(end <= c.begin for end, c in zip(ends, split.constraints, strict=False))
    total = words(split.base)
    for part in (*split.texts, *split.left_out):
        total += words(part)
    assert total == words(text)
    assert split.constraints or split.base == text


@pytest.mark.parametrize(("text", "base", "constraints"), CASES.values(), ids=CASES)
def test_what_the_rules_find(text, base, constraints):
    split = split_text(text)
    assert (split.base, split.texts) == (base, constraints)
    check_split(text)
    examples = f"# Example 1:\n**Question**: {text}\n**Answer**: Nile, at most.\n\n**Question**: {text}\n**Answer**:"
    split = split_text(examples)
    assert split.texts == constraints and split.base.startswith(f"# Example 1:\n**Question**: {text}\n**Answer**: Nile")
    assert split.base.rstrip().endswith("**Answer**:")
    check_split(examples)


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_are_left_alone(text):
    assert split_text(text) == (text, [], [])


PARTS = [part for text, _, _ in CASES.values() for part in re.split(r"(?<=[,.:])", text)] + PLAIN
PARTS += [
    "\n",
    "\n\n",
    "  - ",
    "3. ",
    '"',
    "(",
    "'",
    "e.g. ",
    "Use exactly 3 words, and ",
    "\u201cmust\u201d ",
    "é ",
    "?! ",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=12))
def test_nothing_is_invented_lost_or_said_twice(parts):
    check_split("".join(parts))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_split_or_left_alone(text):
    check_split(text)


def row(text: str, **columns) -> dict:
    return {"prompt": text, "completion": "Nile."} | columns


def test_rows_of_each_format_give_the_same_columns():
    text, base, constraints = CASES["prose"]
    user, assistant = {"role": "user", "content": text}, {"role": "assistant", "content": "Nile."}
    expected = decompose_row(row(text))
    assert set(expected) == set(decomposed_features())
    assert expected["prompt"] == [{"role": "user", "content": base}] and expected["constraints"] == constraints
    assert expected["full_prompt"] == [user] and expected["completion"] == [assistant]
    assert [text[slice(*span)] for span in expected["constraint_spans"]] == constraints
    assert expected["miso_status"] == "split" and expected["train_turns"] == "last"
    assert decompose_row({"messages": [user, assistant]}) == expected
    assert decompose_row({"prompt": [user], "completion": [assistant]}) == expected
    assert (
        decompose_row({"prompt": [user], "full_prompt": [user], "constraints": [], "completion": [assistant]})
        == expected
    )
    earlier = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}, assistant]
    later = decompose_row({"messages": [*earlier, user, assistant]})
    assert later["prompt"] == [*earlier, *expected["prompt"]] and later["full_prompt"] == [*earlier, user]


@pytest.mark.parametrize(
    ("given_row", "status"),
    [
        (row("Name a river."), "no_constraints"),
        (row("- Use at most 3 words\n- End with a period"), "only_constraints"),
        ({"messages": [{"role": "user", "content": "Hi."}]}, "bad_messages"),
        ({"messages": []}, "bad_messages"),
        (row("Name a river. Use at most 3 words.", completion=" "), "bad_messages"),
    ],
)
def test_rows_that_are_not_split_say_why(given_row, status):
    columns = decompose_row(given_row)
    assert (
        columns["miso_status"] == status
        and columns["constraints"] == []
        and columns["prompt"] == columns["full_prompt"]
    )


@pytest.mark.parametrize(
    "given_row",
    [
        {"text": "a"},
        {"prompt": "a"},
        {"messages": [{"role": "user", "content": None}]},
        row("Name a river.", constraints=["Use one word."]),
        row("Name a river.", full_prompt="Name a river. Use one word."),
    ],
)
def test_other_rows_are_refused(given_row):
    with pytest.raises(ValueError, match=r"Got .*expected .*Fix"):
        decompose_row(given_row)


def test_the_command_writes_rows_that_train_as_para(
    tmp_path, monkeypatch, capsys, tokenizer, make_config, wide_terminal
):
    monkeypatch.chdir(tmp_path)
    texts = [text for text, _, _ in CASES.values()] + ["Name a river.", "Name a lake."]
    Path("rows.jsonl").write_text("".join(json.dumps(row(text)) + "\n" for text in texts))
    run("decompose", ["rows.jsonl", "out.jsonl", "--preview", "-n", "3"])
    said = capsys.readouterr().out
    assert "14 of 16 rows were split, into 23 constraints." in said and "not split: 2 no_constraints" in said
    assert "row 2: split" in said and "row 3" not in said and "Wrote out.jsonl" in said
    run("decompose", ["rows.jsonl", "out.parquet"])
    rows = load_dataset("json", data_files="out.jsonl", split="train", features=decomposed_features())
    assert rows[:] == load_dataset("parquet", data_files="out.parquet", split="train")[:]
    trainer = MISOSFTTrainer(
        tiny_model("llama"), make_config(MISOSFTConfig), train_dataset=rows, processing_class=tokenizer
    )
    assert trainer.training_mode == "para"
    trainer.train()
    with pytest.raises(SystemExit, match="expected a file .jsonl or .parquet"):
        run("decompose", ["rows.jsonl", "out.txt"])


def test_pairs_are_one_to_one():
    assert matched(["a b c d", "a b c d"], ["a b c d"]) == 1
    assert matched(["a b c d", "e f g h"], ["e f g h", "a b c x"]) == 1
    rows = [{"prompt": "", "constraints": ["a b", "c d"]}]
    assert score(rows, lambda _: ["a b", "c d"]) == [1, 1, 1]
    assert score(rows, lambda _: ["a b"]) == [0.5, 1, 0]


@pytest.mark.skipif(not (DATA / "muldimif").exists(), reason="shared/data/muldimif is not here")
def test_real_instructions():
    """Instructions with marked constraints: the figures do not fall; and no word of any real prompt is lost or invented."""
    rows = [json.loads(line) for line in (DATA / "muldimif" / "dev.jsonl").read_text().splitlines()]
    recall, precision, exact = score(rows, found_by_rules)
    assert recall >= 0.86 and precision >= 0.83 and exact >= 0.63
    prompts = [
        json.loads(line)["prompt"] for line in (DATA / "real_prompts" / "prompts.jsonl").read_text().splitlines()
    ]
    for text in [row["prompt"] for row in rows] + prompts:
        check_split(text)
