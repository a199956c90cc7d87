"""Crab's user turns are split into base instruction and constraints, on rows in the layouts of Crab's two public generators."""

import copy
import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from trl_miso.sources.crab import crab_row, read_constraints
from trl_miso.sources.synthetic import synthetic_rows

REAL = Path(__file__).parents[3] / "shared/data/multi_constraint/rows.jsonl"

REQUESTS = (
    "Name the tributaries of the Ganges",
    "1. What is a river?\n2. What is a lake?\nAnswer both.",
    "What follows from this?\r\n\r\nAll boats float. This is a boat.",
    "Write a python function that adds two numbers.\n\n```python\ndef add(a, b):\n    ...\n```",
    "Translate the text below.\n\n\nGuten Tag. Wie geht es?\n\nDanke!",
    "\n\nYou are an assistant.\n\nQ: is this sentence positive?\nA:",
    "Summarise: # Title\nA line of text.\nAnother line.\n\nThird: the following is a list.",
)
PASSAGES = (
    "The fox crossed the river and the farm. " * 20,
    "Passage one.\n\n" + "A barn stood on the hill. " * 20 + "\n\n- Who stood?\n- Where?",
    "**Fruit**\n\n1. Apples keep.\n2. Pears do not.\n\n**Roots**\n\n* Turnips.\n* Beets. \n",
)
CLAUSES = (
    "The response should start with a greeting.",
    "Use exactly three sentences!",
    "Should the tone be formal?",
    "List each item with a number, followed by a colon (:)",
    "Mention the words 'river', 'lake'",
    'End with the phrase "that is all"',
    "Use 2-3 adjectives - no more - per sentence.",
    "Write in Spanish; keep to one paragraph.",
    "The first sentence should be 'Aquí están las mejores tarjetas:'",
    "Formal and informative, with a focus on comparisons.",
    "Confine word counts to 80 per sentence.",
    "Wrap the title in double angular brackets, such as <<poem of joy>>.",
)

# Crab's framings, with openings and closings shortened and labels verbatim. A framed list is indented by four spaces.
MET = "\n\nWhen answering, please ensure that the following constraints are also met."
FRAMED = [
    "Please do as told.\n\nInstructions: {base}\n\nAdditional Constraints: {list}",
    "Please read with care.\n\nInstructions: {base}\n\nAdditional Restrictions: {list}",
    "Please do so.\n\n- **Instructions**: {base}\n- **Additional Constraints**: {list}\n\nThis is essential.",
    "Adhere to:\n1. **Instructions**: {base}\n2. **Additional Constraints**: {list}\n\nIt's important.",
    "We invite you.\n\n- **Instructions**: {base}\n- **Additional Constraints**: {list}\n\nThank you!",
    "Hey!\n- Here's what you need to do: {base}\n- Just a couple of things to keep in mind: {list}\n\nCan't wait!",
]
PLAIN = "{base}\n{list}"
SECOND = {1: "{base} {list}", 2: "{base}" + MET + "{list}"}  # by vintage; base and list touch in the first
LONG = ["{list}\n{base}", "{list}\n\nQuery:\n{base}", "{base}" + MET + "\n{list}"]
MARKERS = ["", "- ", "# ", "* ", "> "]


@pytest.fixture(scope="module", params=["embedded", "real"])
def material(request):
    """(requests, passages, constraints) that rows are built from."""
    if request.param == "embedded":
        return REQUESTS, PASSAGES, CLAUSES
    if not REAL.is_file():
        pytest.skip(f"needs {REAL.name} of real multi-constraint rows beside the repository")
    rows = [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]
    texts = {text.strip(): None for row in rows for text in row["constraints"]}
    # Crab's constraints are sentences of one line, as its published sample shows. Some of these rows' constraints have several
    # lines, and some lack their full stop.
    constraints = [text if not text[-1].isalnum() else text + "." for text in texts if "\n" not in text]
    return [row["prompt"] for row in rows], [row["completion"] for row in rows], constraints


class Simulator:
    """Crab's forward rows with the expected result: texts are composed of parts, never split."""

    def __init__(self, material, vintage, seed=0):
        self.requests, self.passages, self.constraints = material
        self.vintage, self.rng = vintage, random.Random(f"{vintage}-{seed}")

    def base(self, long):
        """An instruction: one request, like WizardLM's and OASST's, or one with a text, like Alpaca's and Orca's."""
        request, passage = self.rng.choice(self.requests), self.rng.choice(self.passages)
        if long:
            return self.rng.choice(
                [f"{request}\n\n{passage}", f"{passage}\n\n{request}", f"{passage}\n{request}\nAnswer:"]
            )
        if self.rng.random() < 0.7:
            return request
        other = self.rng.choice(self.requests)
        return self.rng.choice([f"{request}\n\n### Input:\n{other}", f"You are an AI assistant.\n\n{request}\n{other}"])

    def style(self):
        """(framing, marker) of a row. The marker None joins constraints by spaces; `{i}. ` numbers them."""
        plain = [PLAIN] if self.vintage == 1 else [PLAIN, SECOND[2]]
        if self.rng.random() < 0.85:
            return self.rng.choice(plain), self.rng.choice(MARKERS[: 1 if self.vintage == 1 else None])
        return self.rng.choice([PLAIN, SECOND[self.vintage], *FRAMED]), self.rng.choice([*MARKERS, "{i}. ", None])

    def turn(self, style, n):
        """(text, base, constraints) of a user turn with up to n constraints."""
        framing, marker = style
        long = self.rng.random() < 0.2
        base, constraints = self.base(long), self.rng.sample(self.constraints, min(n, len(self.constraints)))
        if long and self.vintage == 2:
            framing = self.rng.choice(LONG)
        indent = "    " if framing in FRAMED else ""
        if marker is None:
            text = " ".join(constraints)
        else:
            lines = [indent + marker.format(i=i) + constraint for i, constraint in enumerate(constraints, 1)]
            text = "\n".join(lines) if framing in LONG else "\n" + "\n".join(lines)
        return framing.format(base=base, list=text), base, constraints

    def row(self, kind="_forward"):
        """(row, base, constraints): 6 to 8 constraints in 70 % of rows, half of the rows with 1 to 3 demonstrations."""
        most, style = self.rng.randint(9, 16), self.style()
        n = self.rng.randint(6, 8) if self.rng.random() < 0.7 else self.rng.randint(1, most)
        shots = self.rng.randint(1, 3) if self.rng.random() < 0.5 else 0
        n = max(n, 3) if shots else n
        turns = [self.turn(style, self.rng.randint(0, n - 1))[0] for _ in range(shots)]
        text, base, constraints = self.turn(style, n)
        messages = []
        for i, user in enumerate([*turns, text]):
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": f"Answer {i}."}]
        number = self.rng.randrange(10**6)
        return {"id": f"{number}{kind}", "cnt_id": "1", "source": "orca_chat", "messages": messages}, base, constraints


def forward(*turns, kind="_forward"):
    roles = ("user", "assistant") * len(turns)
    return {"id": f"x_1{kind}", "messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


@pytest.mark.parametrize("vintage", [1, 2])
def test_constraints_are_recovered_exactly_in_95_percent(material, vintage):
    simulator, outcomes = Simulator(material, vintage), Counter()
    for _ in range(3500):
        row, base, constraints = simulator.row()
        out = crab_row(row)
        assert out["full_prompt"] == row["messages"][:-1] and out["prompt"][:-1] == row["messages"][:-2]
        assert out["completion"] == row["messages"][-1:]
        # whitespace around the base may be the template's or the instruction's
        exact = (out["prompt"][-1]["content"], out["constraints"]) == (base.strip(), constraints)
        outcomes["none" if out["miso_status"] != "split" else "exact" if exact else "wrong"] += 1
    assert outcomes["exact"] >= 0.95 * outcomes.total() and outcomes["wrong"] <= 0.03 * outcomes.total(), outcomes


def test_rows_without_constraints_to_follow_are_never_split(material):
    """Reverse, few-shot and ShareGPT rows keep their turns, even turns that look exactly like those of forward rows."""
    for vintage in (1, 2):
        simulator = Simulator(material, vintage, seed=1)
        for i in range(600):
            kind, status = [("_reverse", "reverse"), ("_fewshot", "fewshot"), ("_0", "plain"), ("", "plain")][i % 4]
            row, _, constraints = simulator.row(kind)
            out = crab_row(row)
            assert constraints and out["miso_status"] == status and out["constraints"] == []
            assert out["prompt"] == out["full_prompt"] == row["messages"][:-1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Name a river.",
        "Name a river.\n\nUse one word\nUse no comma",  # no punctuation: prose or code, not constraints
        "Name a river.\n\nChoose one.\n- Nile.\n- Rhine.",  # marked and unmarked lines
        "\n\n- Use one word.",  # constraints without an instruction
        "Name a river.\n\nRivers flow. The Nile is one.",  # prose
        "Name a river.\nUse one word. Use no comma.",  # joined by spaces, as all below
        "Name a river." + MET + "Use one word. Use no comma.",
        FRAMED[2].format(base="Name a river.", list="Use the word 'big.' Use no comma."),
        "Use one word. Use no comma.\n\nQuery:\nName a river.",
        "Name a river." + MET + "\nUse one word.\n \nUse no comma.",
    ],
)
def test_text_without_a_list_is_not_split(text):
    assert read_constraints(text) is None


@pytest.mark.parametrize(
    ("framing", "marker"),
    [
        (framing, marker)
        for framing in (PLAIN, *SECOND.values(), *FRAMED, *LONG)
        for marker in (*MARKERS, "{i}. ")
        if framing != LONG[0] or marker in MARKERS[1:]  # otherwise nothing marks the end of the constraints
    ],
)
def test_every_framing_and_marker(framing, marker):
    base, constraints = "Name a river.", ["Use one word.", "Mention 'a', 'b'", "Is it big?"]
    for n in (1, 3):
        lines = "\n".join(marker.format(i=i) + text for i, text in enumerate(constraints[:n], 1))
        text = framing.format(base=base, list=lines if framing in LONG else "\n" + lines)
        assert read_constraints(text) == (base, constraints[:n])


@pytest.mark.parametrize(
    ("text", "base", "constraints"),
    [
        (
            "- Nile.\n- Rhine.\n\nWhich is longer?\n\nUse one word.",
            "- Nile.\n- Rhine.\n\nWhich is longer?",
            ["Use one word."],
        ),
        ("Hi.\n\nUse one word. \nUse no comma.\n", "Hi.", ["Use one word.", "Use no comma."]),  # trailing spaces
        ("Hi.\n \t\n* Use one word.", "Hi.", ["Use one word."]),
        ("Hi.\n\n- Use one word. Use no comma.\n- Rhyme.", "Hi.", ["Use one word. Use no comma.", "Rhyme."]),
    ],
)
def test_lists_of_other_looks(text, base, constraints):
    assert read_constraints(text) == (base, constraints)


@pytest.mark.parametrize("start", ["", "a\n\n", "Instructions: ", "Instructions: a\nkeep in mind:", "- "])
def test_time_is_proportional_to_length(start):
    began = time.process_time()
    for piece in (
        "a",
        " ",
        "a\n\n",
        "following constraints ",
        "Instructions: x\n",
        "keep in mind: a\n",
        "- a.\n",
        "a \n",
    ):
        for end in ("", "a\n\nb\nc\n\nd"):
            read_constraints(start + piece * (2**20 // len(piece)) + end)
    assert time.process_time() - began < 20  # seconds; linear time takes about 1, quadratic time takes hours


def test_synthetic_rows_are_recovered_and_kept_verbatim():
    for row in synthetic_rows(600):
        before = copy.deepcopy(row)
        out = crab_row(row)
        assert row == before
        *prompt, completion = row["messages"]
        assert out["full_prompt"] == prompt and out["completion"] == [completion]
        assert out["prompt"][:-1] == prompt[:-1]
        if row["id"].endswith("_forward"):
            assert out["miso_status"] == "split"
            rebuilt = out["prompt"][-1]["content"] + "\n\n" + "\n".join(out["constraints"])
            assert rebuilt == prompt[-1]["content"]
        else:
            assert out["miso_status"] == "plain" and out["constraints"] == [] and out["prompt"] == prompt


def test_only_the_last_user_turn_is_split_and_the_system_turn_stays():
    row = forward("Name a lake.\n\nUse one word.", "Como", "Name a river.\n\nUse one word.", "Nile")
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    out = crab_row(row)
    assert out["full_prompt"] == row["messages"][:-1]
    assert out["prompt"] == [*row["messages"][:-2], {"role": "user", "content": "Name a river."}]
    assert out["constraints"] == ["Use one word."]


@pytest.mark.parametrize("row_id", [None, 7, 1.5, b"1_forward", ["1_forward"], "forward", "", "1_Forward"])
def test_ids_without_a_kind_are_plain(row_id):
    out = crab_row(forward("Name a river.\n\nUse one word.", "Nile") | {"id": row_id})
    assert out["miso_status"] == "plain" and out["constraints"] == []


def test_rows_that_cannot_be_split():
    assert crab_row(forward("Name a river.", "Nile"))["miso_status"] == "no_constraints"
    for messages in (
        [],
        forward("Hi")["messages"],
        forward("Hi", "Hello", "So?")["messages"],
        forward("", "a")["messages"][1:],
        forward("Hi", " ")["messages"],
        [{"role": "tool", "content": "Hi"}, *forward("Hi", "Hello")["messages"]],
        [{"role": "system", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    ):
        out = crab_row({"id": "1_forward", "messages": messages})
        assert out["miso_status"] == "bad_messages" and out["completion"] == [] and out["full_prompt"] == messages


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a_7"},
        {"id": "a_7", "messages": None},
        {"id": "a_7", "messages": 7},
        {"id": "a_7", "messages": "text"},
        {"id": "a_7", "messages": [None]},
        {"id": "a_7", "messages": [{"from": "human", "value": "Hi"}]},
        {"id": "a_7", "messages": [{"role": "user", "content": None}]},
        {"id": "a_7", "messages": [{"role": 7, "content": "Hi"}]},
    ],
)
def test_malformed_messages_are_named(row):
    with pytest.raises(
        ValueError, match=r"Crab row 'a_7': got .*messages.*; expected .*Fix:|columns.*'messages'.*Fix:"
    ):
        crab_row(row)


def test_a_missing_id_is_named():
    with pytest.raises(ValueError, match=r"got columns \['messages'\]; expected \['id'\] too\. Fix:"):
        crab_row({"messages": forward("Hi", "Hello")["messages"]})
