"""Properties that all sources share; the synthetic rows, tokenizer and model of the examples."""

import copy
from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl_miso.sources.alpaca import alpaca_features, alpaca_row
from trl_miso.sources.conifer import conifer_features, conifer_row
from trl_miso.sources.crab import crab_features, crab_row
from trl_miso.sources.r1_distill import r1_distill_features, r1_distill_row
from trl_miso.sources.sharegpt import sharegpt_features, sharegpt_row
from trl_miso.sources.synthetic import build_model, build_tokenizer, check_constraints, synthetic_rows
from trl_miso.sources.tulu_persona import tulu_persona_features, tulu_persona_row
from trl_miso.sources.ultraif import ultraif_features, ultraif_row

HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
CHAT = [{"role": "user", "content": "Sing. Rhyme."}, {"role": "assistant", "content": "La"}]
# (source, features, rows); the first row fills the fewest columns
SOURCES = [
    pytest.param(
        crab_row,
        crab_features(),
        [row for row in synthetic_rows(40) if not row["id"].endswith("_forward")] + synthetic_rows(40),
        id="crab",
    ),
    pytest.param(
        sharegpt_row,
        sharegpt_features(),
        [{"id": str(i), "conversations": turns} for i, turns in enumerate([[], [HUMAN], [HUMAN, GPT], None, [GPT]])],
        id="sharegpt",
    ),
    pytest.param(
        r1_distill_row,
        r1_distill_features(),
        [
            {"input": "Q?", "reasoning_content": thinking, "content": response}
            for thinking, response in [(None, None), ("Hm.", "A."), (None, "A."), ("A.", "<think>")]
        ],
        id="r1_distill",
    ),
    pytest.param(
        tulu_persona_row,
        tulu_persona_features(),
        [
            {"id": "p", "prompt": "Sing. Rhyme.", "messages": turns, "constraints": constraints}
            for turns, constraints in [([], []), (CHAT, ["keywords:existence"]), (CHAT, ["Rhyme."]), (None, None)]
        ],
        id="tulu_persona",
    ),
    pytest.param(
        ultraif_row,
        ultraif_features(),
        [
            {"instruction": instruction, "output": output, "history": history}
            for instruction, output, history in [("", "", []), ("Sing.", "La", [HUMAN, GPT]), ("Sing.", "La", None)]
        ],
        id="ultraif",
    ),
    pytest.param(
        conifer_row,
        conifer_features(),
        [
            {"prompt": "Sing. Rhyme.", "messages": turns, "type": kind}
            for turns, kind in [([], "Easy-to-Hard"), (CHAT * 2, "Easy-to-Hard"), (CHAT * 2, "Process Feedback")]
        ],
        id="conifer",
    ),
    pytest.param(
        alpaca_row,
        alpaca_features(),
        [
            {"instruction": instruction, "input": given, "output": output, "text": "Below is ..."}
            for instruction, given, output in [("", "", ""), ("Name it.", "A river.", "Nile"), ("Sing.", None, "La")]
        ],
        id="alpaca",
    ),
]


@pytest.fixture(scope="module")
def rows():
    return synthetic_rows(600)


@pytest.fixture(scope="module")
def tokenizer(rows):
    return build_tokenizer(rows)


@pytest.fixture(scope="module")
def answered(rows):
    """(constraints, answer) of every forward row, read by the template's layout instead of the code under test."""
    pairs = []
    for row in rows:
        if row["id"].endswith("_forward"):
            *_, user, assistant = row["messages"]
            pairs.append((user["content"].split("\n\n")[1].split("\n"), assistant["content"]))
    return pairs


@pytest.mark.parametrize(("source", "features", "few"), SOURCES)
def test_maps_are_alike_and_mutate_nothing(source, features, few):
    """In memory, streamed and in two processes; the first 1,000 rows, from which datasets would infer types, are almost empty."""
    raw = few[:1] * 1001 + few
    before = copy.deepcopy(raw)
    expected = [source(row) for row in raw]
    assert raw == before and {tuple(row) for row in expected} == {tuple(features)}
    dataset = Dataset.from_list(raw)
    kwargs = {"remove_columns": dataset.column_names, "features": features}
    assert dataset.map(source, **kwargs).to_list() == expected
    assert dataset.map(source, num_proc=2, **kwargs).to_list() == expected
    assert list(dataset.to_iterable_dataset().map(source, **kwargs)) == expected


def test_columns_are_configured_through_fn_kwargs():
    dataset = Dataset.from_list([{"problem": "Q?", "generations": ["<think>Hm.</think>A."]}])
    kwargs = {
        "fn_kwargs": {"instruction": "problem", "thinking": None, "response": "generations"},
        "remove_columns": dataset.column_names,
        "features": r1_distill_features(),
    }
    for data in (dataset, dataset.to_iterable_dataset()):
        assert [row["miso_status"] for row in data.map(r1_distill_row, **kwargs)] == ["split"]


TEXTS = st.text(alphabet=st.characters(codec=None), max_size=20) | st.sampled_from(
    ["user", "assistant", "human", "gpt", "system", "1_forward", "<think>a</think>b", "<think>", "a\n\n- b.\n- c."]
)
KEYS = st.sampled_from(["role", "content", "from", "value", "id"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=5) | TEXTS
TURNS = st.lists(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("role", "content", "from", "value"), TEXTS)), max_size=4
)
JUNK = TURNS | st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXTS, inner, max_size=4), max_leaves=8
)
COLUMNS = ("id", "messages", "conversations", "input", "reasoning_content", "content")
COLUMNS += ("instruction", "output", "history", "constraints", "type")


@pytest.mark.parametrize(("source", "features", "few"), SOURCES)
@given(data=st.data())
def test_any_row_gives_columns_or_an_error_with_a_fix(source, features, few, data):
    well_formed = data.draw(st.sampled_from([{}, *few]))
    row = well_formed | data.draw(st.dictionaries(st.sampled_from(COLUMNS) | TEXTS, JUNK, max_size=3))
    before = copy.deepcopy(row)
    check(source, features, row)
    assert repr(row) == repr(before)


@pytest.mark.parametrize(("source", "features", "few"), SOURCES)
def test_long_texts(source, features, few):
    for piece in ("a", "\n", "<think>", "</think>", "a. B ", "Instructions: \n\n", "\ud800"):
        text = piece * (2**20 // len(piece))
        for turns in ([{"role": "user", "content": text}, {"role": "assistant", "content": text}], text):
            check(source, features, {"id": "1_forward"} | dict.fromkeys(COLUMNS[1:], turns))
        check(source, features, dict.fromkeys(COLUMNS, text))
        check(source, features, few[-1] | {"content": text, "reasoning_content": text})


def check(source, features, row):
    """A row gives the columns of `features` with their types, or a ValueError that tells the fix."""
    try:
        out = source(row)
    except ValueError as error:
        assert "Fix:" in str(error) and "expected" in str(error) and "got " in str(error) and len(str(error)) < 1500
        return
    assert list(out) == list(features) and isinstance(out.pop("miso_status"), str)
    assert out.pop("train_turns", "all") in ("all", "last")
    for name, values in out.items():
        assert isinstance(values, list)
        for value in [{"role": "", "content": value} for value in values] if name == "constraints" else values:
            assert list(value) == ["role", "content"] and all(isinstance(text, str) for text in value.values())


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


def test_rows_depend_on_seed_and_index_only(rows):
    assert synthetic_rows(600) == rows
    assert synthetic_rows(10) == rows[:10]
    assert synthetic_rows(10, seed=1) != rows[:10]


def test_every_constraint_can_fail(answered):
    """On other rows' answers every wording in use fails at least once, so no check is vacuous."""
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
        # the mask covers the answers with their eos tokens only
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
