"""A preview shows the rows that the trainer makes, and refuses what the trainer refuses, in the same words."""

import copy

import pytest
from datasets import Dataset

from tests.preview.test_preview import SHAPE, check_plain, trainer_of
from tests.support.conversations import CONVERSATIONS, TEMPLATES, assistant, tokenizer_for, user
from trl_miso.data.turns import TRAIN_TURNS
from trl_miso.preview import preview_dataset

TOKENIZERS = {name: tokenizer_for(TEMPLATES[name]) for name in ("qwen3", "llama3")}  # qwen3 strips earlier thinking
SHOTS = [user("What is the sea?"), assistant("It is blue."), user("And the sky?")]
ANSWERS = [[assistant("It is blue as well.")], [assistant("Grey.")], [assistant("Look up before you speak.")]]
CHATS = [{"messages": CONVERSATIONS[kind]} for kind in ("plain", "long", "system", "two answers", "two questions")]
PROMPTS = [{"prompt": SHOTS[: 1 + 2 * (i % 2)], "completion": ANSWERS[i]} for i in range(3)]
CONSTRAINTS = [row | {"constraints": ["Be kind.", "Rhyme.", "Be brief."][:i]} for i, row in enumerate(PROMPTS)]
CONTEXTS = [
    {
        "contexts": [SHOTS[2:], SHOTS, SHOTS[:1]],
        "prompt": SHOTS,
        "completion": ANSWERS[0],
        "context_weights": [1, 2, 3],
    },
    {"contexts": [SHOTS], "prompt": SHOTS, "completion": ANSWERS[1], "context_weights": None},
]
COMPLETIONS = [
    {"prompt": SHOTS, "completions": ANSWERS, "constraints": ["Be kind.", "Rhyme."]},
    {"prompt": SHOTS[:1], "completions": ANSWERS[:1], "constraints": []},
]
IDS = [
    {"input_ids": list(range(10, 30)), "labels": [-100] * 8 + list(range(18, 30))},
    {"input_ids": [9, 8], "labels": [9, 8]},
]
ROWS = {
    "messages": CHATS,
    "messages that choose": [
        row | {"train_turns": own} for row, own in zip(CHATS, ["all", "last", None] * 2, strict=False)
    ],
    "thinking": [{"messages": CONVERSATIONS[kind]} for kind in ("thinking", "plain")],
    "prompt": PROMPTS,
    "constraints": CONSTRAINTS,
    "contexts": CONTEXTS,
    "completions": COMPLETIONS,
    "completions of texts": [{"prompt": "What is the sea?", "completions": [" Blue.", " It is blue.", " Calm."]}],
    "text": [{"text": "the sea is blue"}, {"text": "the sky is calm and blue"}],
    "tokenized": IDS,
}


def both(rows, tokenizer, args):
    """The trained and the previewed rows, as (row number, ids, labels); the message instead if they are refused."""
    results = []
    for make in (_trained, _previewed):
        try:
            results.append(make(rows, copy.deepcopy(tokenizer), args))
        except ValueError as error:
            results.append(str(error))
    return results


def _trained(rows, tokenizer, args):
    trained = trainer_of(rows, tokenizer, args).train_dataset
    return sorted((row["miso_row"][0], row["input_ids"], row["labels"]) for row in trained)


def _previewed(rows, tokenizer, args):
    shown = preview_dataset(rows, tokenizer, args, SHAPE, rows=1000)
    check_plain(shown)
    return sorted((row["index"], row["ids"], row["labels"]) for row in shown["rows"] if not row["dropped"])


WITHOUT_TURNS = ("text", "tokenized", "completions of texts")


@pytest.mark.parametrize("train_turns", TRAIN_TURNS)
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_those_that_are_trained(name, train_turns, make_config):
    """With room for every row, for some answers of a row, and with other modes and templates."""
    rows = Dataset.from_list(ROWS[name])
    trained = set()
    for template, settings in (
        ("qwen3", {"max_length": None}),
        ("qwen3", {"max_length": 70, "chunk_probs": [0.2, 0.3, 0.5]}),
        ("qwen3", {"max_length": 70, "context_mode": "single"}),
        ("llama3", {"max_length": 100, "para_prob": 0.5, "output_positions": "successive"}),
    ):
        if "context_mode" in settings and train_turns != "auto":
            continue  # no effect on TRL's own preparation
        args = make_config(train_turns=train_turns, **settings)
        expected, shown = both(rows, TOKENIZERS[template], args)
        assert shown == expected, settings
        trained.add(isinstance(expected, list))
    assert (True in trained) != (train_turns != "auto" and name in WITHOUT_TURNS), "refused, without effect"


BROKEN = {"messages": [{"role": None, "content": "a"}]}
NO_TURNS = {"messages": [user("a"), {"role": "Assistant", "content": "b"}]}
TEXT = {"prompt": "What is the sea?", "completion": " Blue."}
REFUSED = {
    "an unknown eos token": (PROMPTS, {"eos_token": "<nope>"}),
    "an unknown pad token": (PROMPTS, {"pad_token": "<nope>"}),
    "masks of plain text": ([TEXT], {"assistant_only_loss": True}),
    "masks of texts": ([{"text": "the sea"}], {"assistant_only_loss": True}),
    "masks of an empty first row": ([{"messages": []}, CHATS[0]], {"assistant_only_loss": True}),
    "padding_free": (PROMPTS, {"padding_free": True, "max_length": 50}),
    "packing": (PROMPTS, {"packing": True, "max_length": None}),
    "images": ([PROMPTS[0] | {"image": "a.png"}], {}),
    "no rows": ([], {}),
    "columns": ([{"question": "a", "answer": "b"}], {}),
    "para of conversations": (CHATS, {"context_mode": "para"}),
    "para of texts": ([{"text": "the sea"}], {"context_mode": "para"}),
    "augment of prompts": (PROMPTS, {"context_mode": "augment"}),
    "bare of contexts": (CONTEXTS, {"include_bare": False}),
    "bare of chunks": (CHATS, {"include_bare": False}),
    "fid beside weights": (CONTEXTS, {"context_weighting": "fid"}),
    "full weight beside weights": (CONTEXTS, {"full_context_weight": 0.5}),
    "full weight of chunks": (CHATS, {"full_context_weight": 0.5}),
    "positions of chunks": (CHATS, {"output_positions": "after_longest"}),
    "weights beside constraints": ([CONSTRAINTS[1] | {"context_weights": [1.0]}], {}),
    "no full context": (
        [{"contexts": [SHOTS, SHOTS[:1]], "prompt": SHOTS[2:], "completion": ANSWERS[0]}],
        {"full_context_weight": 0.5},
    ),
    "loss of all": (CONSTRAINTS, {"completion_only_loss": False}),
    "a message": ([BROKEN], {}),
    "a role": ([CHATS[0], NO_TURNS], {}),
    "a role in single": ([CHATS[0], NO_TURNS], {"context_mode": "single"}),
    "a completion of another role": ([{"prompt": SHOTS, "completion": [user("b")]}], {}),
    "a completion of another kind": ([{"prompt": SHOTS, "completion": "b"}], {}),
    "completions": ([{"prompt": SHOTS, "completions": "b"}], {}),
    "train_turns": ([CHATS[0] | {"train_turns": "some"}], {}),
    "weights": ([CONTEXTS[0] | {"context_weights": [1.0, 2.0]}], {}),
    "constraints": ([PROMPTS[0] | {"constraints": "Rhyme."}], {}),
    "contexts that end differently": ([{"contexts": ["a sea", "a boat"], "completion": " b"}], {}),
    "a response template": ([TEXT], {"response_template": "\n### Response:\n"}),
    "tools": ([CHATS[0] | {"tools": "{"}], {}),
    "arguments of the template": ([CHATS[0] | {"chat_template_kwargs": {"tokenize": True}}], {}),
    "tokens": ([IDS[0] | {"input_ids": [10**6] * 20}], {}),
    "labels": ([IDS[0] | {"labels": [1, 2]}], {}),
    "runs": ([IDS[0] | {"seq_lengths": [30]}], {}),
    "nothing fits": (PROMPTS, {"max_length": 3}),
    "nothing to learn": ([{"prompt": SHOTS, "completion": [assistant("")]}], {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_training_refuses_is_refused_in_the_same_words(case, make_config):
    rows, settings = REFUSED[case]
    refused, said = both(Dataset.from_list(rows), TOKENIZERS["qwen3"], make_config(**settings))
    assert isinstance(refused, str)
    assert said == refused
    assert "Fix:" in refused


def test_tokenizers_that_training_refuses(make_config):
    without = copy.deepcopy(TOKENIZERS["qwen3"])
    without.chat_template = None
    no_end = copy.deepcopy(TOKENIZERS["qwen3"])
    no_end.eos_token = no_end.pad_token = None
    no_eos = copy.deepcopy(TOKENIZERS["qwen3"])
    no_eos.eos_token = None
    unmarked = copy.deepcopy(TOKENIZERS["qwen3"])
    unmarked.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for tokenizer, rows, settings in (
        (without, PROMPTS, {}),
        (no_end, PROMPTS, {}),
        (no_eos, [TEXT], {}),
        (unmarked, CHATS, {"assistant_only_loss": True}),
    ):
        refused, said = both(Dataset.from_list(rows), tokenizer, make_config(**settings))
        assert isinstance(refused, str) and said == refused


def test_a_transform_is_refused_as_in_training(make_config):
    rows = Dataset.from_list(PROMPTS).with_transform(lambda batch: batch)
    refused, said = both(rows, TOKENIZERS["qwen3"], make_config())
    assert said == refused and "with_transform" in refused
