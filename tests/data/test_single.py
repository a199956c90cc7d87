"""Rows that TRL prepares (modes single and augment): what is trained is what the row says, as in modes para and succ."""

from dataclasses import dataclass
from itertools import product

import pytest
from datasets import Dataset, IterableDataset
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase
from trl import SFTTrainer
from trl.chat_template_utils import has_generation_markers
from trl.trainer import sft_trainer

from tests.support.conversations import CONVERSATIONS, TEMPLATES, TOOLS, assistant, tokenizer_for, user
from tests.support.rows_oracle import parts_of
from trl_miso import MISOSFTConfig
from trl_miso.data.contexts import ContextRow
from trl_miso.data.pipeline import Pipeline
from trl_miso.data.schema import RowDropped
from trl_miso.data.sft_rows import SFTRows
from trl_miso.data.tokenization import NO_END, RowTokenizer

_TOKENIZERS = {}


def tokenizer_of(name):
    return _TOKENIZERS.setdefault(name, tokenizer_for(TEMPLATES[name]))


@dataclass
class SFTPreparation:
    """SFTTrainer's own preparation without a model: the attributes that it reads."""

    args: MISOSFTConfig
    _tokenizer: PreTrainedTokenizerBase
    completion_only_loss: bool | None
    chat_template: str | None = None

    def __call__(self, rows, tokenizer, name, completions_only):
        self.completion_only_loss = completions_only or self.completion_only_loss
        return SFTTrainer._prepare_dataset(self, rows, tokenizer, self.args, False, None, name)


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.fixture
def prepare(tmp_path):
    """The prepared rows of a dataset, for training or (given the mode that training rows have) for evaluation."""

    def prepare(rows, tokenizer, mode="single", training_mode=None, dataset_num_proc=None, **config):
        defaults = {"report_to": "none", "use_cpu": True, "bf16": False, "shuffle_dataset": False}
        defaults |= {"max_length": None, "dataset_num_proc": dataset_num_proc, "context_mode": mode}
        if mode == "succ":
            defaults["chunk_probs"] = [1.0]
        args = MISOSFTConfig(str(tmp_path), **defaults | config)
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        prepare_as_sft = SFTPreparation(args, tokenizer, args.completion_only_loss)
        return list(Pipeline.of(args, tokenizer, prepare_as_sft)(rows, "train", training_mode).rows)

    return prepare


def ids_of(rows):
    return [row["input_ids"] for row in rows]


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(name, **arguments):
    tool = {"role": "tool", "name": name, "content": "low water"}
    return [user("How is it?"), assistant("", tool_calls=[call(name, **arguments)]), tool, assistant("It is low.")]


# Null keys


@pytest.mark.parametrize("name", TEMPLATES)
def test_null_keys_that_arrow_adds_are_not_trained(name, prepare):
    """Rows whose tools and calls have different keys, and numbers that JSON would round."""
    tokenizer = tokenizer_of(name)
    dish = {"type": "object", "properties": {"dish": {"type": "string", "enum": ["soup", "fish"]}}}
    other_tools = [{"type": "function", "function": {"name": "get_dish", "description": "A dish.", "parameters": dish}}]
    conversations = [conversation("get_tide", place="Kiel", at=0.1234567890123), conversation("get_dish", dish="soup")]
    tools = [TOOLS, other_tools]
    expected = []
    try:
        for messages, own in zip(conversations, tools, strict=True):
            whole = tokenizer.apply_chat_template(messages, tools=own, return_dict=False)
            expected.append(whole)
            SFTRows("messages", tokenizer=RowTokenizer(tokenizer)).make({"messages": messages, "tools": own}, 0)
    except (RowDropped, ValueError, TypeError) as reason:
        pytest.skip(f"refused: {str(reason)[:100]}")
    except Exception as reason:  # a template's own error
        pytest.skip(f"cannot be rendered: {str(reason)[:100]}")
    rows = [{"messages": m, "tools": t} for m, t in zip(conversations, tools, strict=True)]
    split = [{"prompt": m[:3], "completion": m[3:], "tools": t} for m, t in zip(conversations, tools, strict=True)]
    assert ids_of(prepare(rows, tokenizer)) == expected
    for given in (split, stream(split), Dataset.from_list(split).to_iterable_dataset()):
        try:
            prepared = prepare(given, tokenizer)
        except ValueError as reason:  # the prompt is rendered differently once it is answered
            assert "renders the prompt differently" in str(reason) or isinstance(given, IterableDataset)
            continue
        assert ids_of(prepared) == expected


def test_null_keys_in_several_processes_and_modes(prepare):
    tokenizer = tokenizer_of("qwen3_training")
    conversations = [conversation("get_tide", place="Kiel"), conversation("get_tide", hour=0.1234567890123)]
    expected = [tokenizer.apply_chat_template(m, tools=TOOLS, return_dict=False) for m in conversations]
    rows = [{"messages": m, "tools": TOOLS} for m in conversations]
    assert ids_of(prepare(rows, tokenizer, dataset_num_proc=2)) == expected
    rows = [{"contexts": [m[:3]], "completion": m[3:], "tools": TOOLS} for m in conversations]
    for mode in ("single", "augment", "succ", "para"):
        assert ids_of(prepare(rows, tokenizer, mode)) == expected


@pytest.mark.parametrize("mode", ["single", "succ"])
def test_template_arguments_that_a_row_lacks_are_not_given_as_null(mode, prepare):
    tokenizer = tokenizer_for("{% if deep is not defined %}<think>{% endif %}" + TEMPLATES["qwen2_5"])
    prompt, completion = [user("What is the sea?")], [assistant("Blue.")]
    rows = [{"prompt": prompt, "completion": completion, "chat_template_kwargs": k} for k in ({"deep": 1}, {"dark": 1})]
    expected = [
        tokenizer.apply_chat_template(prompt + completion, return_dict=False, **row["chat_template_kwargs"])
        for row in rows
    ]
    assert len(expected[1]) == len(expected[0]) + 1
    assert ids_of(prepare(rows, tokenizer, mode)) == expected


# BOS and EOS of plain text


def contexts_of(row):
    return [[*context, *parts.output] for parts in parts_of(row) for context in parts.contexts]


@pytest.mark.parametrize("mode", ["single", "succ"])
def test_an_eos_that_a_tokenizer_in_python_adds_is_not_in_the_prompt(mode, prepare):
    tokenizer = ByT5Tokenizer()
    assert tokenizer("sea").input_ids[-1] == tokenizer.eos_token_id
    (row,) = prepare([{"prompt": "the sea ", "completion": "is blue"}], tokenizer, mode)
    assert row["input_ids"] == tokenizer("the sea is blue").input_ids


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True, None])
def test_plain_text_has_one_bos_and_one_eos(bos, eos, prepare):
    """Whether the tokenizer adds them, the text holds them, both or neither; in all modes, for training and evaluation.

    `bos=None`: the tokenizer adds it, as its file says, and `add_bos_token` does not know.
    """
    tokenizer = tokenizer_for(TEMPLATES["llama3"])
    tokenizer.add_bos_token, tokenizer.add_eos_token = bos is not False, eos
    if bos is None:
        tokenizer._add_bos_token = tokenizer._add_eos_token = False
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    added_before = tokenizer("sea").input_ids
    for before, after in product(["", tokenizer.bos_token], ["", tokenizer.eos_token]):
        text = {"text": f"{before}the sea is blue{after}"}
        prompt = {"prompt": f"{before}the sea is calm\n", "completion": f"it is{after}"}
        contexts = {"contexts": [prompt["prompt"], f"{before}the ship\n"], "completion": prompt["completion"]}
        cases = [(text, "single"), (prompt, "single"), (prompt, "succ"), (contexts, "para"), (contexts, "augment")]
        for (row, mode), training_mode in product(cases, (None, "para", "single")):
            prepared = prepare([row], tokenizer, mode, training_mode)
            for ids in (ids for one in prepared for ids in contexts_of(one)):
                assert ids.count(start) == (bos is not False or bool(before))
                assert ids[0] == start or start not in ids
                assert ids.count(end) == 1
                assert ids[-1] == end
            labels = [label for one in prepared for label in one["labels"] if label != -100]
            assert labels[-1] == end
            bare = row | {name: row[name].removeprefix(before) for name in ("text", "prompt") if name in row}
            if "contexts" in row:
                bare = row | {"contexts": [context.removeprefix(before) for context in row["contexts"]]}
            if bos is not False:
                assert prepared == prepare([bare], tokenizer, mode, training_mode)
    assert tokenizer("sea").input_ids == added_before, "the user's tokenizer is left alone"


# What the other modes refuse or note


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_are_refused_as_in_the_other_modes(name, kind):
    messages = CONVERSATIONS[kind]
    tokenizer = RowTokenizer(tokenizer_of(name))
    row = {"prompt": messages[:-1], "completion": messages[-1:], "tools": TOOLS if kind == "tools" else None}

    def reason(function):
        try:
            result = function()
        except (RowDropped, ValueError) as error:
            return str(error).removeprefix("Row 0: ")
        return str(result) if isinstance(result, RowDropped) else ""

    def as_succ():
        (result,) = tokenizer([ContextRow([messages[:-1]], messages[-1:])], [{"tools": row["tools"]}])
        return result

    assert reason(lambda: SFTRows("prompt", tokenizer=tokenizer).make(row, 0)) == reason(as_succ)


def notes(prepared):
    return {note for row in prepared for note in row["miso_notes"]}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_missing_end_of_turn_is_noted_as_in_the_other_modes(name, prepare, caplog):
    tokenizer = tokenizer_of(name)
    row = {"prompt": [user("What is the sea?")], "completion": [assistant("It is blue.")]}
    try:
        expected = NO_END in notes(prepare([row], tokenizer, "succ"))
    except ValueError as reason:
        pytest.skip(f"refused: {str(reason)[:100]}")
    assert expected == (name == "glm4moe")
    for given in ([row], stream([row])):
        caplog.clear()
        assert (NO_END in notes(prepare(given, tokenizer))) == expected
        assert (NO_END in caplog.text) == expected
    if has_generation_markers(TEMPLATES[name]):
        chat = {"messages": row["prompt"] + row["completion"]}
        assert (NO_END in notes(prepare([chat], tokenizer, assistant_only_loss=True))) == expected
    assert not notes(prepare([{"messages": row["prompt"] + row["completion"]}], tokenizer))


def test_trl_warns_of_a_prompt_whose_end_training_lacks(prepare, caplog):
    row = {"prompt": [user("What is the sea?")], "completion": [assistant("It is blue.")]}
    type(sft_trainer.logger).warning_once.cache_clear()
    prepare([row], tokenizer_of("deepseek_r1_distill"))
    assert "is left out of the training sequence: '<think>\\n'" in caplog.text


# Several completions of one prompt


def answers(prepared):
    """(tokens before, labels) of each answer in each of its contexts, in an order of their own."""
    found = []
    for row in prepared:
        for parts in parts_of(row):
            start = next(i for i, label in enumerate(parts.labels) if label != -100)
            for context in parts.contexts:
                found.append(([*context, *parts.output[:start]], parts.output[start:], parts.labels[start:]))
    return sorted(found)


def as_chat(value):
    return [user(value)]


TEXTS = ["It is blue.", "It is calm and blue.", "Wet."]
PROMPTS = {
    "prompt": {"prompt": "What is the sea?\nAnswer:\n"},
    "constraints": {"prompt": "What is the sea?\nAnswer:\n", "constraints": ["Be brief.", "Rhyme!"]},
    "contexts": {"contexts": ["What is the sea?\nAnswer:\n", "And the ocean?\nAnswer:\n"]},
}


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("mode", ["single", "succ", "para", "augment"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_each_completion_is_trained(kind, mode, is_chat, prepare):
    """Equal to rows of one completion each, for training and evaluation; the tokens of a prompt are stored once."""
    if kind == "prompt" and mode in ("para", "augment"):
        pytest.skip("one context")
    tokenizer, row, completions, config = tokenizer_of("qwen2_5"), dict(PROMPTS[kind]), TEXTS, {}
    if is_chat:
        row |= (
            {"prompt": as_chat(row["prompt"])} if "prompt" in row else {"contexts": list(map(as_chat, row["contexts"]))}
        )
        completions = [[assistant(text)] for text in TEXTS]
    elif kind == "constraints" and mode in ("para", "augment"):
        config = {"response_template": "\nAnswer:\n"}
    first = row | {"completion": completions[0]}
    given = [
        [row | {"completion": None, "completions": completions}, first | {"completions": None}],
        stream([row | {"completions": completions}, row | {"completions": completions[:1]}]),
    ]
    for training_mode in (None, "para", "single"):
        rows = [row | {"completion": one} for one in completions] + [first]
        expected = prepare(rows, tokenizer, mode, training_mode, **config)
        for rows in given:
            prepared = prepare(rows, tokenizer, mode, training_mode, **config)
            assert answers(prepared) == answers(expected)
            if (training_mode or mode) in ("para", "succ"):
                assert len(prepared) == 2
                assert sum(map(len, ids_of(prepared))) < sum(map(len, ids_of(expected)))


@pytest.mark.parametrize("mode", ["single", "succ"])
def test_rows_without_completions_are_dropped_and_counted(mode, prepare, caplog):
    row = {"prompt": "the sea", "completions": ["blue"]}
    prepared = prepare([row | {"completions": []}, row, row | {"completions": None}], tokenizer_of("qwen2_5"), mode)
    assert [one["miso_row"] for one in prepared] == [[1]]
    assert "(first: row 0): no output: the completions column is empty" in caplog.text
    assert "(first: row 2): no output: the completion is empty" in caplog.text


@pytest.mark.parametrize("mode", ["single", "succ"])
def test_a_completion_beside_completions_is_refused(mode, prepare):
    row = {"prompt": "the sea", "completion": "blue", "completions": ["calm", "deep"]}
    with pytest.raises(ValueError, match=r"Row 1: Got .* 'completion' and in column 'completions', expected one.*Fix"):
        prepare([row | {"completions": []}, row], tokenizer_of("qwen2_5"), mode)


@pytest.mark.parametrize(("mode", "extra"), [("single", {}), ("succ", {}), ("para", {"constraints": ["Rhyme!"]})])
def test_completions_beside_messages_without_a_prompt_are_not_read(mode, extra, prepare):
    """Else the last answer would be trained once per completion."""
    row = {"messages": [user("the sea"), assistant("Blue.")]} | extra
    expected = prepare([row, row, row], tokenizer_of("qwen2_5"), mode)
    beside = [row | {"completions": given} for given in (["calm", "deep"], [], None)]
    assert prepare(beside, tokenizer_of("qwen2_5"), mode) == expected
    assert prepare([one | {"completion": "blue"} for one in beside], tokenizer_of("qwen2_5"), mode) == expected


def test_completions_beside_messages_and_checks_before_loading(prepare, tmp_path):
    """The prompt is the column's, not the messages'; a wrong context is refused without a tokenizer."""
    tokenizer, completions = tokenizer_of("qwen2_5"), [[assistant("Blue.")], [assistant("Calm.")]]
    row = {"prompt": [user("the sea")], "constraints": ["Rhyme!"], "messages": [user("a"), assistant("b")]}
    expected = prepare([row | {"completion": one} for one in completions], tokenizer, "para")
    assert answers(prepare([row | {"completions": completions}], tokenizer, "para")) == answers(expected)
    args = MISOSFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    wrong = {"contexts": [[user("the sea")], "the sea"], "completions": completions}
    with pytest.raises(ValueError, match=r"Row 0: .*expected all of a row's prompts, contexts and completion"):
        Pipeline.of(args).check(stream([wrong]))
