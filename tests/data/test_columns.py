"""Columns, settings and rows that would have no effect: told or refused, for every format and mode."""

import json
import logging
from itertools import product

import pytest
from datasets import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM

from tests.preview.test_preview import SHAPE
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.data import dropped, pipeline
from trl_miso.data.columns import meant_column, unread_columns
from trl_miso.data.contexts import MODES, resolve_mode
from trl_miso.data.pipeline import Pipeline
from trl_miso.preview import preview_dataset

END = "\nAnswer:\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CONSTRAINTS = {
    "prompt": [user("Describe the sea.")],
    "constraints": ["Rhyme!", "Be brief."],
    "completion": [assistant("Blue.")],
}
ROWS = {
    "constraints": CONSTRAINTS,
    "constraints in plain text": {
        "prompt": f"the sea{END}",
        "constraints": ["Rhyme!", "Be brief."],
        "completion": "blue",
    },
    "constraints beside messages": {
        "messages": CONSTRAINTS["prompt"] + CONSTRAINTS["completion"],
        "constraints": CONSTRAINTS["constraints"],
    },
    "contexts": {"contexts": [[user("the sea")], [user("the ship sails")]], "completion": [assistant("blue")]},
    "contexts in plain text": {"contexts": [f"the sea{END}", f"the ship sails{END}"], "completion": "blue"},
    "prompt": {"prompt": [user("the ship sails on the sea")], "completion": [assistant("blue")]},
    "prompt in plain text": {"prompt": f"the ship sails on the sea{END}", "completion": "blue"},
    "messages": {"messages": [user("the ship sails on the sea"), assistant("blue")]},
    "text": {"text": "the sea is blue"},
    "tokenized": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
}


def kind_of(name):
    return name.split()[0]


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.fixture
def train(tokenizer, make_config):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))

    def train(rows, eval_rows=None, **config):
        rows, eval_rows = (Dataset.from_list(part) if isinstance(part, list) else part for part in (rows, eval_rows))
        args = make_config(**{"max_length": 200} | config)
        return MISOSFTTrainer(model, args, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer)

    return train


def told(caplog, words):
    return [record for record in caplog.records if words in record.getMessage()]


# Columns


@pytest.mark.parametrize(
    ("columns", "kind", "unread"),
    [
        (["prompt", "constraints", "completion", "full_prompt", "tools", "miso_status", "id"], "constraints", ["id"]),
        (["messages", "constraints", "prompt", "full_prompt"], "constraints", ["prompt"]),
        (["conversations", "constraints", "completion"], "constraints", ["completion"]),
        (["contexts", "context_weights", "prompt", "completion", "constraints"], "contexts", ["constraints"]),
        (["prompt", "completion", "chat_template_kwargs", "train_turns", "constraint"], "prompt", ["constraint"]),
        (["messages", "train_turns", "completion"], "messages", ["completion"]),
        (["body", "text", "tools"], "text", ["text", "tools"]),
        (["input_ids", "labels", "seq_lengths", "attention_mask", "ids"], "tokenized", ["ids"]),
    ],
)
def test_columns_that_a_format_does_not_read(columns, kind, unread):
    assert unread_columns(columns, kind, "body") == unread


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("constraint", "constraints"), ("Constraints", "constraints")),
        *(
            ("instruction", "prompt"),
            ("response", "completion"),
            ("context", "contexts"),
            ("full-prompt", "full_prompt"),
        ),
        *(
            ("id", None),
            ("source", None),
            ("score", None),
            ("key", None),
            ("cnt_id", None),
            ("instruction_id_list", None),
        ),
        *(("kwargs", None), ("attention_mask", None), ("prompt_id", None), ("contents", None)),
    ],
)
def test_the_name_that_may_be_meant(name, meant):
    assert meant_column(name, ["messages", name]) == meant
    assert meant_column(name, ["messages", name, meant]) is None, "the dataset has a column of the name that is meant"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("extra", "level", "words"),
    [
        ({"id": 1, "source": "x"}, logging.INFO, "columns ['id', 'source'] are not read."),
        ({"constraint": "Rhyme."}, logging.WARNING, "'constraint' may be meant as 'constraints'"),
        (
            {"response": "x", "constraints": ["Rhyme."]},
            logging.WARNING,
            "'constraints' has no effect on rows in the 'contexts' format",
        ),
        ({"miso_note": "x"}, None, "are not read"),
    ],
)
def test_a_column_that_is_not_read_is_told_once(extra, level, words, streamed, train, caplog):
    rows = [ROWS["contexts"] | extra] * 3
    with caplog.at_level(logging.INFO):
        train(stream(rows) if streamed else rows)
    assert [record.levelno for record in told(caplog, "are not read")] == [level] * (level is not None)
    assert len(told(caplog, words)) == (level is not None)


def test_a_preview_tells_it_too_and_rows_that_are_read_in_full_say_nothing(tokenizer, make_config, caplog):
    rows = Dataset.from_list([ROWS["messages"] | {"constraint": "Rhyme."}])
    preview_dataset(rows, tokenizer, make_config(), SHAPE)
    assert len(told(caplog, "may be meant as")) == 1
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for name, row in ROWS.items():
            args = make_config(response_template=END if "plain" in name else None)
            preview_dataset(Dataset.from_list([row]), tokenizer, args, SHAPE)
    assert not told(caplog, "are not read")


TOOL = {"type": "function", "function": {"name": "get_tide", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("mode", ["succ", "single"])
@pytest.mark.parametrize(
    ("kind", "late"),
    [
        ("messages", {"tools": [TOOL]}),
        ("messages", {"constraints": ["Rhyme!"]}),
        ("prompt", {"chat_template_kwargs": {"style": "short"}}),
        ("text", {"messages": ROWS["messages"]["messages"]}),
        ("tokenized", {"attention_mask": [1, 1, 0]}),
    ],
)
def test_a_column_that_the_first_row_of_a_stream_lacks_is_refused(kind, late, mode, train):
    if kind in ("text", "tokenized") and mode == "succ":
        pytest.skip("one context")
    row = ROWS[kind]
    with pytest.raises(ValueError, match=rf"Row 1: Got columns \['{next(iter(late))}'\].*expected the columns.*Fix"):
        list(train(stream([row, row | late]), context_mode=mode).train_dataset)
    harmless = dict.fromkeys(late) | {"id": 7}
    prepared = [
        list(train(stream([row, *rows]), context_mode=mode).train_dataset) for rows in ([row], [row | harmless])
    ]
    assert prepared[0] == prepared[1]


def test_contexts_beside_messages_need_a_completion(train):
    with pytest.raises(ValueError, match=r"contexts have no completion.*Fix: move the last answer of the messages"):
        train([ROWS["messages"] | {"contexts": [[user("a")], [user("b")]]}])


# Settings

# a value other than the default for every setting of MISOSFTConfig that can lack an effect
VALUES = {
    "include_full": False,
    "include_bare": False,
    "para_prob": 0.0,
    "chunk_probs": [0.0, 0.0, 1.0],
    "response_template": END,
    "eval_contexts": "miso",
    "context_weighting": "fid",
    "full_context_weight": 0.75,
    "output_positions": "after_longest",
    "share_prefixes": False,
    "log_shares": False,
    "train_turns": "all",
}
ALWAYS = {"context_mode", "attention_kernel", "verify"}  # of which only context_mode concerns rows
INVISIBLE = {"eval_contexts", "context_weighting", "log_shares"}  # of which prepared rows show nothing
TURNS = "train_turns"  # "all" says what "auto" does for conversations, and so changes nothing there
CASES = []
for rows_name, mode_name in product(ROWS, MODES[1:]):
    try:
        resolve_mode(mode_name, kind_of(rows_name))
        CASES.append((rows_name, mode_name))
    except ValueError:
        pass


def test_every_setting_is_listed():
    assert set(MISOSFTConfig.__annotations__) == set(VALUES) | ALWAYS


def is_refused(rows, mode, setting, make_config):
    try:
        config = make_config(context_mode=mode, **{setting: VALUES[setting]})
        Pipeline.of(config).check(Dataset.from_list([rows]))
    except ValueError as error:
        assert f"Got {setting} set for " in str(error) and f"Fix: leave {setting} unset" in str(error)
        return True
    return False


@pytest.mark.parametrize("setting", sorted(set(VALUES) - INVISIBLE - {TURNS}))
def test_a_setting_is_refused_where_rows_are_the_same_without_it(setting, tokenizer, make_config, monkeypatch):
    wrong = []
    for name, mode in CASES:
        if setting != "response_template" and "plain" in name:
            continue  # as chat rows, with a response template
        if (setting, mode) == ("share_prefixes", "succ"):
            continue  # it has an effect on rows of several answers
        refused = is_refused(ROWS[name], mode, setting, make_config)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "check_effects", lambda *_: None)
            without = {"chunk_probs": [0.0, 1.0]} if mode == "succ" else {}
            shown = []
            for options in (without, without | {setting: VALUES[setting]}):
                rows = Dataset.from_list([ROWS[name]] * 2)
                try:
                    made = preview_dataset(rows, tokenizer, make_config(context_mode=mode, **options), SHAPE)
                    shown.append((made["rows"], made["statistics"]["tokens"]))
                except ValueError as error:
                    shown.append(str(error))  # such as contexts that end differently without the template
        if refused != (shown[0] == shown[1]):
            wrong.append((name, mode, refused))
    assert not wrong


@pytest.mark.parametrize("setting", sorted(INVISIBLE))
def test_settings_of_the_mixture_are_refused_where_nothing_mixes(setting, make_config):
    mixing = ("para", "succ", "augment") if setting == "eval_contexts" else ("para", "succ")
    for name, mode in CASES:
        assert is_refused(ROWS[name], mode, setting, make_config) == (mode not in mixing), (name, mode)


def test_train_turns_is_refused_where_the_masks_of_trl_or_plain_text_leave_it_nothing_to_say(make_config):
    for name, mode in CASES:
        takes = mode in ("para", "succ") and "plain" not in name
        assert is_refused(ROWS[name], mode, TURNS, make_config) == (not takes), (name, mode)


@pytest.mark.parametrize("name", ROWS)
def test_defaults_are_never_refused(name, make_config):
    defaults = {key: MISOSFTConfig.__dataclass_fields__[key] for key in VALUES}
    values = {
        key: field.default_factory() if key == "chunk_probs" else field.default for key, field in defaults.items()
    }
    Pipeline.of(make_config(**values)).check(Dataset.from_list([ROWS[name]]))


def test_a_setting_need_not_have_an_effect_on_evaluation_rows_or_on_every_row(train):
    train(
        [CONSTRAINTS, CONSTRAINTS | {"constraints": []}],
        [ROWS["prompt"]],
        para_prob=0.5,
        include_bare=False,
        eval_contexts="miso",
        eval_strategy="steps",
    )


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            ROWS["text"],
            {"include_full": False},
            "Got include_full set for rows in the 'text' format, trained in mode 'single'",
        ),
        ({"question": "a"}, {}, "Got a dataset with columns"),
        (CONSTRAINTS | {"constraints": ["punctuation:no_comma"]}, {}, "Row 0: Got 'punctuation:no_comma'"),
        (CONSTRAINTS | {"completion": [user("x")]}, {"context_mode": "succ"}, "Row 0: Got a turn of role 'user' first"),
    ],
)
def test_data_errors_come_before_weights_are_loaded(row, options, message, tokenizer, make_config, tmp_path):
    """The model's folder has a config alone."""
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    rows = Dataset.from_list([row])
    with pytest.raises(ValueError, match=message):
        MISOSFTTrainer(str(tmp_path / "model"), make_config(**options), train_dataset=rows, processing_class=tokenizer)


# Rows without several contexts


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("rows", "options", "why"),
    [
        ([CONSTRAINTS | {"constraints": []}], {}, "no row has constraints that give it a second context. Fix: check"),
        ([CONSTRAINTS | {"constraints": ["Rhyme!"]}], {"include_bare": False}, "no row has constraints that give"),
        ([CONSTRAINTS], {"para_prob": 0.0}, "para_prob=0 drew none that is kept. Fix: raise para_prob"),
        ([ROWS["contexts"] | {"contexts": [[user("a")]]}], {}, "no row has two contexts. Fix: check column 'contexts'"),
        (
            [CONSTRAINTS | {"constraints": ["the sea " * 300, "b"]}, CONSTRAINTS | {"constraints": []}],
            {},
            "rows that have several were dropped. Fix: see",
        ),
        ([CONSTRAINTS | {"constraints": []}, CONSTRAINTS], {}, None),
        ([CONSTRAINTS | {"constraints": []}], {"context_mode": "succ"}, None),
    ],
)
def test_a_run_in_para_that_mixes_nothing_is_warned_of(rows, options, why, streamed, train, caplog):
    with caplog.at_level(logging.WARNING):
        train(stream(rows) if streamed else rows, **options)
    lines = told(caplog, "no example has several contexts")
    assert len(lines) == (why is not None)
    assert all(line.levelno == logging.WARNING and why in line.getMessage() for line in lines)


def test_streams_that_mix_late_are_warned_of_by_their_first_rows(train, caplog):
    rows = [CONSTRAINTS | {"constraints": []}] * dropped.SAMPLE + [CONSTRAINTS]
    train(stream(rows))
    assert told(caplog, f"first {dropped.SAMPLE} streamed rows: no example has several contexts")


# Constraints that stand in the prompt

HELD = [
    CONSTRAINTS | {"prompt": [user("Describe the sea. Rhyme! Be brief.")]},
    CONSTRAINTS | {"prompt": [user("Describe the sea, and: Be brief. Rhyme!")]},
    CONSTRAINTS,
]


@pytest.mark.parametrize("mode", ["para", "augment"])
@pytest.mark.parametrize(("streamed", "num_proc"), [(False, None), (False, 2), (True, None)])
def test_prompts_that_hold_constraints_are_counted(mode, streamed, num_proc, train, caplog):
    if mode == "augment" and num_proc:
        pytest.skip("processes take seconds to start")
    made = list(train(stream(HELD) if streamed else HELD, context_mode=mode, dataset_num_proc=num_proc).train_dataset)
    (line,) = told(caplog, "hold constraints already")
    assert line.getMessage().endswith(
        "the prompts of 2 rows hold constraints already; 1 were split; one context is kept by 1 since a constraint stands within "
        "a sentence of its prompt."
    )
    assert len(made) == (3 if mode == "para" else 4 + 1 + 4)


def test_rows_with_constraints_beside_messages_are_those_with_columns(train, caplog):
    """In every mode, in memory and streamed, beside a prompt of text as in Tulu-3's rows."""
    beside = ROWS["constraints beside messages"] | {"prompt": "Describe the sea."}
    for mode in MODES:
        expected = list(train([CONSTRAINTS], context_mode=mode).train_dataset)
        assert list(train([beside], context_mode=mode).train_dataset) == expected
        assert list(train(stream([beside]), context_mode=mode).train_dataset) == expected
    sharegpt = [{"from": "human", "value": "Describe the sea."}, {"from": "gpt", "value": "Blue."}]
    beside = {"conversations": sharegpt, "constraints": CONSTRAINTS["constraints"]}
    assert list(train([beside]).train_dataset) == list(train([CONSTRAINTS]).train_dataset)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ["length constraints:number of words", "detectable_format:number_bullets"])
@pytest.mark.parametrize("row", [CONSTRAINTS, ROWS["constraints beside messages"]])
def test_names_of_checks_are_no_constraints(row, name, streamed, train):
    rows = [row, row | {"constraints": [name]}]
    with pytest.raises(
        ValueError, match=r"^Row 1: Got .* in column 'constraints', the name of a check.*Fix: give the sen"
    ):
        train(stream(rows) if streamed else rows)
    train([row | {"constraints": ["Format: use bullets.", "Use this format:json"]}])


def test_a_preview_of_strings_shows_what_is_trained(tokenizer, make_config, tmp_path, train):
    """Plain text, though the tokenizer has a chat template; messages where the recipe asks for them."""
    from tests.support.recipes import parse_recipe
    from trl_miso.cli.preview import preview_recipe
    from trl_miso.recipe import adapt_rows, load_rows

    rows = [ROWS["constraints in plain text"] | {"prompt": f"the {x}{END}"} for x in ("sea", "ship", "boat")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer.save_pretrained(tmp_path / "model")
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    line = f"--model_name_or_path {tmp_path / 'model'} --dataset_name {tmp_path / 'rows.jsonl'} --output_dir out"
    for options, config in (([f"--response_template={END}"], {"response_template": END}), (["--as_messages"], {})):
        recipe, args, model_args = parse_recipe([*line.split(), *options])
        shown, _ = preview_recipe(recipe, args, model_args, 3, None)
        dataset = adapt_rows(load_rows(recipe, "train"), recipe)
        trained = train(dataset, max_length=1024, shuffle_dataset=False, **config).train_dataset
        assert [row["ids"] for row in shown["rows"]] == trained["input_ids"][:]
        if config:
            assert list(train(rows, max_length=1024, **config).train_dataset) == list(trained)
        assert ("<|user|>" in tokenizer.decode(trained[0]["input_ids"])) == (not config)
