"""Datasets to prepared datasets: drops, draws, streams, TRL's rows, packing, and the trainer's path through them."""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.data import dropped as report
from trl_miso.data import mapping
from trl_miso.data.bins import ROW_LENGTHS, pack_rows, plan_bins
from trl_miso.data.dropped import report_mixture
from trl_miso.data.options import DataOptions
from trl_miso.data.preparation import RowPreparation, prepare_rows
from trl_miso.data.sft_rows import SFTRows, prepare_sft_rows
from trl_miso.data.tokenization import RowTokenizer
from trl_miso.segments import decode, unshare
from trl_miso.sources.crab import crab_features, crab_row
from trl_miso.sources.synthetic import build_tokenizer, synthetic_rows

REAL = Path(__file__).parents[3] / "shared/data/multi_constraint/rows.jsonl"
COLUMNS = ["input_ids", "labels", "miso_layout", "miso_row"]
PREPARED = [*COLUMNS, "miso_cut", "miso_notes"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tok():
    return build_tokenizer(synthetic_rows(200))


@pytest.fixture(scope="module")
def crab():
    rows = Dataset.from_list(synthetic_rows(120))
    return rows.map(crab_row, remove_columns=rows.column_names, features=crab_features())


@pytest.fixture(autouse=True)
def warnings_again():
    """Let `warning_once` warn in every test."""
    type(mapping.logger).warning_once.cache_clear()


@pytest.fixture
def train(tok, tmp_path):
    """A trainer's prepared training set, as a list of rows."""

    def train(rows, cls=MISOSFTTrainer, max_length=512, **config):
        size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **size))
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        config_cls = MISOSFTConfig if cls is MISOSFTTrainer else SFTConfig
        defaults = {"report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 1, "shuffle_dataset": False}
        args = config_cls(str(tmp_path), max_length=max_length, **defaults | config)
        return list(cls(model, args, train_dataset=rows, processing_class=tok).train_dataset)

    return train


def options_of(**options):
    defaults = {"max_length": 512, "seed": 0, "chunk_probs": (0.25,) * 4, "para_prob": 1.0, "full_context_weight": None}
    return DataOptions(**defaults | options)


def prepare(
    dataset, tok, kind="constraints", mode="para", num_proc=None, full=True, bare=True, template=None, **options
):
    tokenizer = RowTokenizer(tok, response_template=template)
    options = options_of(include_full=full, include_bare=bare, response_template=template, **options)
    rows = RowPreparation(kind, mode, options, tokenizer)
    dataset = Dataset.from_list(dataset) if isinstance(dataset, list) else dataset
    return prepare_rows(dataset, rows, "train", num_proc)[0]


def example_of(row):
    (example,) = decode(row["miso_layout"])
    return example


def contexts_of(row):
    return max(1, len(example_of(row).branches))


def output_of(row, tok):
    """Text of a mixing row's output."""
    return tok.decode(row["input_ids"][-example_of(row).segments[-1].length :])


def learned(rows):
    return [(row["input_ids"], row["labels"]) for row in rows]


def as_prompts(dataset, template=None):
    """What TRL's own trainer is given in comparisons."""
    return prepare_sft_rows(dataset, SFTRows("constraints", DataOptions(response_template=template)), "train", None)[
        0
    ].remove_columns("miso_row")


def stream(dataset):
    """The dataset as rows from a generator, of which nothing is known before they come."""
    return IterableDataset.from_generator(lambda: iter(dataset))


# Draws


@pytest.mark.parametrize("mode", ["para", "succ"])
def test_draws_depend_on_seed_and_row_only(mode, crab, tok):
    options = {"mode": mode, "para_prob": 0.5, "max_length": None}
    expected = list(prepare(crab, tok, **options))
    counts = Counter(map(contexts_of, expected))
    assert counts[1] > 20
    assert len(counts) >= 4
    assert list(prepare(crab, tok, num_proc=2, **options)) == expected
    assert list(prepare(stream(crab), tok, **options)) == expected
    assert list(prepare(crab.to_iterable_dataset(num_shards=3), tok, **options)) == expected
    order = [(7 * i + 3) % len(crab) for i in range(len(crab))]
    renumbered = [expected[i] | {"miso_row": [n]} for n, i in enumerate(order)]
    assert list(prepare(crab.select(order), tok, **options)) == renumbered
    assert list(prepare(crab, tok, **options | {"seed": 1})) != expected


def test_para_prob_leaves_the_full_context_alone(crab, tok):
    """Also where the full context is not among those that are mixed."""
    single = list(prepare(crab, tok, mode="single"))
    for full in (True, False):
        mixed = list(prepare(crab, tok, full=full))
        some = list(prepare(crab, tok, full=full, para_prob=0.5))
        assert list(prepare(crab, tok, full=full, para_prob=0.0)) == single
        assert all(row in (a, b) for row, a, b in zip(some, mixed, single, strict=True))
        assert 0.3 < sum(row == a for row, a, b in zip(some, mixed, single, strict=True) if a != b) / len(crab) < 0.7


def test_the_full_context_weight_needs_the_full_context(tok):
    row = {"contexts": ["a sea", "the sea"], "completion": "blue", "prompt": "the sea"}
    (made,) = prepare([row], tok, "contexts", full_context_weight=0.75)
    assert [branch.weight for branch in example_of(made).branches] == [0.75, 0.25]
    assert tok.decode(made["input_ids"]).startswith("the"), "the anchored context comes first"
    with pytest.raises(ValueError, match=r"Row 1: Got full_context_weight .*expected the full context among.*Fix"):
        prepare([row, row | {"prompt": "my sea"}], tok, "contexts", full_context_weight=0.75)
    prepare([row | {"prompt": "my sea", "context_weights": [1, 2]}], tok, "contexts", full_context_weight=0.75)


# Dropped rows

GOOD = {"prompt": [user("Describe the sea.")], "constraints": ["Rhyme."], "completion": [assistant("Blue.")]}
BAD = {
    "no output: the completion is empty": GOOD | {"completion": [assistant("")]},
    "an empty context": GOOD | {"prompt": []},
    "no label left within max_length": GOOD | {"prompt": [user("the sea " * 300)]},
}
MIXED = [GOOD, *BAD.values(), GOOD, *BAD.values()]


def dropped(caplog):
    return [record.getMessage().split("] ", 1)[-1] for record in caplog.records if "Dropped" in record.getMessage()]


@pytest.mark.parametrize("mode", ["para", "succ", "single"])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_dropped_rows_are_counted_once_per_reason(mode, num_proc, tok, caplog):
    made = prepare(MIXED, tok, mode=mode, num_proc=num_proc)
    assert len(made) == 2
    assert made.column_names == PREPARED
    assert learned(made)[0] == learned(made)[1]
    assert made["miso_row"][:] == [[0], [4]]
    assert sorted(dropped(caplog)) == sorted(
        f"Dropped 2 of 8 rows of the train dataset (first: row {i}): {reason}." for i, reason in enumerate(BAD, start=1)
    )


@pytest.mark.parametrize("mode", ["single", "augment"])
def test_rows_for_trl_are_counted_alike(mode, tok, train, caplog):
    made = train(MIXED, context_mode=mode)
    # "the sea" 300 times is cut after TRL's tokenization, when a row may have become several
    assert len(made) == (2 if mode == "single" else 4)
    of = {"no label left within max_length": "2 of 4" if mode == "single" else "4 of 8"}
    assert set(dropped(caplog)) == {
        f"Dropped {of.get(reason, '2 of 8')} rows of the train dataset (first: row {i}): {reason}."
        for i, reason in enumerate(BAD, start=1)
    }


@pytest.mark.parametrize("kind", ["constraints", "prompt", "contexts"])
def test_full_rows_for_trl(kind, caplog):
    rows = MIXED if kind == "constraints" else [row | {"constraints": None} for row in MIXED]
    if kind == "contexts":
        rows = [{"contexts": [row["prompt"]], "completion": row["completion"], "id": 1} for row in rows]
    made, _ = prepare_sft_rows(Dataset.from_list(rows), SFTRows(kind), "train", None)
    assert set(made.column_names) == {"prompt", "completion", "miso_row"}
    assert len(made) == 4
    assert len(dropped(caplog)) == 2
    prompt = "Describe the sea.\n\nRhyme." if kind == "constraints" else "Describe the sea."
    assert made[0] == {"prompt": [user(prompt)], "completion": [assistant("Blue.")], "miso_row": [0]}


MESSAGES = [[user("a"), assistant("b")], [], [user("a"), assistant("b"), user("c")], None, [user("d"), assistant("")]]


def test_messages_for_trl_need_no_answer_at_the_end_but_a_message(caplog):
    """TRL's own masks decide what is learned, but it cannot read an empty list."""
    made, reasons = prepare_sft_rows(
        Dataset.from_list([{"messages": m, "id": 0} for m in MESSAGES]), SFTRows("messages"), "train", None
    )
    assert list(made) == [{"messages": MESSAGES[i], "miso_row": [i]} for i in (0, 2, 4)]
    assert reasons == {"an empty conversation": [1, 3]}
    assert dropped(caplog) == ["Dropped 2 of 5 rows of the train dataset (first: row 1): an empty conversation."]


@pytest.mark.parametrize("mode", ["succ", "single"])
def test_messages_without_an_answer(mode, tok, train):
    made = train([{"messages": m} for m in MESSAGES], context_mode=mode)
    answered = MESSAGES[2][:2]  # a turn after the last answer is not read
    expected = [MESSAGES[0], answered] if mode == "succ" else [MESSAGES[0], MESSAGES[2], MESSAGES[4]]
    assert [row["input_ids"] for row in made] == [tok.apply_chat_template(m, return_dict=False) for m in expected]


def test_empty_completions_are_dropped_from_prompt_rows_in_single_mode_too(train, caplog):
    rows = [{"prompt": "the sea", "completion": c} for c in (" is blue", "", None, " ")]
    assert len(train(rows, context_mode="single")) == 1
    assert "Dropped 3 of 4 rows of the train dataset (first: row 1): no output: the completion is empty." in dropped(
        caplog
    )


@pytest.mark.parametrize("mode", ["para", "succ", "single"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset_of_which_nothing_is_left_is_an_error(mode, streamed, tok, train, caplog):
    rows = Dataset.from_list([BAD["an empty context"], BAD["no output: the completion is empty"]])
    with pytest.raises(ValueError, match=r"Got a .*dataset.* none of (which|whose rows) can be trained on.*Fix"):
        prepare(stream(rows) if streamed else rows, tok, mode=mode)
    with pytest.raises(ValueError, match=r"Got a .*dataset.* none of (which|whose rows) can be trained on.*Fix"):
        train(stream(rows) if streamed else rows, context_mode=mode)
    assert any("an empty context" in line for line in dropped(caplog))


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_that_truncation_leaves_without_labels_are_an_error_in_single_mode(streamed, train):
    rows = Dataset.from_list([BAD["no label left within max_length"]])
    with pytest.raises(ValueError, match="none of (which|whose rows) can be trained on"):
        train(stream(rows) if streamed else rows, context_mode="single")


@pytest.mark.parametrize("num_proc", [None, 2])
def test_columns_have_types_even_if_the_first_thousand_rows_are_dropped(num_proc, tok):
    rows = [{"prompt": "the sea", "completion": ""}] * 1100 + [{"prompt": "the sea", "completion": " is blue"}]
    made = prepare(rows, tok, "prompt", "succ", num_proc)
    assert len(made) == 1
    numbers = {name: List(Value("int64")) for name in PREPARED[:-1]}
    assert made.features == Features(numbers | {"miso_notes": List(Value("string"))})


def test_streams_say_once_what_they_drop(tok, caplog):
    made = list(prepare(stream(MIXED * 3), tok))
    assert len(made) == 6
    assert len(dropped(caplog)) == 3
    assert set(dropped(caplog)) == {
        f"Dropped 6 of the first 24 streamed rows of the train dataset (first: row {i}): {reason}."
        for i, reason in enumerate(BAD, start=1)
    }


def test_streams_also_say_what_they_drop_after_the_counted_rows(tok, caplog):
    rows = [GOOD] * report.SAMPLE + list(BAD.values()) * 2
    assert len(list(prepare(stream(rows), tok))) == report.SAMPLE
    assert {line.split(": ", 1)[1] for line in dropped(caplog)} == {f"{reason}." for reason in BAD}
    assert len(dropped(caplog)) == 3


# Errors name the row


@pytest.mark.parametrize("num_proc", [None, 2])
def test_wrong_types_name_row_and_column(num_proc, tok):
    rows = [{"prompt": "a", "completion": "b", "constraints": "Rhyme."}] * 3
    with pytest.raises(ValueError, match="Row 0: Got 'Rhyme.' in column 'constraints'"):
        prepare(rows, tok, num_proc=num_proc)
    with pytest.raises(ValueError, match="Row 0: Got 5 in column 'completion'"):
        prepare([{"prompt": "a", "completion": 5}], tok, "prompt", "succ")
    with pytest.raises(ValueError, match="Row 0: Got 'Rhyme.' in column 'constraints'"):
        prepare_sft_rows(Dataset.from_list(rows), SFTRows("constraints"), "train", num_proc)


def test_errors_of_tokenization_name_the_row(tok):
    rows = [{"contexts": ["a.", "b."], "completion": "c"}, {"contexts": [], "completion": "c"}]
    rows.append({"contexts": ["the sea", "the ship"], "completion": "c"})
    with pytest.raises(ValueError, match=r"^Row 2: Got contexts that end differently.*response_template"):
        prepare(rows * 2, tok, "contexts")
    with pytest.raises(ValueError, match=r"^Row 0: Got a prompt that ends with"):
        prepare(rows, tok, "contexts", template="Answer:")
    with pytest.raises(ValueError, match=r"^Row 1: Got 'x' in column 'chat_template_kwargs'"):
        prepare([GOOD | {"chat_template_kwargs": k} for k in (None, "x")], tok)
    with pytest.raises(ValueError, match=r"^Row 1: Got 'x' in column 'tools', expected .*Expecting value.*Fix"):
        prepare([GOOD | {"tools": k} for k in ("[]", "x")], tok)


def test_errors_of_the_chat_template_name_the_row(tok):
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn.') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}|{% endfor %}"
    )
    rows = [GOOD, GOOD | {"prompt": [{"role": "system", "content": "s"}, user("a")]}]
    preparation_ = RowPreparation("constraints", "para", options_of(), RowTokenizer(tok, template))
    with pytest.raises(
        ValueError, match=r"^Row 1: Got messages that the chat template cannot render .*No system turn.*Fix"
    ):
        prepare_rows(Dataset.from_list(rows), preparation_, "train", None)


# Columns


def test_nulls_and_other_columns_do_no_harm(tok):
    """What concatenating data sets of different columns leaves."""
    rows = [
        GOOD | {"id": 1, "text": None, "tools": None, "chat_template_kwargs": None, "full_prompt": None},
        GOOD | {"id": None, "text": "x", "tools": "[]", "chat_template_kwargs": {"a": True}, "constraints": None},
        GOOD | {"id": 2, "full_prompt": [user("Describe the sea. Rhyme.")], "score": 0.5},
    ]
    made = prepare(rows, tok)
    assert made.column_names == PREPARED
    assert [contexts_of(row) for row in made] == [2, 1, 3]
    assert [output_of(row, tok) for row in (made[0], made[2])] == ["<|assistant|>Blue.<|eos|>"] * 2
    assert list(prepare(stream(Dataset.from_list(rows)), tok)) == list(made)
    assert list(made)[0] == prepare([GOOD], tok)[0]


def test_nulls_in_what_trl_reads(tok, train):
    rows = [
        GOOD | {"tools": None, "chat_template_kwargs": None},
        GOOD | {"tools": "[]", "chat_template_kwargs": {"add": True}},
    ]
    expected = train([GOOD, GOOD], context_mode="single")
    assert train(rows, context_mode="single") == expected
    assert train(stream(rows), context_mode="single") == expected
    assert learned(train([rows[0]] * 1001 + rows, context_mode="single")[-2:]) == learned(expected)


SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"Describe the {x}."}, {"from": "gpt", "value": "Blue."}], "id": x}
    for x in ("sea", "river", "ship", "boat", "mill", "fish")
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("mode", ["auto", "succ", "single"])
def test_sharegpt_rows_are_trained_as_messages(mode, streamed, tok, train):
    rows = Dataset.from_list(SHAREGPT)
    made = train(stream(rows) if streamed else rows, context_mode=mode)
    messages = [[user(f"Describe the {row['id']}."), assistant("Blue.")] for row in SHAREGPT]
    assert [row["input_ids"] for row in made] == [tok.apply_chat_template(m, return_dict=False) for m in messages]
    if mode == "single":
        # plain SFT on messages: every token is learned, as TRL does
        assert all(row["labels"] == row["input_ids"] for row in made)


def test_sharegpt_rows_can_be_evaluated_on(tok):
    single = prepare(SHAREGPT, tok, "messages", "single")
    assert [tok.decode([t for t in row["labels"] if t != -100]) for row in single] == ["Blue.<|eos|>"] * len(SHAREGPT)


# The trainer's path


@pytest.mark.parametrize("mode", ["auto", "succ", "single", "augment"])
@pytest.mark.parametrize("packing", [False, True])
def test_streams_are_prepared_as_datasets_are(mode, packing, crab, train):
    options = {"context_mode": mode, "packing": packing} | ({"para_prob": 0.7} if mode == "auto" else {})
    expected = train(crab, **options)
    assert train(crab.to_iterable_dataset(), **options) == expected
    assert train(stream(crab), **options) == expected
    assert all(set(row) == ({*COLUMNS, ROW_LENGTHS} if packing else set(PREPARED)) for row in expected)
    sizes = [len(row["input_ids"]) for row in expected]
    assert all(
        sum(e.num_tokens for e in decode(row["miso_layout"])) == n for row, n in zip(expected, sizes, strict=True)
    )
    assert (max(len(list(decode(row["miso_layout"]))) for row in expected) > 1) == packing


@pytest.mark.parametrize("num_proc", [None, 2])
def test_single_mode_is_sft(num_proc, crab, train):
    data = as_prompts(crab)
    expected = learned(train(data, SFTTrainer, max_length=120))
    assert 50 < len(expected) < len(crab)
    made = train(crab, context_mode="single", max_length=120, dataset_num_proc=num_proc)
    assert learned(made) == expected
    assert not any(example_of(row).branches for row in made)
    # para presents rows without constraints so
    plain = crab.filter(lambda row: not row["constraints"])
    assert learned(train(plain)) == learned(train(as_prompts(plain), SFTTrainer))


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "the sea is blue"}, {"text": "a ship"}],
        [{"prompt": "the sea", "completion": " is blue"}],
        [{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}],
        [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}],
    ],
    ids=["text", "prompt", "messages", "tokenized"],
)
def test_single_mode_is_sft_for_every_format(rows, train):
    assert learned(train(rows, context_mode="single")) == learned(train(rows, SFTTrainer))


def test_augment_gives_every_context_its_own_example(crab, tok, train):
    crab = crab.select(range(30))
    made = train(crab, context_mode="augment", max_length=None)
    expected = []
    for row in prepare(crab, tok, max_length=None):
        example = example_of(row)
        bounds = [0]
        for segment in example.segments:
            bounds.append(bounds[-1] + segment.length)
        runs = [row["input_ids"][a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        paths = [example.path(branch.segment) for branch in example.branches] or [[]]
        expected += [[token for i in [*path, len(runs) - 1] for token in runs[i]] for path in paths]
    assert [row["input_ids"] for row in made] == expected
    assert not any(example_of(row).branches for row in made)
    # full, one a constraint, bare; with one constraint the full context is that one
    counts = [(1, 2)[n] if n < 2 else n + 2 for n in map(len, crab["constraints"])]
    assert len(made) == sum(counts) > 120


def test_plain_text_with_constraints_is_the_same_in_every_mode(tok, train):
    rows = [{"prompt": "the sea\nAnswer:\n", "constraints": ["Rhyme!", "No commas."], "completion": "blue"}]
    para, single = (prepare(rows, tok, mode=mode, template="\nAnswer:\n") for mode in ("para", "single"))
    assert output_of(para[0], tok) == "\nAnswer:\nblue<|eos|>"
    assert tok.decode(single[0]["input_ids"]) == "the sea\n\nRhyme!\nNo commas.\nAnswer:\nblue<|eos|>"
    (made,) = train(as_prompts(Dataset.from_list(rows), "\nAnswer:\n"), SFTTrainer)
    assert made["input_ids"] == single[0]["input_ids"]


def test_single_mode_of_plain_text_with_constraints(tok, train):
    rows = [{"prompt": "the sea\nAnswer:\n", "constraints": ["Rhyme!", "No commas."], "completion": "blue"}]
    expected = prepare(rows, tok, mode="single", template="\nAnswer:\n")
    assert learned(train(rows, context_mode="single", response_template="\nAnswer:\n")) == learned(expected)
    assert len(train(rows, context_mode="augment", response_template="\nAnswer:\n")) == 4


# Packing


@pytest.mark.parametrize("shared", [True, False])
def test_bins_hold_whole_examples_by_their_tokens(shared, crab, tok):
    rows = list(prepare(crab, tok, max_length=None))
    sizes = [(example_of(row).num_tokens if shared else example_of(row).num_unshared_tokens) for row in rows]
    capacity = sorted(sizes)[-10]  # nine examples are larger than a bin
    packed = list(pack_rows(prepare(crab, tok, max_length=None), capacity, shared, None))
    bins = plan_bins(sizes, capacity)
    assert len(packed) == len(bins) < len(rows)
    for bin_, members in zip(packed, bins, strict=True):
        for name in COLUMNS:
            assert bin_[name] == [value for i in members for value in rows[i][name]]
        assert sum(sizes[i] for i in members) <= capacity or len(members) == 1
    assert sorted(i for members in bins for i in members) == list(range(len(rows)))
    assert sum(len(members) == 1 and sizes[members[0]] > capacity for members in bins) == 9
    # what the collator will make of them
    copied = [unshare(example_of(row), [])[0].num_tokens for row in rows]
    assert [example_of(row).num_unshared_tokens for row in rows] == copied
    assert sum(len(row["input_ids"]) for row in rows) < sum(copied)


def test_the_mixture_is_logged(tok, caplog):
    made = prepare([GOOD, GOOD | {"constraints": []}], tok)
    with caplog.at_level(logging.INFO):
        report_mixture(made, "train")
    unshared = sum(example_of(row).num_unshared_tokens for row in made)
    tokens = sum(len(row["input_ids"]) for row in made)
    assert tokens < unshared
    assert caplog.messages[-1].endswith(
        f"train dataset: 2 examples with 2 answers, 50% with several contexts (2.0 on average), {tokens} tokens ({unshared} without shared "
        "prefixes)."
    )


# Real rows


@pytest.mark.skipif(not REAL.exists(), reason="real rows are kept outside the repository, in ../shared/data")
@pytest.mark.parametrize("mode", ["para", "succ"])
def test_real_rows(mode, tok, caplog):
    with REAL.open() as lines:
        real = [json.loads(line) for line in lines]
    chat = [row | {"prompt": [user(row["prompt"])], "completion": [assistant(row["completion"])]} for row in real]
    made = list(prepare(chat, tok, mode=mode, max_length=None))
    assert len(made) == len(real) == 536
    for row, prepared in zip(real, made, strict=True):
        if mode == "para":
            assert contexts_of(prepared) == len({"\n".join(row["constraints"]), *row["constraints"], ""})
        answer = tok.decode([t for t in prepared["labels"] if t != -100])
        assert answer == row["completion"] + tok.eos_token
    assert not dropped(caplog)


@pytest.mark.skipif(not REAL.exists(), reason="real rows are kept outside the repository, in ../shared/data")
def test_real_rows_of_plain_text(tok, caplog):
    with REAL.open() as lines:
        real = [json.loads(line) for line in lines]
    with pytest.raises(ValueError, match=r"^Row \d+: Got contexts that end differently.*response_template"):
        prepare(real, tok)
    end = "\n\n### Response:\n"
    plain = [row | {"prompt": row["prompt"] + end} for row in real]
    made = list(prepare(plain, tok, template=end, max_length=None))
    assert [output_of(row, tok) for row in made] == [f"{end}{row['completion']}{tok.eos_token}" for row in real]
    assert not dropped(caplog)
