"""What a preview says of a data set, against what the trainer makes of it and numbers counted one by one."""

import copy
import io
import json
import re
from collections import Counter
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.data.test_property import metaspace_tokenizer
from tests.data.test_tokenization import assistant, make_tokenizer, user
from tests.support.models import CONFIGS
from trl_miso import MISOSFTTrainer
from trl_miso.cli.preview_terminal import print_preview
from trl_miso.data.bins import plan_bins
from trl_miso.data.token_text import token_texts
from trl_miso.pages.page import render_page
from trl_miso.preview import preview_dataset
from trl_miso.preview.statistics import ModelShape
from trl_miso.segments import decode

SHAPE = ModelShape("a model", weights=1000, width=24)
# No output; too long without a constraint, cut; too long with all of them, whose contexts fit one by one.
ODD = [
    {"prompt": [user("Hello")], "constraints": ["Be kind."], "completion": [assistant("")]},
    {"prompt": [user("the river " * 60)], "constraints": ["Be kind."], "completion": [assistant("Yes.")]},
    {"prompt": [user("the river " * 27)], "constraints": [], "completion": [assistant("the quiet boat " * 9)]},
    {"prompt": [user("Sail")], "constraints": ["the boat " * 30, "the reed " * 30], "completion": [assistant("Aye")]},
]
MODES = {
    "para": {"context_mode": "para"},
    "succ": {"context_mode": "succ", "chunk_probs": [0.1, 0.3, 0.6]},
    "single": {"context_mode": "single"},
    "augment": {"context_mode": "augment"},
    "fid without full": {"context_mode": "para", "context_weighting": "fid", "include_full": False},
    "text": {"dataset_text_field": "text"},
}
PARA = ("para", "fid without full")


def some_rows(para_dataset):
    """Crab's rows and odd ones, as messages; every way to be dropped or cut is among them."""
    kept = para_dataset.select_columns(["prompt", "constraints", "completion"]).select(range(24))
    return Dataset.from_list([*kept, *ODD])


def trainer_of(dataset, tokenizer, args):
    """A trainer as a user makes it."""
    small = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_attention_heads=1)
    return MISOSFTTrainer(LlamaForCausalLM(small), args, train_dataset=dataset, processing_class=tokenizer)


@pytest.fixture
def rows(para_dataset):
    return some_rows(para_dataset)


@pytest.fixture
def train(tokenizer, make_config):
    def train(dataset, **config):
        return trainer_of(dataset, copy.deepcopy(tokenizer), make_config(**config))

    return train


@pytest.fixture
def preview(tokenizer, make_config):
    def preview(dataset, rows=5, **config):
        return preview_dataset(dataset, tokenizer, make_config(**config), SHAPE, rows=rows)

    return preview


def as_text(rows):
    return Dataset.from_list([{"text": row["prompt"][-1]["content"] + row["completion"][0]["content"]} for row in rows])


# Statistics


def parts(row):
    """Every context's tokens, the output's, and the example."""
    (example,) = decode(row["miso_layout"])
    bounds = [0, *accumulate(segment.length for segment in example.segments)]
    runs = [row["input_ids"][a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    paths = [example.path(branch.segment) for branch in example.branches]
    return [sum((runs[s] for s in path), []) for path in paths], runs[-1], example


def dense_pairs(row, shared):
    """Pairs of a mask of every token by every token; an output's rows are scored once a branch and once for themselves."""
    contexts, output, example = parts(row)
    if contexts and not shared:
        return sum(np.tri(len(c)).sum() + len(output) * len(c) for c in contexts) + np.tri(len(output)).sum()
    owner = np.repeat(range(len(example.segments)), [segment.length for segment in example.segments])
    above = np.array(
        [[k in example.path(q) for k in range(len(example.segments))] for q in range(len(example.segments))]
    )
    mask = above[owner][:, owner] & np.tri(len(owner), dtype=bool)
    pairs = mask.sum()
    for branch in example.branches:
        is_seen = np.isin(owner, example.path(branch.segment))
        pairs += np.outer(owner == len(example.segments) - 1, is_seen).sum()
    return pairs


def unique_tokens(row, mode):
    """By the definition: a token is computed once for all contexts that agree on it and on everything before it."""
    contexts, output, _ = parts(row)
    if mode != "para":
        return len(row["input_ids"])
    return len({tuple(c[: i + 1]) for c in contexts for i in range(len(c))}) + len(output)


def percentile(values, p):
    place = Fraction((len(values) - 1) * p, 100)
    low, high = sorted(values)[int(place)], sorted(values)[min(int(place) + 1, len(values) - 1)]
    return int(low + (high - low) * (place - int(place)))


def labelled(row):
    return sum(label != -100 for label in row["labels"])


@pytest.mark.parametrize(("name", "shared"), [*((name, True) for name in MODES), *((name, False) for name in PARA)])
def test_statistics_are_those_of_the_prepared_rows(name, shared, rows, train, preview):
    dataset, max_length = (as_text(rows), 60) if name == "text" else (rows, 160)
    options = MODES[name] | {"max_length": max_length, "share_prefixes": shared}
    trainer, packed = train(dataset, **options), train(dataset, **options, packing=True)
    prepared, mode = list(trainer.train_dataset), trainer.training_mode
    got = preview(dataset, rows=0, packing=True, **options)["statistics"]

    tokens = [unique_tokens(row, mode) for row in prepared]
    unshared = [sum(map(len, parts(row)[0])) + len(parts(row)[1]) for row in prepared]
    assert min(tokens) > 0 and (sum(unshared) > sum(tokens)) == (mode == "para")
    sizes = tokens if shared else unshared
    assert got["tokens"] == {
        "unique": sum(sizes),
        "unshared": sum(unshared),
        "saved": 1 - sum(sizes) / sum(unshared),
        "labelled": sum(map(labelled, prepared)),
    }
    assert (got["rows"], got["examples"], got["mode"]) == (len(dataset), len(prepared), mode)
    branches = [len(parts(row)[0]) for row in prepared]
    assert got["contexts_per_answer"] == {str(n): m for n, m in sorted(Counter(max(1, n) for n in branches).items())}
    assert got["modes"] == Counter(mode if n or mode == "augment" else "single" for n in branches)

    outputs = [len(parts(row)[1]) if parts(row)[0] else labelled(row) for row in prepared]
    contexts = [max(map(len, parts(row)[0]), default=len(row["input_ids"]) - labelled(row)) for row in prepared]
    paths = [context + output for context, output in zip(contexts, outputs, strict=True)]
    if mode == "succ":  # chunks are read apart from each other
        paths = [max([len(c) for c in parts(row)[0]] or [0]) + len(parts(row)[1]) for row in prepared]
    lengths = {"unique_tokens": sizes, "longest_path": paths, "longest_context": contexts, "output": outputs}
    for column, values in lengths.items():
        assert got["lengths"][column] == [percentile(values, p) for p in got["lengths"]["percentiles"]], column

    bins = list(packed.train_dataset)
    assert got["bins"]["bins"] == len(bins) == len(plan_bins(sizes, max_length))
    assert got["bins"]["filled"] == sum(sizes) / (len(bins) * max_length)
    assert got["bins"]["examples_per_bin"] == round(len(prepared) / len(bins), 1)

    # a row is dropped once however many of its contexts are
    dropped = trainer.dropped_rows["train"]
    assert {why: (found["rows"], found["first_row"]) for why, found in got["dropped"].items()} == {
        why: (len(set(which)), min(which)) for why, which in dropped.items()
    }
    assert ("no label left within max_length" in dropped) == (name != "text")
    room = {"rows": 0, "tokens": 0}
    for row in train(dataset, **options | {"max_length": None}).train_dataset:
        ends = sum if mode == "succ" else max  # chunks follow one another
        longest = ends([0, *map(len, parts(row)[0])])
        output = row["labels"][-len(parts(row)[1]) :]
        kept = output[: max(max_length - longest, 0)]
        if any(label != -100 for label in kept) and len(kept) < len(output):
            room = {"rows": room["rows"] + 1, "tokens": room["tokens"] + len(output) - len(kept)}
    assert got["cut"] == room
    assert room["rows"] > 0

    # plain SFT's dense triangle on the rows that both train on
    single = train(dataset, **MODES["text"] if name == "text" else MODES["single"], max_length=max_length)
    sft = {row["miso_row"][0]: len(row["input_ids"]) for row in single.train_dataset}
    both = [(row, size) for row, size in zip(prepared, sizes, strict=True) if row["miso_row"][0] in sft]
    assert (len(both) < len(prepared)) == (name in ("augment", "fid without full"))
    numbers = {row["miso_row"][0] for row, _ in both}
    ours = sum(size for _, size in both), sum(dense_pairs(row, shared) for row, _ in both)
    theirs = sum(sft[n] for n in numbers), sum(np.tri(sft[n]).sum() for n in numbers)
    flops = [2 * SHAPE.weights * n + 4 * SHAPE.width * pairs for n, pairs in (ours, theirs)]
    expected = {"tokens": ours[0] / theirs[0], "score_pairs": ours[1] / theirs[1], "flops": flops[0] / flops[1]}
    assert got["cost"] == expected | {"model": "a model"}


def test_bins_are_planned_as_training_plans_them(train, preview):
    """A thousand rows at a time, after shuffling: long rows meet short ones, which unshuffled they would not."""
    lines = Dataset.from_list([{"prompt": "sea " * (9 if i < 1100 else 4), "completion": "."} for i in range(2200)])
    options = {"packing": True, "max_length": 45}
    together, apart = (len(train(lines, **options, shuffle_dataset=s).train_dataset) for s in (True, False))
    assert together < apart
    for shuffled, expected in ((True, together), (False, apart)):
        got = preview(lines, rows=0, **options, shuffle_dataset=shuffled)["statistics"]
        assert got["bins"]["bins"] == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral"])
def test_the_shape_of_a_model_is_counted_on_its_parameters(name, tied):
    config = CONFIGS[name](tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight
    products = [p for p in model.parameters() if p is not embedding]  # a lookup multiplies nothing
    if tied:
        products.append(model.get_output_embeddings().weight)
    shape = ModelShape.of(config, name)
    assert shape.weights == sum(p.numel() for p in products)
    projections = [m for key, m in model.named_modules() if key.endswith("q_proj")]
    assert shape.width == sum(m.out_features for m in projections)
    assert shape.flops(10, 100) == 20 * shape.weights + 400 * shape.width


# Rows


@pytest.mark.parametrize("name", MODES)
def test_rows_are_those_of_the_training_set(name, rows, train, preview):
    dataset, max_length = (as_text(rows), 60) if name == "text" else (rows, 160)
    options = MODES[name] | {"max_length": max_length, "seed": 5} | ({"para_prob": 0.8} if name in PARA else {})
    shuffled = {"shuffle_dataset": name != "augment"}  # which would mix the examples of a row
    trainer = train(dataset, **options, **shuffled)
    shown = preview(dataset, rows=1000, **options, **shuffled)
    uncut = {}
    for row in train(dataset, **options | {"max_length": None}).train_dataset:
        uncut.setdefault(row["miso_row"][0], []).append(row["input_ids"])
    prepared = sorted(trainer.train_dataset, key=lambda row: row["miso_row"])
    kept = [row for row in shown["rows"] if not row["dropped"]]
    assert len(kept) == len(prepared)
    for made, row in zip(kept, prepared, strict=True):
        (example,) = decode(row["miso_layout"])
        assert (made["index"], made["ids"], made["labels"]) == (row["miso_row"][0], row["input_ids"], row["labels"])
        assert made["segments"] == [segment._asdict() for segment in example.segments]
        (answer,) = made["answers"]
        assert [without(context, "name") for context in answer["contexts"]] == [b._asdict() for b in example.branches]
        tok = trainer.processing_class
        assert made["texts"] == [tok.decode([i]) for i in row["input_ids"]]
        ends = [ids[len(made["ids"]) :] for ids in uncut[made["index"]] if ids[: len(made["ids"])] == made["ids"]]
        assert answer["cut"] == [tok.decode([i]) for i in ends[0]]
        assert len(answer["cut"]) == made["cut"] == row["miso_cut"][0]
    assert any(row["cut"] for row in kept)
    said = {(row["index"], row["dropped"]) for row in shown["rows"] if row["dropped"]}
    assert said == {(number, why) for why, which in trainer.dropped_rows["train"].items() for number in which}
    check_plain(shown)


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def check_plain(shown):
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert "</html>" in render_page("preview", shown)
    print_preview(shown, Console(file=io.StringIO(), width=100))


def test_dropped_and_cut_rows_are_shown_beyond_the_first(rows, preview):
    later = Dataset.from_list([ODD[0] | {"completion": [assistant("Hi.")]}] * 5 + ODD + ODD)
    shown = preview(later, rows=2, max_length=160, context_mode="para")["rows"]
    assert [(row["index"], row["dropped"], bool(row["cut"])) for row in shown] == [
        (0, "", False),
        (1, "", False),
        (5, "no output: the completion is empty", False),
        (6, "no label left within max_length", False),
        (7, "", True),
    ]
    assert json.loads(shown[2]["raw"]) == later[5]
    assert shown[3]["raw"].startswith('{"prompt": [{"role": "user", "content": "the river the river')
    assert shown[3]["raw"].endswith(f"... ({len(json.dumps(later[6])):,} characters)") and len(shown[3]["raw"]) < 700
    assert shown[2]["ids"] == shown[2]["texts"] == shown[2]["answers"] == shown[2]["notes"] == []


def test_augment_shows_every_example_of_a_row(rows, preview):
    shown = preview(rows.select([27]), rows=1, max_length=160, context_mode="augment")["rows"]
    # all constraints at once do not fit, each by itself does, and so does the request
    assert [(row["index"], row["dropped"], row["mode"]) for row in shown] == [
        *[(0, "", "augment")] * 3,
        (0, "no label left within max_length", "augment"),
    ]
    assert "".join(shown[2]["texts"]).count("Sail") == 1
    assert not any(answer["contexts"] for row in shown for answer in row["answers"])


def test_how_many_rows_are_shown(rows, preview):
    assert preview(rows, rows=0, max_length=160)["rows"] == []
    assert [row["index"] for row in preview(rows.select(range(3)), rows=99)["rows"]] == [0, 1, 2]
    assert preview(rows, max_length=160) == preview(rows, max_length=160)
    assert preview(rows.with_format("numpy"), max_length=160) == preview(rows, max_length=160)


def test_what_has_no_rows_to_show_is_refused(rows, train, preview):
    for dataset, options, message in (
        (rows.select([]), {}, "Got no rows in the train dataset.*Fix"),
        (rows.select([24]), {}, r"Got a train dataset of 1 rows none of which can be trained on.*Fix"),
        (rows.to_iterable_dataset(), {}, "Got train as IterableDataset.*Fix"),
        (train(rows).train_dataset, {}, "prepared already.*Fix"),
        (rows, {"dataset_kwargs": {"skip_prepare_dataset": True}}, "without skip_prepare_dataset"),
        (rows, {"packing": True, "max_length": None}, "packing=True with max_length=None.*Fix"),
        (rows, {"padding_free": True, "max_length": 160}, "padding_free=True without packing.*Fix"),
    ):
        with pytest.raises(ValueError, match=message):
            preview(dataset, **options)


def test_rows_that_plain_sft_could_not_train_on_are_previewed(rows, preview):
    statistics = preview(rows.select([27]), max_length=160, include_full=False)["statistics"]
    assert statistics["examples"] == 1
    assert statistics["cost"] is None


def test_rows_that_are_tokens_and_packed_before(preview):
    packed = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, -100, 7, 8, 9], "seq_lengths": [2, 3]}]
    shown = preview(Dataset.from_list(packed), rows=1)
    assert shown["rows"][0]["ids"] == [5, 6]
    assert shown["statistics"]["examples"] == 2
    assert shown["statistics"]["cost"] == {"tokens": 1, "score_pairs": 1, "flops": 1, "model": "a model"}


# Texts


HARD = "the sea , it 's \U0001f469\u200d\U0001f680  caf\u00e9\n\n\ttwo  \ufffd \u4e2d<|im_end|> x"


@pytest.mark.parametrize("kind", ["bytes", "llama2", "first"])
def test_texts_joined_are_what_the_tokens_say(kind):
    tokenizer = make_tokenizer() if kind == "bytes" else metaspace_tokenizer(kind)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end\u2581of|>"]})  # as DeepSeek names its own
    tokenizer.clean_up_tokenization_spaces = True
    text = HARD + ("<|end\u2581of|>y" if kind == "bytes" else "")
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "<0xF0>" in texts and "\n" in "".join(texts)
    joined = re.sub(
        "<0x([0-9A-F]{2})>", lambda match: chr(int(match[1], 16)), "".join(texts).encode().decode("latin-1")
    )
    said = joined.encode("latin-1").decode()
    # decoding takes away the space that a text begins with
    assert said.lstrip(" ") == tokenizer.decode(ids, clean_up_tokenization_spaces=False).lstrip(" ")
    assert said.removeprefix(tokenizer.bos_token).replace("  x", " x").lstrip(" ") == text
