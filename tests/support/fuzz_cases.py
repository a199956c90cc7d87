"""Any rows and settings: cases for `test_fuzz.py`, and what the rows of a case mean."""

import random
from collections import Counter
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.data.test_property import WORDS, tokenizer_of
from tests.support.rows_oracle import Parts, examples_of
from tests.training.test_bad_input import BAD_MESSAGES, HALF, NO_TEXT, NO_WORDS, assistant, turn, user
from trl_miso.data.contexts import MODES
from trl_miso.data.settings import has_effect
from trl_miso.segments.packed import WEIGHTINGS

END = "\nAnswer:\n"

# Rows

_RNG = random.Random(0)
# Made once: drawing each from its characters takes half of the time.
TEXTS = ["".join(_RNG.choices(WORDS, k=_RNG.randint(1, 6))) for _ in range(400)]
TEXTS += ["".join(_RNG.choices(WORDS, k=_RNG.randint(20, 80))) for _ in range(20)]
texts = st.sampled_from(TEXTS)
said = st.sampled_from([text for text in TEXTS if text.strip()])


class Meant(NamedTuple):
    """What a row that was not spoiled says: prompts, the full one and those of its contexts in order, and the completion."""

    full: Any
    contexts: list
    completion: Any
    weights: list[float] | None = None


@st.composite
def constraint_rows(draw, prompt, answer, optional):
    text = draw(said).rstrip()
    # What of its constraints a prompt holds already is tested in test_contexts.py.
    constraints = [part for part in draw(st.lists(said, max_size=4)) if part.strip() not in text]
    row = {"prompt": prompt(text), "constraints": constraints, "completion": answer(draw(said))}
    full = prompt("\n\n".join([text, "\n".join(constraints)])) if constraints else row["prompt"]
    if optional:
        row["full_prompt"] = draw(st.none() | said.map(prompt))
        full = row["full_prompt"] or full
    singles = [prompt(f"{text}\n\n{constraint}") for constraint in constraints]
    return row, Meant(full, [full, *singles, row["prompt"]], row["completion"])


@st.composite
def context_rows(draw, prompt, answer, optional):
    contexts = [prompt(text) for text in draw(st.lists(said, min_size=1, max_size=5))]
    row = {"contexts": contexts, "completion": answer(draw(said))}
    if optional:
        weight = st.integers(1, 5) | st.floats(1e-3, 1e3)
        row["context_weights"] = draw(st.none() | st.lists(weight, min_size=len(contexts), max_size=len(contexts)))
        row["prompt"] = draw(st.none() | st.sampled_from(contexts) | said.map(prompt))
    full, given_weights = row.get("prompt") or contexts[0], row.get("context_weights")
    weights = given_weights and [weight / sum(given_weights) for weight in given_weights]
    at = contexts.index(full) if full in contexts else 0  # the full one comes first
    first = [at, *(i for i in range(len(contexts)) if i != at)]
    weights = weights and [weights[i] for i in first]
    return row, Meant(full, [contexts[i] for i in first], row["completion"], weights)


@st.composite
def prompt_rows(draw, prompt, answer, optional):
    row = {"prompt": prompt(draw(said)), "completion": answer(draw(said))}
    return row, Meant(row["prompt"], [row["prompt"]], row["completion"])


@st.composite
def message_rows(draw, prompt, answer, optional):
    messages, last = prompt(draw(said)), [assistant(draw(said))]
    row = {"messages": messages + last}
    if optional:
        speakers = {"user": "human", "assistant": "gpt", "system": "system"}
        row = {"conversations": [turn(m["content"], speakers[m["role"]]) for m in messages + last]}
    return row, Meant(messages, [messages], last)


@st.composite
def text_rows(draw, prompt, answer, optional):
    text = draw(said)
    return {"text": text}, Meant("", [""], text)


@st.composite
def token_rows(draw, prompt, answer, optional):
    ids = draw(st.lists(st.integers(5, 300), min_size=2, max_size=40))  # none of which is padding
    row = {"input_ids": ids}
    if optional:
        row["labels"] = [
            token if keep else -100
            for token, keep in zip(
                ids, draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), strict=True
            )
        ]
    return row, None


FORMATS = {
    "constraints": constraint_rows,
    "contexts": context_rows,
    "prompt": prompt_rows,
    "messages": message_rows,
    "text": text_rows,
    "tokenized": token_rows,
}
PARALLEL = ("constraints", "contexts")
# Several times: the formats that everything else depends on.
kinds = st.sampled_from([*FORMATS, *PARALLEL * 3, "prompt", "messages"])

# Spoiled rows

JUNK = [
    None,
    *NO_TEXT,
    HALF,
    "",
    " \n",
    "a" * 3000,
    "\0",
    [],
    {},
    0,
    -1,
    1e30,
    2**70,
    float("inf"),
    10**400,
    [None],
    [[]],
]
JUNK += [
    [m] for m in (*BAD_MESSAGES, *NO_WORDS, user("a", "tool"), user("a", "system"), assistant("b", tool_calls=[{}]))
]
JUNK += [
    [-100] * 3,
    [5, 6, 7],
    [1.0, 2.0],
    [5] * 300,
    [HALF],
    {"role": "user"},
    {"from": "gpt"},
    np.array([5, 6]),
    b"\xff",
]
COLUMNS = [
    "prompt",
    "completion",
    "constraints",
    "contexts",
    "context_weights",
    "full_prompt",
    "messages",
    "conversations",
]
COLUMNS += ["text", "input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths", "tools"]
COLUMNS += ["chat_template_kwargs", "miso_status", "miso_row", "role", "content", "note"]
junk = st.sampled_from(JUNK).map(deepcopy) | st.text(max_size=5) | st.integers() | st.floats()
junk |= st.recursive(
    junk,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def places(value, at=()):
    """Where something stands in a row, as keys and indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


@st.composite
def spoiled(draw, row):
    row = deepcopy(row)
    for _ in range(draw(st.integers(1, 2))):
        where = draw(st.sampled_from(list(places(row)) or [("text",)]))
        row = row or {"text": ""}
        inside = row
        for key in where[:-1]:
            inside = inside[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "double", "column"]))
        if how == "replace":
            inside[where[-1]] = draw(junk)
        elif how == "remove":
            del inside[where[-1]]
        elif how == "double" and isinstance(inside, list):
            inside.insert(where[-1], deepcopy(inside[where[-1]]))
        else:
            row[draw(st.sampled_from(COLUMNS))] = draw(junk)
    return row


# Cases


class Case(NamedTuple):
    kind: str
    rows: list[dict]
    meant: list[Meant | None]
    clean: bool
    usual: bool
    options: dict[str, Any]
    evaluated: bool
    window: bool
    tokenizer: str
    batches: int
    gradients: bool


OPTIONS = {
    "context_mode": st.sampled_from(MODES),
    "context_weighting": st.sampled_from(["uniform", *WEIGHTINGS]),
    "full_context_weight": st.sampled_from([None, None, 0.3, 0.9]),
    "include_full": st.sampled_from([True, True, False]),
    "include_bare": st.sampled_from([True, True, False]),
    "para_prob": st.sampled_from([1.0, 1.0, 0.5]),
    "chunk_probs": st.sampled_from([[0.55, 0.15, 0.15, 0.15], [0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]),
    "train_turns": st.sampled_from(["auto", "auto", "all", "last"]),
    "output_positions": st.sampled_from(["successive", "successive", "after_longest"]),
    "share_prefixes": st.booleans(),
    "max_length": st.sampled_from([200, 200, 200, 60, 20, 3, None]),
    "packing": st.booleans(),
    "eval_contexts": st.sampled_from(["standard", "miso"]),
    "completion_only_loss": st.sampled_from([None, None, None, True, False]),
    "truncation_mode": st.sampled_from([*["keep_start"] * 4, "keep_end"]),
    "response_template": st.sampled_from([END, END, None]),
}


DEFAULTS = {"context_weighting": "uniform", "full_context_weight": None, "include_full": True, "include_bare": True}
DEFAULTS |= {"para_prob": 1.0, "chunk_probs": [0.55, 0.15, 0.15, 0.15], "output_positions": "successive"}
DEFAULTS |= {"train_turns": "auto", "share_prefixes": True, "eval_contexts": "standard", "response_template": None}


def usual(kind, weighted, options, chat):
    """The options, without those that such rows or others of the options exclude."""
    wanted = {"context_mode": "auto"} if kind not in PARALLEL else {}
    wanted |= {"completion_only_loss": None, "truncation_mode": "keep_start"}
    options = options | wanted | {"response_template": END, "max_length": options["max_length"] or 200}
    mode = {"auto": "para" if kind in PARALLEL else "succ"}.get(options["context_mode"], options["context_mode"])
    if mode != "para" or weighted or kind == "contexts" or not options["include_full"]:
        options["full_context_weight"] = None
    if options["full_context_weight"] or (weighted and mode == "para"):
        options["context_weighting"] = "uniform"
    for name in list(options):
        if not has_effect(name, mode if kind not in ("text", "tokenized") else "single", kind, chat):
            options[name] = DEFAULTS[name]
    return options


@st.composite
def cases(draw):
    kind, optional = draw(kinds), draw(st.booleans())
    chat = kind == "messages" or (kind not in ("text", "tokenized") and draw(st.booleans()))
    turns = draw(st.lists(texts, max_size=4)) if chat else []
    roles = ["system"] * (len(turns) % 2) + ["user", "assistant"] * 2
    before = [user(text, role) for text, role in zip(turns, roles, strict=False)]
    prompt = (lambda text: [*before, user(text)]) if chat else (lambda text: text + END)
    answer = (lambda text: [assistant(text)]) if chat else str
    make = FORMATS[kind](prompt, answer, optional)
    made = draw(st.lists(make, min_size=1, max_size=3))
    rows, meant = (list(part) for part in zip(*made, strict=True))
    clean, ordinary = draw(st.sampled_from([True, True, False])), draw(st.sampled_from([True, True, True, False]))
    if not clean:
        at = draw(st.integers(0, len(rows) - 1))
        rows[at] = draw(spoiled(rows[at]))
    options = draw(st.fixed_dictionaries(OPTIONS))
    if ordinary:
        options = usual(kind, kind == "contexts" and optional, options, chat)
    window = draw(st.sampled_from([False, False, True]))
    tokenizer = draw(st.sampled_from(["bytes tulu", "llama2 qwen3"] if chat else ["bytes", "first"]))
    evaluated, gradients = (
        draw(st.sampled_from([False, False, True])),
        draw(st.sampled_from([False, False, False, True])),
    )
    batches = draw(st.integers(1, 3))
    return Case(kind, rows, meant, clean, ordinary, options, evaluated, window, tokenizer, batches, gradients)


# What rows mean


def ids(name, prompt, completion=None):
    """Token ids of a prompt, or of all of a row, as SFTTrainer tokenizes them."""
    tokenizer = tokenizer_of(name)
    if isinstance(prompt, list):
        messages = prompt + (completion or [])
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=completion is None)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    text = prompt + (completion or "")
    if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(tokenizer.bos_token)  # which the tokenizer adds itself
    eos = "" if completion is None or completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
    return tokenizer(text + eos)["input_ids"]


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def expected_contexts(case, meant, mode):
    """The prompts of each example that the row should become."""
    if mode not in ("para", "augment") or case.kind not in PARALLEL:
        return [[meant.full]]
    contexts = meant.contexts
    if case.kind == "constraints":
        contexts = contexts if case.options["include_full"] else contexts[1:]
        contexts = contexts if case.options["include_bare"] else contexts[:-1]
        contexts = (
            [c for i, c in enumerate(contexts) if c not in contexts[:i]] if len(meant.contexts) > 2 else [meant.full]
        )
    return [[context] for context in contexts] if mode == "augment" else [contexts]


def fits(case):
    """Whether some row must be trained on: its first labelled token is within `max_length`, whatever it becomes."""
    size = case.options["max_length"]
    prompts = ([meant.full, *meant.contexts] for meant in case.meant if meant)
    return any(all(len(ids(case.tokenizer, prompt)) < size for prompt in own) for own in prompts)


def expected_weights(case, meant, contexts):
    share = case.options["full_context_weight"]
    if case.kind == "contexts" and meant.weights:
        return meant.weights
    rest = len(contexts) - 1
    return [1 / len(contexts)] * len(contexts) if share is None else [share] + [(1 - share) / rest] * rest


def check_example(case, parts: Parts, meant, contexts, mode, as_trl):
    """The example has the tokens, labels and weights that the row means."""
    whole, prompts = ids(case.tokenizer, contexts[0], meant.completion), [ids(case.tokenizer, c) for c in contexts]
    mixed = len(parts.contexts) > 1
    first = (prompts[0] if mode == "succ" else parts.contexts[0]) if mixed else []
    start = common(prompts[0], whole)
    if mixed and mode == "succ":
        lengths = list(map(len, parts.contexts))
        first = list(chain.from_iterable(parts.contexts))
        assert max(lengths) - min(lengths) <= 1 and len(lengths) <= len(case.options["chunk_probs"])
        assert parts.weights == [1 / len(lengths)] * len(lengths)
    elif mixed:
        head = len(prompts[0]) - len(first)
        assert parts.contexts == [prompt[: len(prompt) - head] for prompt in prompts]
        assert parts.weights == pytest.approx(expected_weights(case, meant, contexts))
        assert all(prompt[len(prompt) - head :] == prompts[0][len(first) :] for prompt in prompts)
    else:
        assert mode != "para" or len(contexts) == 1
    assert len(first) < start
    tokens = first + parts.output
    assert tokens == whole[: len(tokens)]
    longest = max([len(first), *map(len, parts.contexts)]) + len(parts.output)
    assert len(tokens) == len(whole) or longest == case.options["max_length"]
    everything = as_trl and case.kind in ("messages", "text")
    labels = [-100] * (0 if everything else start) + whole[0 if everything else start :]
    assert parts.labels == labels[len(first) : len(tokens)]


def earlier_answers(case, meant):
    """(whole, prompt) of the turns of the full prompt that are trained, as token ids."""
    setting = case.options["train_turns"]
    trains_all = setting == "all" or (setting == "auto" and case.kind == "messages")
    if not trains_all or not isinstance(meant.full, list):
        return
    for i, message in enumerate(meant.full):
        is_asked = any(m["role"] == "user" and m["content"].strip() for m in meant.full[:i])
        if message["role"] == "assistant" and message["content"].strip() and is_asked:
            prompt = meant.full[:i]
            yield ids(case.tokenizer, prompt, [message]), ids(case.tokenizer, prompt)


def label_runs(parts: Parts):
    """(tokens before, labelled tokens) of each run of labels; of chunks, their input and then the output."""
    before = list(chain.from_iterable(parts.contexts))
    tokens, labels = before + parts.output, [-100] * len(before) + parts.labels
    starts = [i for i, label in enumerate(labels) if label != -100 and (not i or labels[i - 1] == -100)]
    for start in starts:
        end = next((i for i in range(start, len(labels)) if labels[i] == -100), len(labels))
        yield tuple(tokens[:start]), tuple(tokens[start:end])


def check_answers(case, example: list[Parts], meant, contexts, mode, as_trl):
    """The example trains every answer that the row means, as far as it fits, and nothing else."""
    size = case.options["max_length"]
    earlier = [] if as_trl else list(earlier_answers(case, meant))
    expected = Counter()
    for whole, prompt in earlier:
        start = common(prompt, whole)
        if labelled := tuple(whole[start:size]):
            expected[tuple(whole[:start]), labelled] += 1
    others = list(example)
    if mode == "para" and (mixed := [parts for parts in example if len(parts.contexts) > 1]):
        (main,) = mixed
        others.remove(main)
        check_example(case, main, meant, contexts, mode, as_trl)
    elif not earlier:
        (main,) = others
        check_example(case, main, meant, contexts, mode, as_trl)
        return
    elif len(contexts) == 1 or case.options["para_prob"] < 1:
        contexts = contexts if len(contexts) == 1 else [meant.full]
        whole, prompt = ids(case.tokenizer, contexts[0], meant.completion), ids(case.tokenizer, contexts[0])
        start = common(prompt, whole)
        if labelled := tuple(whole[start:size]):
            expected[tuple(whole[:start]), labelled] += 1
    else:  # the longest context leaves no room
        assert max(len(ids(case.tokenizer, context)) for context in contexts) >= size
    assert Counter(chain.from_iterable(map(label_runs, others))) == expected


def is_only_context(case, meant, contexts, example):
    """Whether the example presents the row's only context, rather than its prompt."""
    whole = ids(case.tokenizer, contexts[0], meant.completion)
    return len(contexts) == 1 and example[-1].output == whole[: len(example[-1].output)]


def check_meaning(case, rows, trainer):
    """Rows that were not spoiled became what they mean, or did not fit."""
    training, single = trainer.training_mode, case.evaluated and case.options["eval_contexts"] == "standard"
    mode = "single" if single else training
    as_trl = mode == "augment" or training in ("single", "augment") or case.kind in ("text", "tokenized")
    made: dict[int, list[list[Parts]]] = {}
    for row in rows:
        for number, example in zip(row["miso_row"], examples_of(row), strict=True):
            made.setdefault(number, []).append(example)
    dropped = trainer.dropped_rows["eval" if case.evaluated else "train"]
    for number, meant in enumerate(case.meant):
        examples = expected_contexts(case, meant, mode) if meant else []
        if number not in made or len(examples) > len(made[number]):
            reasons = [reason for reason, numbers in dropped.items() if number in numbers]
            nothing = meant is None and "labels" in case.rows[number] and set(case.rows[number]["labels"][1:]) == {-100}
            assert reasons and all("max_length" in reason or nothing for reason in reasons), reasons
        elif meant is None:
            ((parts,),), row = made[number], case.rows[number]
            size = case.options["max_length"]
            assert (
                parts.output == row["input_ids"][:size] and parts.labels == row.get("labels", row["input_ids"])[:size]
            )
        else:
            if mode == "augment":  # packing sorts them
                wholes = [ids(case.tokenizer, c[0], meant.completion)[: case.options["max_length"]] for c in examples]
                examples = [examples[i] for i in sorted(range(len(wholes)), key=lambda i: wholes.index(wholes[i]))]
                made[number].sort(key=lambda example: wholes.index(example[0].output))
            for example, contexts in zip(made[number], examples, strict=True):
                plain = case.options["para_prob"] < 1 and not any(len(parts.contexts) > 1 for parts in example)
                if mode == "para" and plain and not is_only_context(case, meant, contexts, example):
                    contexts = [meant.full]  # presented as plain SFT
                check_answers(case, example, meant, contexts, mode, as_trl)
