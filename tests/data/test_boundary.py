"""Where the label of an answer begins and ends, and what is said of rows whose template leaves something out."""

import logging

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.conversations import TEMPLATES, TOOLS, assistant, tokenizer_for, user
from trl_miso import MISOSFTTrainer
from trl_miso.data.boundary import NOT_CONTAINED, answer_start
from trl_miso.data.schema import RowDropped
from trl_miso.data.tokenization import LOST_REASONING, NO_END, OTHER_END
from trl_miso.data.turns import OPENING

# Like Mistral 7B v0.3's: the system prompt stands before the last request, and only while that is the last turn.
LOSES_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system + '\\n\\n' }}{% endif %}"
    "{{ m.content }}[/INST]{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# Like Tulu's: a turn within the conversation ends in a line break, and the last one does not.
TULU = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + eos_token }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% else %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@pytest.fixture
def train(make_config):
    def train(rows, template, mode="auto", **options):
        tokenizer = tokenizer_for(template)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        if mode == "auto" and "constraints" not in rows.column_names:
            options = {"chunk_probs": [1.0]} | options
        args = make_config(context_mode=mode, max_length=2000, **options)
        trainer = MISOSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
        return [_labelled(row, tokenizer) for row in trainer.train_dataset], trainer

    return train


def _labelled(row, tokenizer):
    """The texts of the runs of labels."""
    runs, run = [], []
    for label in [*row["labels"], -100]:
        if label != -100:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def told(caplog):
    return [r.getMessage().split("] ", 1)[-1] for r in caplog.records if r.levelno >= logging.WARNING]


TWO_ANSWERS = {"messages": [user("What is 2+2?"), assistant("It is 4."), assistant("And the sea is blue.")]}


def test_two_answers_in_a_row(train, caplog):
    """Each answer and its end alone; or the row is dropped where the first is rendered differently later on."""
    good = {"messages": [user("What is the sea?"), assistant("Blue.")]}
    ((first, second), *_), _ = train([TWO_ANSWERS], TEMPLATES["qwen2_5"])
    assert (first, second) == ("It is 4.<|im_end|>\n", "And the sea is blue.<|im_end|>\n")
    ((first, second),), trainer = train([TWO_ANSWERS], TULU)
    assert (first, second) == ("It is 4.<|endoftext|>", "And the sea is blue.<|endoftext|>")
    assert any(OTHER_END in line for line in told(caplog))
    caplog.clear()
    (kept,), trainer = train([TWO_ANSWERS, good], TEMPLATES["qwen3"])
    assert kept == ["<think>\n\n</think>\n\nBlue.<|im_end|>\n"]
    assert trainer.dropped_rows == {"train": {NOT_CONTAINED: [0]}}
    assert f"Dropped 1 of 2 rows of the train dataset (first: row 0): {NOT_CONTAINED}." in told(caplog)


@pytest.mark.parametrize("mode", ["auto", "single"])
def test_a_system_prompt_that_an_answered_prompt_lacks_is_no_detail(mode, train):
    """Also where another turn repeats its words."""
    row = {
        "prompt": [{"role": "system", "content": "One word."}, user("What is the sea? One word.")],
        "completion": [assistant("Blue.")],
    }
    with pytest.raises(ValueError, match=f"{NOT_CONTAINED}|leaves out 'One word.'"):
        train([row], LOSES_SYSTEM, mode)
    ((answer,),), _ = train([row | {"prompt": row["prompt"][1:]}], LOSES_SYSTEM, mode)
    assert answer.strip() == "Blue.<|endoftext|>"


def test_the_error_in_para_names_what_the_template_does(train):
    row = {
        "prompt": [{"role": "system", "content": "Be kind."}, user("What is the sea? Be kind.")],
        "constraints": ["Use one word.", "Rhyme."],
        "completion": [assistant("Blue.")],
    }
    with pytest.raises(ValueError, match=f"{NOT_CONTAINED}|leaves out"):
        train([row], LOSES_SYSTEM)
    two = {"prompt": TWO_ANSWERS["messages"][:2] + [user("Go on.")], "completion": [assistant("Blue.")]}
    train([two | {"constraints": ["Rhyme.", "Be brief."]}], TEMPLATES["qwen3"])


REASONS = [
    assistant("Four.", reasoning_content="Two and two."),
    assistant("Four.", reasoning="Two and two."),
    assistant("<think>Two and two.</think>Four."),
    assistant("<think>Two and two.</think>"),
]


@pytest.mark.parametrize("mode", ["auto", "single"])
@pytest.mark.parametrize("answer", REASONS)
@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3", "deepseek_r1_distill", "glm4moe"])
def test_reasoning_is_trained_or_the_row_is_dropped(name, answer, mode, train, caplog):
    rows = [{"prompt": [user("What is 2+2?")], "completion": [m]} for m in (answer, assistant("Four."))]
    runs, trainer = train(rows, TEMPLATES[name], mode)
    if trainer.dropped_rows["train"]:
        assert trainer.dropped_rows["train"] == {LOST_REASONING: [0]}
        assert any(LOST_REASONING in line for line in told(caplog))
    else:
        assert "Two and two." in "".join(runs[0])


def test_an_end_of_the_prompt_that_training_lacks_is_told(train, caplog):
    rows = [{"messages": [user("What is 2+2?"), assistant("Four.")]}] * 3
    runs, _ = train(rows, TEMPLATES["deepseek_r1_distill"])
    assert runs == [["Four.<｜end▁of▁sentence｜>"]] * 3
    (line,) = told(caplog)
    assert line == f"3 of 3 rows of the train dataset (first: row 0): {OTHER_END}: '<think>\\n'."


def test_an_answer_without_an_end_of_its_turn_is_told(train, caplog):
    rows = [{"messages": [user("What is 2+2?"), assistant("Four.")]}] * 2
    train(rows, TEMPLATES["glm4moe"])
    assert told(caplog) == [f"2 of 2 rows of the train dataset (first: row 0): {NO_END}."]
    caplog.clear()
    train(rows, TEMPLATES["qwen2_5"])
    assert not told(caplog)


def test_what_opens_a_conversation_is_told(train, caplog):
    rows = [{"messages": [assistant("Ahoy!"), user("What is 2+2?"), assistant("Four.")]}]
    runs, _ = train(rows, TEMPLATES["qwen2_5"])
    assert runs == [["Four.<|im_end|>\n"]]
    assert told(caplog) == [f"1 of 1 rows of the train dataset (first: row 0): {OPENING}."]


@pytest.mark.parametrize("train_turns", ["auto", "last"])
def test_turns_of_other_roles_are_told(train_turns, train, caplog):
    """As in ShareGPT rows with tools: a template of any role renders them."""
    said = [
        ("human", "How is the tide?"),
        ("function_call", '{"name": "get_tide"}'),
        ("observation", "low"),
        ("gpt", "Low."),
    ]
    rows = [{"conversations": [{"from": role, "value": text} for role, text in said]}] * 2
    runs, _ = train(rows, TEMPLATES["lfm2"], train_turns=train_turns)
    assert runs == [["Low.<|im_end|>\n"]] * 2
    notes = [f"a turn of role '{role}' is read and not trained" for role in ("function_call", "observation")]
    if train_turns == "last":
        notes = []
    lines = told(caplog)
    assert len(lines) == len(notes)
    for line, note in zip(lines, notes, strict=True):
        assert line.startswith(f"2 of 2 rows of the train dataset (first: row 0): {note}")


def test_tools_that_a_template_leaves_out_are_an_error(train):
    row = {"messages": [user("How is the tide?"), assistant("Low.")], "tools": TOOLS}
    for mode in ("auto", "single"):
        with pytest.raises(
            ValueError, match=r"^Row 0: Got 1 tools in column 'tools', which the chat template leaves out"
        ):
            train([row], TEMPLATES["phi3"], mode)
    train([row], TEMPLATES["qwen2_5"])


def test_null_arguments_of_arrow_are_not_rendered(train):
    def call(name, **arguments):
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    turns = [
        [user("How is the tide?"), assistant("", tool_calls=[call("get_tide", place="Kiel")])],
        [user("What is for lunch?"), assistant("", tool_calls=[call("get_dish", dish="soup")])],
    ]
    rows = Dataset.from_list([{"messages": messages} for messages in turns])
    assert "None" in str(rows[0]), "Arrow fills in the other call's argument"
    runs, _ = train(rows, TEMPLATES["qwen2_5"])
    assert [run[0].count("null") for run in runs] == [0, 0]
    assert '"arguments": {"place": "Kiel"}' in runs[0][0]


# The search for the beginning of an answer, on texts


def start(before, header, whole, content):
    return answer_start(before, before + header, whole, lambda: whole.index(content), lambda: len(before))


@pytest.mark.parametrize(
    ("before", "header", "whole", "label"),
    [
        ("u1\n", "<a>", "u1\n<a>Four.", "Four."),
        ("u1\n", "<a>", "u1\n<a><think></think>Four.", "<think></think>Four."),
        ("u1\n", "<a><think>", "u1\n<a>Four.", "Four."),
        ("u1 a1", "<a>", "u1 a1\n<a>Four.", "Four."),
        ("u1", "", "u1 Four.", " Four."),
        ("u1\n", "[a]", "u1\n<b>Four.", "Four."),
    ],
)
def test_the_label_begins_behind_the_header(before, header, whole, label):
    assert whole[start(before, header, whole, "Four.") :] == label


def test_a_prompt_that_the_conversation_does_not_contain_is_refused():
    with pytest.raises(RowDropped, match=NOT_CONTAINED):
        start("system u1", "<a>", "u1<a>Four.", "Four.")
    # What stands behind the last message may differ.
    assert answer_start("u1 END", "u1 END<a>", "u1<a>Four.", lambda: 5, lambda: 2) == 5
