"""Bad rows, templates and tokenizers: each is an error that names row and column, or a row that is dropped and counted.

The matrix puts one bad value into one column of row 2 of 4, in every format and mode: in a Dataset, and in a stream of Python
rows, where Arrow neither refuses nor converts values.
"""

import datetime
import importlib.metadata
import re
from contextlib import nullcontext, suppress
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, disable_progress_bars, enable_progress_bars
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from transformers.trainer_callback import PrinterCallback

from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.sources.synthetic import build_tokenizer, synthetic_rows

SIZE = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
HALF = "\ud83d half a pair"


def user(content, role="user", **keys):
    return {"role": role, "content": content, **keys}


def assistant(content, **keys):
    return user(content, "assistant", **keys)


def turn(value, speaker):
    return {"from": speaker, "value": value}


# fmt: off
END = "\nAnswer:\n"
PROMPT, ANSWER = [user("Describe the sea.")], [assistant("blue")]
ROWS = {
    "constraints": {"prompt": f"the sea{END}", "constraints": ["Rhyme!", "Sing!"], "completion": "blue"},
    "constraints_chat": {"prompt": PROMPT, "constraints": ["Rhyme!"], "completion": ANSWER, "full_prompt": PROMPT},
    "contexts": {"contexts": [f"sea{END}", f"ship{END}"], "completion": "blue", "context_weights": [1.0, 2.0]},
    "contexts_chat": {"contexts": [PROMPT, [user("a ship")]], "completion": ANSWER, "prompt": PROMPT},
    "prompt": {"prompt": f"the sea{END}", "completion": "blue"},
    "prompt_chat": {"prompt": PROMPT, "completion": ANSWER, "tools": None, "chat_template_kwargs": None},
    "messages": {"messages": PROMPT + ANSWER},
    "conversations": {"conversations": [turn("the sea", "human"), turn("blue", "gpt")]},
    "text": {"text": "the sea is blue"},
    "tokenized": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
}
MODES = {"constraints": ["auto", "succ", "single", "augment"], "contexts_chat": ["auto", "succ", "augment"]}
MODES |= {"text": ["auto"], "tokenized": ["auto"]}
# where the output begins, or constraints stand, as the response template says
WITH_TEMPLATE = {(kind, mode) for kind in ("constraints", "contexts", "prompt") for mode in ("auto", "succ")}
WITH_TEMPLATE |= {("constraints", "single"), ("constraints", "augment")}
MATRIX = [(kind, mode, name) for kind in ROWS for mode in MODES.get(kind, ["auto", "single"]) for name in ROWS[kind]]

NOTHING = [..., None]  # no such column, and null
NO_TEXT = [5, float("nan"), True, b"blue", datetime.datetime(2024, 1, 1), {"a": {"b": [1]}}, np.float32(2)]
NO_TEXT += [np.array(["a", "b"]), [None], ["a"], [["a"]]]
BAD_MESSAGES = [{"content": "a"}, user("a", None), user("a", 5), user("a", "USER"), user(5), user(b"a"), user(["a"])]
BAD_MESSAGES += [user([{"type": "text", "text": None}]), user([{"type": "image"}]), user("a", tool_calls=5)]
BAD_MESSAGES += [user("a", tool_calls=["f"]), user(HALF), user("a", "\ud83d")]
NO_WORDS = [{"role": "user"}, user(None), user(" \n"), user([])]
# column -> (values that are errors, values that drop the row, values that are fine), each as a stream gives it
TEXTS = ([*NO_TEXT, HALF], [*NOTHING, "", " \n", []], ["a\0b", "\U0001f600"])
SYSTEM = [user("Be brief.", "system"), *PROMPT]
CHATS = ([*NO_TEXT, HALF, "a string", *([message] for message in BAD_MESSAGES)],
         [*NOTHING, "", " ", [], *([message] for message in NO_WORDS)],
         [SYSTEM, [*PROMPT, *ANSWER, *SYSTEM], [*PROMPT, *PROMPT], [*ANSWER, *PROMPT], [user(""), *PROMPT],
          [user("a", "wizard")], [user("a", note={"x": [1]})]])
LISTS = ["Rhyme.", "", HALF, 5, float("nan"), b"x", {"a": 1}, [None], [5], [HALF], [["a"]], ["a", [user("b")]]]
KINDS = {
    "prompt": (*TEXTS[:2], [f"{text}{END}" for text in TEXTS[2]]),
    "completion": TEXTS,
    "constraints": (LISTS, [], [*NOTHING, [], ["", " "], ["a", "a"], ["a\nb"], ["the sea"], ["sea"], ["the sea", "Rhyme!"], [f"No {i}." for i in range(40)]]),
    "contexts": ([*LISTS, [PROMPT, PROMPT]], [*NOTHING, [], [f"sea{END}", " "]], [[f"a{END}"] * 2]),
    "context_weights": (
        [5, "1", [1.0], [1, 2, 3], [-1, 2], [float("nan"), 1], [float("inf"), 1], [0, 1], [0, 0], ["1", "2"], [None, 1],
         [1e-320, 1e29], [1e308, 1e308], [10**400, 1]],
        [], [*NOTHING, [1, 2], [np.float32(1), 2.0]]),
    "prompt_chat": CHATS,
    "completion_chat": ([*CHATS[0], [user("b")], [user("b", "wizard")], [*PROMPT, *ANSWER]], CHATS[1],
                        [[assistant("x"), user("y"), assistant("z")]]),
    "constraints_chat-prompt": ([*CHATS[0], [user("a", "wizard")], [*PROMPT, *ANSWER]], CHATS[1],
                                [chat for chat in CHATS[2] if chat[-1]["role"] == "user"]),
    "contexts_chat-prompt": (CHATS[0], [[user(" ")]], [*NOTHING, "", " ", [], *CHATS[2]]),
    "full_prompt_chat": (CHATS[0], [[user(" ")]], [*NOTHING, "", " ", [], *CHATS[2]]),
    "contexts_chat": ([*LISTS, ["a", "b"], *([PROMPT, [message]] for message in BAD_MESSAGES)],
                      [[PROMPT, []], *([PROMPT, [message]] for message in NO_WORDS)],
                      [*NOTHING, [], [PROMPT], [PROMPT, PROMPT]]),
    "tools_chat": (["x", "5", "[5]", '{"a": 1}', 5, float("nan"), [5], {"a": 1}, '["\\ud83d"]'], [], [*NOTHING, "", "[]", []]),
    "chat_template_kwargs_chat": (
        ["x", 5, [], [1], {"tokenize": True}, {"messages": []}, {"add_generation_prompt": True}, {5: 5}, {"a": HALF}],
        [], [*NOTHING, {}, {"mood": "calm"}]),
    "messages": (["a string", "", HALF, *NO_TEXT, *([message, *ANSWER] for message in BAD_MESSAGES)], [*NOTHING, []],
                 [PROMPT + ANSWER + PROMPT + ANSWER, SYSTEM[:1] + ANSWER]),
    "conversations": (
        ["a", 5, [None], ["a"], [turn("a", ["human"]), *ANSWER], [turn("a", 5), *ANSWER], [turn(5, "human"), *ANSWER]],
        [*NOTHING, []], [[turn("x", "HUMAN"), turn("y", "GPT")], [turn("x", "user"), *ANSWER]]),
    "text": ([*NO_TEXT, HALF, [], PROMPT], [*NOTHING, "", " \n"], ["a string", "a\0b"]),
    "input_ids": (
        ["5 6", 5, {"a": 1}, ["5", "6", "7"], [5.0, 6.0, 7.0], [5, None, 7], [True] * 3, [[5, 6, 7]], [5, 6], [-1, 6, 7],
         [5, 6, 1024], [5, 6, 2**40]],
        [*NOTHING, []], [np.array([5, 6, 7]), [np.int64(5), 6, 7]]),
    "labels": ([*NOTHING, "a", 5, [], [6, 7], [6] * 4, [-100, -5, 6], [-100, 1024, 6], [-100.0, 6.0, 7.0], [None, 6, 7]],
               [[-100] * 3, [6, -100, -100]],  # no token precedes the first one, so nothing predicts it
               [np.array([-100, 6, 7])]),
}
# fmt: on

OUTCOMES = "error", "dropped", "prepared"
# columns that a mode does not read, or reads in part
UNREAD = {("constraints_chat", "single"): ["prompt", "constraints"], ("contexts_chat", "succ"): ["contexts"]}
UNREAD |= {("contexts", "single"): ["contexts", "context_weights"]}


@pytest.fixture(scope="module")
def tok():
    return build_tokenizer(synthetic_rows(200))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(PrinterCallback, "on_log", lambda *args, **kwargs: None)
    # takes a fifth of the time of making a trainer
    monkeypatch.setattr(importlib.metadata, "metadata", cache(importlib.metadata.metadata))
    disable_progress_bars()
    yield
    enable_progress_bars()


@pytest.fixture
def fit(tok, tmp_path):
    """Makes a trainer on rows, as a Dataset or a stream; None if Arrow cannot hold the rows."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, **SIZE))

    def fit(rows, streamed=False, tokenizer=tok, eval_rows=None, model=model, formatting_func=None, **config):
        defaults = {"report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 1, "shuffle_dataset": False}
        defaults |= {"gradient_checkpointing": False, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
        args = MISOSFTConfig(str(tmp_path), **defaults | {"max_length": 512} | config)
        sets = [as_dataset(part, streamed) if isinstance(part, list) else part for part in (rows, eval_rows)]
        options = {"processing_class": tokenizer, "formatting_func": formatting_func}
        if sets[0] is None:  # Arrow itself refuses the rows
            return None
        return MISOSFTTrainer(model, args, train_dataset=sets[0], eval_dataset=sets[1], **options)

    return fit


def as_dataset(rows, streamed):
    if streamed:
        return IterableDataset.from_generator(lambda: iter(rows))
    for types in (None, "use_json"):
        with suppress(Exception):
            return Dataset.from_list(rows, on_mixed_types=types)
    return None


def prepared(trainer):
    """Prepared rows, by the number of the raw row."""
    rows = {}
    for row in trainer.train_dataset:
        assert any(label != -100 for label in row["labels"][1:])
        rows.setdefault(row["miso_row"][0], []).append((row["input_ids"], row["labels"], row["miso_layout"]))
    return rows


def learns(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return bool(losses) and all(0 < loss < 100 for loss in losses)


def outcome(fit, good, bad, column, streamed, alone, **config):
    """Outcome of a bad row among good rows, whose prepared form is `alone`. AssertionError for outcomes that are not allowed."""
    try:
        trainer = fit([good, good, bad, good], streamed, **config)
    except ValueError as error:
        # Arrow may have converted the whole column, so that row 0 is bad too.
        names_row = re.match(r"Row 2: " if streamed else r"Row [02]: ", str(error))
        names_column = any(name in str(error) for name in (f"'{column}'", "chat template", "response_template"))
        assert names_row and names_column and re.search("Got .*xpected .*Fix: ", str(error), re.DOTALL), str(error)
        return "error"
    if trainer is None:
        return "error"  # raised by Arrow, before the trainer
    rows, dropped = prepared(trainer), trainer.dropped_rows["train"]
    assert all(rows[i] == alone for i in (0, 1, 3)), "a good row was changed"
    assert sum(dropped.values(), []) == ([] if 2 in rows else [2])
    return "dropped" if dropped else "prepared"


@pytest.mark.parametrize(("kind", "mode", "column"), MATRIX)
def test_a_bad_value_is_an_error_or_counted(kind, mode, column, fit):
    good = ROWS[kind]
    config = {"context_mode": mode, "response_template": END if (kind, mode) in WITH_TEMPLATE else None}
    keys = f"{kind}-{column}", f"{column}_chat" if kind.endswith("_chat") else column, column
    values = next(KINDS[key] for key in keys if key in KINDS)
    exact = column not in UNREAD.get((kind, mode), [])
    alone = {streamed: prepared(fit([good], streamed, **config))[0] for streamed in (True, False)}
    cells = [(expected, value) for expected, some in zip(OUTCOMES, values, strict=True) for value in some]
    wrong = []
    for n, (expected, value) in enumerate(cells):
        bad = {name: given for name, given in good.items() if name != column}
        bad |= {} if value is ... else {column: value}
        # Every value as a stream in the first mode; elsewhere a sample that differs by mode.
        for streamed, every in ((True, 1 if mode == "auto" else 4), (False, 5)):
            if (n + len(mode)) % every:
                continue
            try:
                was = outcome(fit, good, bad, column, streamed, alone[streamed], **config)
            except Exception as error:
                was = f"{type(error).__name__}: {str(error)[:300]}"
            if was != expected if streamed and exact else was not in OUTCOMES:
                wrong.append(f"{'stream' if streamed else 'dataset'} {value!r:.80}: {expected} != {was}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in ROWS for mode in MODES.get(kind, ["auto"])])
def test_good_rows_train_among_dropped_ones(kind, mode, fit):
    """Among rows that are dropped, good rows have the same loss as alone."""
    good = ROWS[kind]
    column = "completion" if "completion" in good else next(iter(good))
    _, dropped, _ = KINDS.get(f"{column}_chat" if kind.endswith("_chat") else column) or KINDS[column]
    rows = [good, *(good | {column: value} for value in dropped if isinstance(value, list | None)), good]
    config = {"context_mode": mode, "response_template": END if (kind, mode) in WITH_TEMPLATE else None}
    expected = fit([good], eval_rows=[good, good], **config).evaluate()["eval_loss"]
    trainer = fit(rows, eval_rows=rows, **config)
    assert {len(reasons) for reasons in trainer.dropped_rows.values()} == {1}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)
    assert 0 < expected < 100 and learns(trainer)


EVAL_ROWS = {
    "Row 1: .*completion": [ROWS["prompt"], ROWS["prompt"] | {"completion": 5}],
    "Row 0: .*text": [{"text": ["a"]}],
    "Row 0: .*labels": [{"input_ids": [5, 6], "labels": [5]}],
    "Got no rows in the eval dataset": [],
    "Got a (eval|streamed) dataset .*none of": [ROWS["prompt"] | {"prompt": ""}],
}


@pytest.mark.parametrize("message", EVAL_ROWS)
@pytest.mark.parametrize(("mode", "streamed"), [("auto", True), ("single", False)])
def test_bad_evaluation_rows_are_errors_too(message, mode, streamed, fit):
    with pytest.raises(ValueError, match=f"{message}.*Fix") as caught:
        fit([ROWS["prompt"]], eval_rows=as_dataset(EVAL_ROWS[message], streamed), context_mode=mode)
    assert streamed or not message.startswith("Row") or "eval dataset" in caught.value.__notes__[0]


CHAT = ROWS["constraints_chat"] | {"full_prompt": None}


@pytest.mark.parametrize(
    ("first", "late"),
    [
        (CHAT, {"full_prompt": [user("Rhyme!", name="x")]}),
        (ROWS["conversations"], {"conversations": [*PROMPT, assistant("b", note=5)]}),
        (ROWS["prompt_chat"], {"tools": "[]", "chat_template_kwargs": {"mood": "calm"}}),
        (ROWS["prompt"], {"prompt": 5}),
        (ROWS["prompt"], {"prompt": {"a": 1}}),
    ],
)
@pytest.mark.parametrize(("mode", "num_proc"), [("auto", None), ("single", None), ("single", 2)])
def test_rows_beyond_those_that_arrow_infers_types_from(first, late, mode, num_proc, fit):
    rows, config = [first] * 1001 + [first | late], {"context_mode": mode, "dataset_num_proc": num_proc}
    if first is ROWS["prompt"]:
        with pytest.raises(ValueError, match=r"^Row 1001: Got .* in column 'prompt', expected .*Fix"):
            fit(rows, **config)
    elif num_proc is None or first is CHAT:  # worker processes are slow
        assert prepared(fit(rows, **config))[1001] == prepared(fit(rows[-1:], context_mode=mode))[0]


@pytest.mark.parametrize("mode", ["auto", "single"])
def test_text_and_messages_in_one_stream(mode, fit):
    chat, text = ({"prompt": p, "completion": c} for p, c in ((PROMPT, ANSWER), ("a", "b")))
    for rows in ([chat] * 300 + [text], [text] * 300 + [chat], [chat | {"completion": None}] + [chat] * 299 + [text]):
        with pytest.raises(ValueError, match=r"^Row 300: Got rows of plain text and rows of messages.*Fix"):
            fit(rows, True, context_mode=mode)


def test_the_fix_for_half_a_surrogate_pair_works(fit):
    row = {"prompt": "a \ud83d\ude00 and \ud83d", "completion": "b"}
    with pytest.raises(ValueError, match=r"^Row 0: Got '\\ud83d' in column 'prompt' .*Fix: text\.encode") as caught:
        fit([row], True)
    encode, decode = re.search(r"encode\((.*?)\)\.decode\((.*?)\)", str(caught.value)).groups()
    mended = row["prompt"].encode(*re.findall(r"[\w-]+", encode)).decode(*re.findall(r"[\w-]+", decode))
    assert mended == "a \U0001f600 and \ufffd"
    fit([row | {"prompt": mended}], True)


LOOP = "{% for m in messages %}%s{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TURN = "<|{{ m.role }}|>{{ m.content }}"
TEMPLATES = {
    "raises": "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('No ' + m.role) }}{% endif %}" + TURN,
    "ignores": "{% if m.role in ['user', 'assistant'] %}" + TURN + "{% endif %}",
    "reads parts": "<|{{ m.role }}|>{% for part in m.content %}{{ part.text or part }}{% endfor %}",
    "trims and drops thinking": "<|{{ m.role }}|>{{ (m.content | trim).split('</think>')[-1] }}",
    "no answers": "{% if m.role != 'assistant' %}" + TURN + "{% endif %}",
    "calls": TURN + "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}",
    "fails": "{{ 1 / 0 }}",
}
TURNS = {
    "brief": [user("s", "system"), *PROMPT, *ANSWER],
    "wizard": [*PROMPT, user("e", "wizard"), *ANSWER],
    "parts": [user([{"type": "text", "text": "the "}, {"type": "text", "text": "sea"}]), *ANSWER],
    "calls": [*PROMPT, assistant("", tool_calls=[{"type": "function", "function": {"name": "sail"}}])],
    "thinking": [*PROMPT, assistant("<think>no</think> Hi.\n"), *PROMPT, *ANSWER],
}


@pytest.mark.parametrize(
    ("template", "turns", "error"),
    [
        ("raises", "brief", r"Got messages that the chat template cannot render \(.*No system\)"),
        ("ignores", "brief", "Got a turn of role 'system' from which the chat template leaves out 's'"),
        ("ignores", "wizard", "role 'wizard' .*leaves out 'e'"),
        ("ignores", "parts", "Got content in parts .*which the chat template prints as a Python list"),
        ("ignores", "calls", "role 'assistant' from which the chat template leaves out 'sail'"),
        ("no answers", "brief", "role 'assistant' from which the chat template leaves out 'blue'"),
        ("fails", "brief", "cannot render .ZeroDivisionError"),
        ("calls", "calls", None),
        ("reads parts", "parts", None),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "single"])
def test_templates_render_every_turn_or_the_error_names_the_row(template, turns, error, mode, tok, fit):
    tokenizer = deepcopy(tok)
    tokenizer.chat_template = LOOP.replace("%s", TEMPLATES[template])
    rows = [ROWS["messages"]] * (template in ("raises", "ignores")) + [{"messages": TURNS[turns]}]
    error = error and rf"^Row {len(rows) - 1}: .*{error}.*expected.*Fix"
    with pytest.raises(ValueError, match=error) if error else nullcontext():
        assert learns(fit(rows, tokenizer=tokenizer, context_mode=mode))


def test_thinking_may_be_left_out_of_the_history_and_not_of_an_answer_that_is_trained(tok, fit):
    tokenizer = deepcopy(tok)
    tokenizer.chat_template = LOOP.replace("%s", TEMPLATES["trims and drops thinking"])
    rows = [{"messages": TURNS["thinking"]}]
    assert learns(fit(rows, tokenizer=tokenizer, context_mode="single"))
    assert learns(fit(rows, tokenizer=tokenizer, train_turns="last"))
    with pytest.raises(ValueError, match="none of which can be trained on .*leaves out the reasoning of the answer"):
        fit(rows, tokenizer=tokenizer)


def test_a_template_without_a_generation_prompt(tok, fit):
    tokenizer = deepcopy(tok)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    assert learns(fit([ROWS["messages"]], tokenizer=tokenizer))
    with pytest.raises(ValueError, match=r"^Row 0: Got contexts that end differently.*Fix: use a chat template whose"):
        fit([ROWS["constraints_chat"]], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("missing", "rows", "error"),
    [
        ({"chat_template": None}, "messages", "a tokenizer without a chat template.*Fix: set chat_template_path"),
        ({"pad_token": None}, "text", None),
        ({"pad_token": None, "eos_token": None}, "messages", "neither a pad nor an eos token.*Fix: set pad_token"),
        ({"eos_token": None}, "text", "plain text and a tokenizer without an eos token.*Fix: set eos_token"),
        ({"eos_token": ""}, "prompt", "plain text and a tokenizer without an eos token.*Fix: set eos_token"),
        ({"eos_token": ""}, "messages", None),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "single"])
def test_errors_name_what_a_tokenizer_lacks(missing, rows, error, mode, tok, fit):
    tokenizer = deepcopy(tok)
    for name, value in missing.items():
        setattr(tokenizer, name, value)
    with pytest.raises(ValueError, match=f"Got .*{error}") if error else nullcontext():
        assert learns(fit([ROWS[rows]], tokenizer=tokenizer, context_mode=mode))


@pytest.mark.parametrize("kind", ["constraints", "constraints_chat", "messages", "text"])
def test_a_tokenizer_written_in_python(kind, tok, fit):
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = tok.chat_template
    template = END if (kind, "auto") in WITH_TEMPLATE else None
    assert learns(fit([ROWS[kind]], tokenizer=tokenizer, response_template=template))


@pytest.mark.parametrize(("kind", "mode"), [("constraints_chat", "auto"), ("messages", "single"), ("text", "auto")])
def test_tokens_beyond_the_models_vocabulary(kind, mode, fit):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **SIZE))
    with pytest.raises(ValueError, match=r"^Row 0: Got \d+ in column 'input_ids', expected .* from 0 to 99,.*Fix"):
        fit([ROWS[kind]], model=model, context_mode=mode)


@pytest.mark.parametrize(
    ("output", "message"), [(5, "Row 0: .*text"), (None, "none of which"), (["a"], "Row 0: .*text")]
)
def test_the_output_of_a_formatting_function_is_checked(output, message, fit):
    with pytest.raises(ValueError, match=f"{message}.*Fix"):
        fit([{"question": "a"}], formatting_func=lambda row: output)
    with pytest.raises(ValueError, match="Got no rows in the train dataset.*Fix"):
        fit([], formatting_func=lambda row: "a")


@pytest.mark.parametrize("unbroken", [True, False])
def test_texts_that_are_too_long_are_tokenized_for_one_context_only(unbroken, tok, fit, monkeypatch):
    tokenized, call = [], type(tok).__call__
    monkeypatch.setattr(type(tok), "__call__", lambda self, *a, **k: tokenized.extend(a[0]) or call(self, *a, **k))
    size = 300_000
    text = "ab" * (size // 2) if unbroken else "the sea " * (size // 8)
    good = {"prompt": PROMPT, "constraints": [f"No {i}." for i in range(8)], "completion": ANSWER}
    row = good | {"prompt": [user(text)]}
    assert fit([good, row]).dropped_rows["train"] == {"no label left within max_length": [1]}
    assert sum(map(len, tokenized)) < 2 * size
    tokenized.clear()
    long = fit([good, good | {"completion": [assistant(text)]}])
    assert [len(ids) for (ids, *_), *_ in prepared(long).values()][1] > 500
    assert sum(map(len, tokenized)) < 2.5 * size
