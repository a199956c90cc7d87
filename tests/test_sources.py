"""Adapters: Crab's text back to its constraints, and the synthetic rows, tokenizer and model made for the examples."""

import copy
import random
from collections import Counter

import pytest

from trl_miso.sources.crab import crab_features, crab_row, read_constraints
from trl_miso.sources.synthetic import build_model, build_tokenizer, check_constraints, synthetic_rows

COLUMNS = {"prompt", "constraints", "completion", "full_prompt", "crab_status"}
MARKERS = ("{}", "- {}", "# {}", "* {}", "> {}")
BASES = (
    "Name the tributaries of the Ganges",
    "Write a python function that adds two numbers.\n\n```python\ndef add(a, b):\n    ...\n```",
    "Choose an answer.\n\nOptions:\n- red\n- blue\n- green",
    "Translate the text below.\n\n\nGuten Tag. Wie geht es?\n\nDanke!",
    "1. What is a river?\n2. What is a lake?\nAnswer both.",
    "You are an assistant.\n\nQ: is this sentence positive?\nA:",
    "Summarise: # Title\nA line of text.\nAnother line.\n\nThird: the following is a list.",
)
LONG_BASES = (
    "Story: " + "the fox crossed the river and the farm. " * 20 + "\nWhat did the fox cross?",
    "Passage one.\n\n" + "A barn stood on the hill. " * 20 + "\n\n- Who stood?\n- Where?",
)
CLAUSES = (
    "The response should start with a greeting.",
    "Use exactly three sentences!",
    "Should the tone be formal?",
    "List each item with a number, followed by a colon (:)",
    "Mention the word 'river'",
    'End with the phrase "that is all".',
    "Use 2-3 adjectives - no more - per sentence.",
    "Write in English; keep to one paragraph.",
)


@pytest.fixture(scope="module")
def rows():
    return synthetic_rows(600)


@pytest.fixture(scope="module")
def tokenizer(rows):
    return build_tokenizer(rows)


@pytest.fixture(scope="module")
def answered(rows):
    """(constraints, answer) of every forward row, read without the code under test: the template is known."""
    pairs = []
    for row in rows:
        if row["id"].endswith("_forward"):
            *_, user, assistant = row["messages"]
            pairs.append((user["content"].split("\n\n")[1].split("\n"), assistant["content"]))
    return pairs


def templated_turn(rng):
    """A user turn as Crab's two known generators lay it out: (text, base, constraints)."""
    constraints = [c if c[-1] in ".!?)'\"" else c + "." for c in rng.sample(CLAUSES, rng.randint(1, len(CLAUSES)))]
    v1, base, marker = rng.random() < 0.5, rng.choice(BASES), "{}"
    if rng.random() < 0.15:
        # other connectors, and framings with labels, whose lists are indented by four
        marker = rng.choice([*MARKERS, "{i}. {}", None])
        form = rng.randrange(8)
    else:
        form = 0 if v1 else rng.randrange(2)
        marker = "{}" if v1 else rng.choice(MARKERS)
    if not v1 and rng.random() < 0.2:
        base, form = rng.choice(LONG_BASES), rng.choice(("first", "query", "last"))

    indent = "    " if form in range(2, 8) else ""
    if marker is None:
        lines = " ".join(constraints)
    else:
        lines = "\n".join(indent + marker.format(c, i=i + 1) for i, c in enumerate(constraints))
        lines = lines if form in ("first", "query", "last") else "\n" + lines
    met = "When answering, please ensure that the following constraints are also met."
    forms = {
        0: f"{base}\n{lines}",
        1: f"{base} {lines}" if v1 else f"{base}\n\n{met}{lines}",
        "first": f"{lines}\n{base}",
        "query": f"{lines}\n\nQuery:\n{base}",
        "last": f"{base}\n\n{met}\n{lines}",
        2: f"Do as told.\n\nInstructions: {base}\n\nAdditional Constraints: {lines}",
        3: f" Do as told.\n\nInstructions: {base}\n\nAdditional Restrictions: {lines}",
        4: f"Do so.\n\n- **Instructions**: {base}\n- **Additional Constraints**: {lines}\n\nThis is essential.",
        5: f"Do so:\n1. **Instructions**: {base}\n2. **Additional Constraints**: {lines}\n\nIt is important.",
        6: f"Please.\n\n- **Instructions**: {base}\n- **Additional Constraints**: {lines}\n\nThank you!",
        7: f"Hey!\n- What you need to do: {base}\n- A few things to keep in mind: {lines}\n\nHave fun!",
    }
    return forms[form], base, constraints


def forward(*turns, kind="_forward"):
    roles = ("user", "assistant") * len(turns)
    return {"id": f"x_1{kind}", "messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


def test_templates_are_recovered_exactly_in_95_percent():
    rng = random.Random(0)
    outcomes = Counter()
    for _ in range(3000):
        text, base, constraints = templated_turn(rng)
        found = read_constraints(text)
        # surrounding whitespace of the base is the template's as much as the instruction's
        outcomes["none" if found is None else "exact" if found == (base.strip(), constraints) else "wrong"] += 1
    assert outcomes["exact"] >= 0.95 * 3000, outcomes
    assert outcomes["wrong"] <= 0.03 * 3000, outcomes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Name a river.",
        "Name a river.\n\nUse one word\nUse no comma",  # no punctuation: prose or code, not constraints
        "Name a river.\n\nChoose one.\n- Nile.\n- Rhine.",  # marked and unmarked lines
        "\n\n- Use one word.",  # constraints of nothing
    ],
)
def test_text_without_a_list_is_not_split(text):
    assert read_constraints(text) is None


def test_bracketed_sentence_and_markers():
    expected = ("Name a river.", ["Use one word.", "Use no comma."])
    met = "When answering, please ensure that the following constraints are also met."
    for head in (
        f"[{met}]\n",
        f"[{met}\n]\n",
        f"[{met}\n]",
        f"{met}\n",
        "Please meet the following constraints:\n",
        "",
    ):
        for marker in (*MARKERS, "1. {}"):
            lines = "\n".join(marker.format(c) for c in expected[1])
            assert read_constraints(f"Name a river.\n\n{head}{lines}") == expected


def test_synthetic_rows_are_recovered_and_kept_verbatim(rows):
    for row in rows:
        before = copy.deepcopy(row)
        out = crab_row(row)
        assert row == before and set(out) == COLUMNS
        *prompt, completion = row["messages"]
        assert out["full_prompt"] == prompt and out["completion"] == [completion]
        assert out["prompt"][:-1] == prompt[:-1]
        if row["id"].endswith("_forward"):
            assert out["crab_status"] == "split"
            rebuilt = out["prompt"][-1]["content"] + "\n\n" + "\n".join(out["constraints"])
            assert rebuilt == prompt[-1]["content"]
        else:
            assert out["crab_status"] == "plain" and out["constraints"] == [] and out["prompt"] == prompt


@pytest.mark.parametrize(("kind", "status"), [("_reverse", "reverse"), ("_fewshot", "fewshot"), ("", "plain")])
def test_rows_that_carry_no_constraints_to_follow_are_never_split(kind, status):
    out = crab_row(forward("Name a river.\n\nUse one word.\nUse no comma.", "Nile", kind=kind))
    assert out["crab_status"] == status and out["constraints"] == [] and out["prompt"] == out["full_prompt"]


def test_only_the_last_user_turn_is_split_and_the_system_turn_stays():
    row = forward("Name a lake.\n\nUse one word.", "Como", "Name a river.\n\nUse one word.", "Nile")
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    out = crab_row(row)
    assert out["full_prompt"] == row["messages"][:-1]
    assert out["prompt"] == [*row["messages"][:-2], {"role": "user", "content": "Name a river."}]
    assert out["constraints"] == ["Use one word."]


def test_rows_that_cannot_be_split():
    assert crab_row(forward("Name a river.", "Nile"))["crab_status"] == "no_constraints"
    for messages in (
        [],
        forward("Hi")["messages"],
        forward("Hi", "Hello", "So?")["messages"],
        forward("", "a")["messages"][1:],
    ):
        out = crab_row({"id": "1_forward", "messages": messages})
        assert out["crab_status"] == "bad_messages" and out["completion"] == [] and out["full_prompt"] == messages


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a_7"},
        {"id": "a_7", "messages": "text"},
        {"id": "a_7", "messages": [None]},
        {"id": "a_7", "messages": [{"from": "human", "value": "Hi"}]},
        {"id": "a_7", "messages": [{"role": "user", "content": None}]},
    ],
)
def test_malformed_messages_are_named(row):
    with pytest.raises(ValueError, match=r"'a_7': got .*expected .*Fix"):
        crab_row(row)


def test_maps_over_datasets(rows):
    from datasets import Dataset

    # more rows without constraints than datasets reads types from, then the ones that have some
    plain = [row for row in rows if not row["id"].endswith("_forward")]
    rows = (plain * 1000)[:1001] + rows
    dataset = Dataset.from_list(rows)
    kwargs = {"remove_columns": dataset.column_names, "features": crab_features()}
    mapped = dataset.map(crab_row, **kwargs)
    assert mapped.to_list() == [crab_row(row) for row in rows]
    assert list(dataset.to_iterable_dataset().map(crab_row, **kwargs)) == mapped.to_list()


def test_answers_satisfy_their_constraints(answered):
    for constraints, answer in answered:
        assert all(check_constraints(constraints, answer)), (constraints, answer)


def test_constraints_look_like_crab(rows, answered):
    assert all(len(set(constraints)) == len(constraints) for constraints, _ in answered)
    assert all(c.endswith(".") and "\n" not in c for constraints, _ in answered for c in constraints)
    assert all(1 <= len(constraints) <= 7 for constraints, _ in answered)
    assert 0.8 < sum(len(constraints) >= 3 for constraints, _ in answered) / len(answered) < 1
    assert 0.05 < 1 - len(answered) / len(rows) < 0.15
    shots = Counter(len(row["messages"]) // 2 - 1 for row in rows if row["id"].endswith("_forward"))
    assert set(shots) == {0, 1, 2, 3} and 0.4 < shots[0] / len(answered) < 0.6
    assert len({row["id"] for row in rows}) == len(rows)


def test_rows_depend_on_seed_and_index_alone(rows):
    assert synthetic_rows(600) == rows
    assert synthetic_rows(10) == rows[:10]
    assert synthetic_rows(10, seed=1) != rows[:10]


def test_every_constraint_can_fail(answered):
    """Judged against other rows' answers, every wording in use is false at least once: no check is vacuous."""
    held = {}
    for index, (constraints, _) in enumerate(answered):
        for constraint in constraints:
            kind = " ".join(word for word in constraint.split() if word.islower())[:12]
            other = answered[(index + 1) % len(answered)][1]
            held.setdefault(kind, set()).update(check_constraints([constraint], other))
    assert len(held) >= 12 and all(False in results for results in held.values()), held


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        ("Mention the word river.", "A RIVER!", "Rivers."),
        ("Do not use the word stone.", "A stonemason.", "Stone."),
        ("Mention the word boat before the word mill.", "The boat, the mill.", "The mill, the boat."),
        ("Use the word boat exactly two times.", "Boat, boat.", "Boat."),
        ("Begin with the word Today.", "today it rains.", "It rains today."),
        ("End with the word rain.", "It may rain!", "Rain falls."),
        ("Write exactly two sentences.", "One. Two?", "One."),
        ("Use at least 3 words.", "One two three.", "One two."),
        ("Use no more than 2 words.", "One two.", "One two three."),
        ("End with a question mark.", "Why?", "Why? So."),
        ("End with an exclamation mark.", "So!", "So! Yes."),
        ("Do not ask a question.", "So.", "Why? So."),
        ("Do not use any commas.", "So.", "So, yes."),
        ("Use only lowercase letters.", "so.", "So."),
        ("Use only capital letters.", "SO.", "So."),
    ],
)
def test_checks(constraint, good, bad):
    assert check_constraints([constraint, constraint], good) == [True, True]
    assert check_constraints([constraint], bad) == [False]
    assert isinstance(check_constraints([constraint], "")[0], bool)


def test_unknown_wording_is_refused():
    with pytest.raises(ValueError, match=r"got .*expected .*Fix"):
        check_constraints(["Write like a pirate."], "Arr.")


def test_tokenizer_round_trips_and_has_one_id_per_header(rows, tokenizer):
    for text in (rows[0]["messages"][0]["content"], "Grüße, 世界!  two  spaces\n\ttab", "<|user|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    special = ["<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
    ids = [tokenizer(token)["input_ids"] for token in special]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == 5
    assert len(tokenizer) <= 1024 and tokenizer.eos_token_id != tokenizer.pad_token_id
    assert build_tokenizer(rows).get_vocab() == tokenizer.get_vocab()


def test_prompt_is_a_prefix_of_the_conversation_and_eos_ends_each_answer(rows, tokenizer):
    for row in rows[:100]:
        messages = [{"role": "system", "content": "Be brief."}, *row["messages"]]
        full = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = full["input_ids"], full["assistant_masks"]
        answers = []
        for end in range(2, len(messages), 2):
            prompt = tokenizer.apply_chat_template(messages[:end], add_generation_prompt=True, return_dict=False)
            through = tokenizer.apply_chat_template(messages[: end + 1], return_dict=False)
            assert ids[: len(prompt)] == prompt and ids[: len(through)] == through
            assert through[-1] == tokenizer.eos_token_id
            answers += range(len(prompt), len(through))
        # the mask is the answers with their eos, and nothing else
        assert [i for i, on in enumerate(mask) if on] == answers
        assert ids.count(tokenizer.eos_token_id) == len(messages) // 2


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert loaded.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)


def test_model_is_small_seeded_and_leaves_the_generator_alone(tokenizer):
    import torch

    state = torch.get_rng_state()
    one, same, other = build_model(tokenizer), build_model(tokenizer), build_model(tokenizer, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.get_input_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert {p.dtype for p in one.parameters()} == {torch.float32} and sum(p.numel() for p in one.parameters()) < 1e6
    assert one.lm_head.weight is one.get_input_embeddings().weight
    assert one.generation_config.eos_token_id == tokenizer.eos_token_id == one.config.eos_token_id
    assert one.config.pad_token_id == tokenizer.pad_token_id
    ids = tokenizer("Today the boat crosses the river.", return_tensors="pt")["input_ids"]
    assert torch.isfinite(one(input_ids=ids, labels=ids).loss)
