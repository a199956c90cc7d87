"""Tulu's columns: names of constraint types keep one context, sentences of the prompt are split off."""

import json
from collections import Counter
from pathlib import Path

import pytest

from trl_miso.sources.tulu_persona import tulu_persona_row

LISTED = Path(__file__).parents[3] / "shared/data/muldimif/dev.jsonl"


def tulu(prompt, constraints, answer="Nile"):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"id": "personas_IF_7", "prompt": prompt, "messages": messages, "constraints": constraints}


def test_names_of_types_are_no_text_to_train_on():
    row = tulu(
        "Name three rivers near my farm. Use at most 20 words and no commas.",
        ["length constraints:number of words", "punctuation:no comma"],
    )
    assert tulu_persona_row(row) == {
        "prompt": row["messages"][:1],
        "constraints": [],
        "completion": row["messages"][1:],
        "full_prompt": row["messages"][:1],
        "miso_status": "not_verbatim",
    }


def test_sentences_of_the_prompt_are_split_off():
    row = tulu("Name a river. Use one word. Write in capitals!", ["Write in capitals!", "Use one word"])
    out = tulu_persona_row(row)
    assert out["miso_status"] == "split" and out["full_prompt"] == row["messages"][:1]
    assert out["prompt"] == [{"role": "user", "content": "Name a river."}] and out["constraints"] == row["constraints"]


@pytest.mark.parametrize(
    ("text", "sentences", "rest"),
    [
        ("Sing. Be brief.", ["Be brief."], "Sing."),
        ("Be brief. Sing.", ["Be brief"], "Sing."),
        ("Sing:\n1. Be brief\n2. Rhyme.\n\nThank you.", ["Rhyme.", "Be brief"], "Sing:\n\nThank you."),
        ("Sing.\n  - Be brief.\n  - Be brief and rhyme.", ["Be brief.", "Be brief and rhyme."], "Sing."),
        ("Sing. Is it (short)? Rhyme.", ["Is it (short)?"], "Sing. Rhyme."),
        ("Sing.", ["Rhyme."], None),
        ("Sing and be brief.", ["be brief."], None),  # a part of a sentence
        ("Sing. Be brief, but not too brief.", ["Be brief"], None),
        ("Sing. Be brief. Be brief.", ["Be brief."], None),  # which of them?
        ("Be brief.", ["Be brief."], None),
        ("Sing. Be brief.", ["Be brief.", "Rhyme."], None),  # all or none
        ("Sing.", ["."], None),
    ],
)
def test_sentences_are_whole_and_unique(text, sentences, rest):
    out = tulu_persona_row(tulu(text, sentences))
    assert out["miso_status"] == ("not_verbatim" if rest is None else "split")
    assert out["prompt"][-1]["content"] == (text if rest is None else rest)


def test_real_prompts_lose_their_constraints_and_nothing_else():
    if not LISTED.is_file():
        pytest.skip(f"needs {LISTED.name} of instructions with marked constraints beside the repository")
    statuses = Counter()
    for line in LISTED.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        out = tulu_persona_row(tulu(row["prompt"], row["constraints"]))
        statuses[out["miso_status"]] += 1
        if out["miso_status"] == "split":
            words = Counter(" ".join([out["prompt"][-1]["content"], *out["constraints"]]).replace(".", " ").split())
            lost = Counter(row["prompt"].replace(".", " ").split()) - words
            assert all(word.strip("*-)").isdigit() or not word.strip("*-)") for word in lost), (row["prompt"], lost)
    assert statuses["split"] > 100, statuses


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"constraints": []}, "no_constraints"),
        ({"constraints": None}, "no_constraints"),
        ({"constraints": [" "]}, "no_constraints"),
        ({"messages": []}, "empty"),
        ({"messages": [{"role": "user", "content": "Sing."}]}, "no_assistant"),
    ],
)
def test_rows_without_constraints_or_answer(change, status):
    out = tulu_persona_row(tulu("Sing. Rhyme.", ["Rhyme."]) | change)
    assert out["miso_status"] == status and out["constraints"] == []
    assert bool(out["completion"]) == (status == "no_constraints")


@pytest.mark.parametrize("constraints", [7, [7], [None], {"a": "b"}])
def test_wrong_types_are_named(constraints):
    with pytest.raises(ValueError, match=r"Row 'personas_IF_7': got .* in column 'constraints'; expected .*Fix:"):
        tulu_persona_row(tulu("Sing.", constraints))
    with pytest.raises(ValueError, match=r"got columns .*expected .*Fix:"):
        tulu_persona_row({"id": "a", "prompt": "Sing.", "constraints": []})
