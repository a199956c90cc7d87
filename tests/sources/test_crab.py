"""Crab's user turns are split into base instruction and constraints, on rows in the layouts of Crab's two public generators."""

import copy
import json
import random
import re
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
    "\n\nThis article: it rained all day. The river rose.\n\nWhat rose?\nAnswer:",
    "Which of these is a bird?\n\n- The reed.\n- The heron.",
    "Instructions: sort the words below.\n\nheron, otter, fish",
)
PASSAGES = (
    "The fox crossed the river and the farm. " * 20,
    "Passage one.\n\n" + "A barn stood on the hill. " * 20 + "\n\n- Who stood?\n- Where?",
    "* Herons wade.\n* Otters dive.\n* Fish do neither.\nAll of them live here.",
    "Dear reader,\n\nthe ferry is late. Do wait.\nBring a coat.\n\nYours,\nThe ferryman.",
    "| bird | colour |\n| --- | --- |\n| heron | grey |",
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
# Beside the markers, the labels and sentences of the framings are all that may be left out of the contexts.
MET = "\n\nWhen answering, please ensure that the following constraints are also met."
FRAMED = [
    "Follow the instructions, and the constraints below.\n\nInstructions: {base}\n\nAdditional Constraints: {list}",
    "Follow the instructions, and the restrictions below.\n\nInstructions: {base}\n\nAdditional Restrictions: {list}",
    "Follow the instructions and constraints below.\n\n"
    "- **Instructions**: {base}\n- **Additional Constraints**: {list}\n\nDo follow these guidelines.",
    "Please adhere to the following:\n1. **Instructions**: {base}\n2. **Additional Constraints**: {list}\n\nFollow these guidelines.",
    "Respond by considering the instructions and constraints below.\n\n"
    "- **Instructions**: {base}\n- **Additional Constraints**: {list}\n\nThanks for your attention to detail!",
    "Hey! Follow the steps and rules below:\n- Here's what you need to do: {base}\n"
    "- Just a couple of things to keep in mind: {list}\n\nSee what you come up with!",
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


# Percent of the test's rows that were recovered exactly while only framed and marked lists could begin a turn.
EXACT_BEFORE = {("embedded", 1): 94.97, ("embedded", 2): 95.71, ("real", 1): 97.28, ("real", 2): 96.4}


@pytest.mark.parametrize("vintage", [1, 2])
def test_constraints_are_recovered_exactly_in_95_percent_and_wrongly_in_less_than_half_a_percent(
    material, vintage, request
):
    simulator, outcomes = Simulator(material, vintage), Counter()
    for _ in range(3500):
        row, base, constraints = simulator.row()
        out = crab_row(row)
        assert out["full_prompt"] == row["messages"][:-1] and out["prompt"][:-1] == row["messages"][:-2]
        assert out["completion"] == row["messages"][-1:]
        if out["miso_status"] != "split":
            outcomes["kept"] += 1
            continue
        found = out["prompt"][-1]["content"], out["constraints"]
        assert left_out(row["messages"][-2]["content"], *found) <= ANNOUNCING
        # whitespace around the base may be the template's or the instruction's
        outcomes["exact" if found == (base.strip(), constraints) else "wrong"] += 1
    before = EXACT_BEFORE[request.node.callspec.params["material"], vintage]
    assert 100 * outcomes["exact"] / outcomes.total() >= max(before, 95), outcomes
    assert outcomes["wrong"] < 0.005 * outcomes.total(), outcomes


def left_out(text, base, constraints):
    """The lines of a turn that are neither in its base nor in a constraint, without markers."""
    for part in sorted([base, *constraints], key=len, reverse=True):
        assert part in text
        text = text.replace(part, "", 1)
    return {bare(line) for line in text.split("\n")}


def bare(line):
    return re.sub(r"(?:^|(?<=:))\s*(?:[-#*>]|\d+\.)(?=\s|$)", "", line).strip()


ANNOUNCING = {bare(line) for f in [*FRAMED, *LONG, MET] for line in f.format(base="", list="").split("\n")}


def test_no_text_of_a_split_turn_is_lost():
    """On random arrangements of what turns consist of, of Crab's labels and of sentences much like its announcements."""
    rng = random.Random(0)
    labels = [
        "Instructions: ",
        "Additional Constraints: ",
        "- **Instructions**: ",
        "- **Additional Constraints**: ",
        "Query:",
    ]
    labels += [
        "1. **Instructions**: ",
        "- Here's what you need to do: ",
        "- Just a couple of things to keep in mind: ",
        "",
    ]
    known = [line for f in [*FRAMED, MET] for line in f.format(base="", list="").split("\n")]
    texts = [
        "Here is a form.",
        "Fill it in",
        "Write a poem with the following constraints:",
        "Thank you for your time!",
        "A:",
    ]
    texts += [
        "Follow the rules of chess.",
        "The form below lists steps and rules.",
        "Use one word. Use no comma.",
        "- Rhyme.",
    ]
    split = 0
    for _ in range(20_000):
        text = ""
        for _ in range(rng.randint(1, 5)):
            pieces = [rng.choice(labels) + rng.choice(texts), rng.choice(texts), rng.choice(known), rng.choice(labels)]
            marker = rng.choice([*MARKERS, "    - "])
            pieces.append("\n".join(marker + c for c in rng.sample(CLAUSES, rng.randint(1, 3))))
            text += rng.choice(pieces) + rng.choice(["\n", "\n\n", " \n", "\n\n\n", ""])
        parts = read_constraints(text)
        if parts is not None:
            split += 1
            assert left_out(text, *parts) <= ANNOUNCING, text
    assert split > 2000


@pytest.mark.parametrize(
    "text",
    [
        "Here is a form.\n\nInstructions: fill it in.\n\nAdditional Constraints: use ink.\nBe brief.\nBe kind.",
        FRAMED[0].format(base="Name a river.", list="\n    - Use one word.") + "\n\nSend it today.",
        "You are a poet.\n\nWrite of the sea by the following constraints:\n- Be brief.\n- Rhyme.",
        "Name a river.\n\nText: the Nile rose.\nAnswer:",
        "Be brief.\nBe kind.\nName a river.\n\nWhich is longest?",  # it may begin or end with its list
        "- Be brief.\n- Be kind.\n\n\nName a river.\n\nWhich is longest?",
    ],
)
def test_turns_that_cannot_be_split_safely_are_kept(text):
    assert crab_row(forward(text, "Nile"))["miso_status"] == "no_constraints"


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
        # the instruction, which begins with an empty line, after the list
        (
            "- Be brief.\n- Be kind.\n\n\nThis article: it rained all day. What fell?\nAnswer:",
            "This article: it rained all day. What fell?\nAnswer:",
            ["Be brief.", "Be kind."],
        ),
        # the template's space before a marked list, after an instruction with a blank line
        (
            "A list:\n\n- Nile.\n- Rhine. \n# Be brief.\n# Be kind.",
            "A list:\n\n- Nile.\n- Rhine.",
            ["Be brief.", "Be kind."],
        ),
        # the longer list is the constraints
        (
            "- Nile.\n- Rhine.\nCompare.\n\nBe brief.\nBe kind.\nRhyme.",
            "- Nile.\n- Rhine.\nCompare.",
            ["Be brief.", "Be kind.", "Rhyme."],
        ),
        ("- Be brief.\n- Be kind.\nName a river.\n\nAny.", "Name a river.\n\nAny.", ["Be brief.", "Be kind."]),
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


def test_every_answer_is_trained_of_plain_rows_alone():
    for kind, turns in {"_0": "all", "_forward": "last", "_reverse": "last", "_fewshot": "last"}.items():
        assert (
            crab_row(forward("Hi", "Hello", "Name a river.\n\nUse one word.", "Nile", kind=kind))["train_turns"]
            == turns
        )
    assert crab_row({"id": "1_0", "messages": []})["train_turns"] == "last"


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
