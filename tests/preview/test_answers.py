"""Rows of several answers, counted and shown: against masks of every token, and numbers counted one by one."""

import copy
from itertools import chain

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings

from tests.preview.test_as_trained import TOKENIZERS, assistant, user
from tests.preview.test_preview import SHAPE, percentile
from tests.support.answers import answers
from tests.support.conversations import CONVERSATIONS
from trl_miso.data.contexts import full_row, parallel_row
from trl_miso.data.layout import NOT_FITTING
from trl_miso.data.options import DataOptions
from trl_miso.preview import preview_dataset
from trl_miso.preview.answers import answers_of, cut_ends
from trl_miso.preview.statistics import score_pairs
from trl_miso.segments import Answer, Branch, Example, Output, Segment, lay_out, trained_spans, unshare

bounded = settings(max_examples=200, deadline=None)
NAMES = [f"context {i}" for i in range(9)]


def seen_tokens(example):
    """For each token the lists of tokens that it sees: one list, or one per branch, and itself."""
    owner = list(chain.from_iterable([i] * segment.length for i, segment in enumerate(example.segments)))
    branches = {output.segment: output.branches for output in example.outputs}
    seen = []
    for token, s in enumerate(owner):
        own = [k for k in range(token + 1) if owner[k] == s]
        leaves = [branch.segment for branch in branches[s]] if s in branches else [s]
        views = []
        for leaf in leaves:
            path = []
            while leaf >= 0:
                path.append(leaf)
                leaf = example.segments[leaf].parent
            views.append([k for k, other in enumerate(owner) if other in path and other != s])
        seen.append((views, own))
    return seen


@bounded
@given(answers())
def test_score_pairs_are_those_of_a_mask(made):
    example = lay_out(made)[2]
    for one in (example, unshare(example, [])[0]):
        assert score_pairs(one) == sum(sum(map(len, views)) + len(own) for views, own in seen_tokens(one))


@bounded
@given(answers())
def test_answers_hold_every_label_once(made):
    ids, labels, example = lay_out(made)
    spans = trained_spans(example, labels)
    covered = [i for span in spans for i in range(span.start, span.start + span.length)]
    assert len(covered) == len(set(covered))
    labelled = {i for i, label in enumerate(labels) if label != -100}
    assert labelled <= set(covered)
    outputs = {output.segment for output in example.outputs}
    assert all(
        span.segment in outputs or set(range(span.start, span.start + span.length)) <= labelled for span in spans
    )
    described = answers_of(example, labels, NAMES)
    branches = {answer["segment"]: len(answer["contexts"]) for answer in described if answer["contexts"]}
    assert branches == {output.segment: len(output.branches) for output in example.outputs}


@bounded
@given(answers(most=2))
def test_what_was_cut_is_the_end_of_an_answer(made):
    """Every answer is cut to a part of it, as `max_length` would."""
    cut = [a._replace(output=a.output[: 1 + n], labels=a.labels[: 1 + n]) for a in made for n in [len(a.output) // 2]]
    cut = [answer for answer in cut if any(label != -100 for label in answer.labels)]
    if not cut:
        return
    ids, labels, example = lay_out(cut)
    whole_ids, whole_labels, whole = lay_out(made)
    ends = cut_ends((example, ids, labels), [(whole, whole_ids, whole_labels)], NAMES)
    assert len(ends) == len(answers_of(example, labels, NAMES))
    wholes = [answer.output for answer in made]
    for answer, end in zip(answers_of(example, labels, NAMES), ends, strict=True):
        if answer["contexts"]:
            kept = ids[answer["start"] : answer["start"] + answer["length"]]
            assert end and [*kept, *end] in wholes or kept in wholes


def test_cut_ends_of_answers_that_begin_alike():
    """The answer that was not cut, before the one that begins with it."""
    contexts = [[1, 2, 3], [1, 2]]
    full = [Answer(contexts, [4, 5, *rest], [-100, 5, *rest], [0.5, 0.5]) for rest in ([6, 7, 8], [6], [6, 7, 9])]
    cut = [answer._replace(output=answer.output[:4], labels=answer.labels[:4]) for answer in full]
    rows = []
    for made in (cut, full):
        ids, labels, example = lay_out(made)
        rows.append((example, ids, labels))
    assert cut_ends(rows[0], [rows[1]], NAMES) == [[8], [], [9]]


# Rows of a data set

SHOTS = CONVERSATIONS["plain"][:3]
ROWS = [
    {
        "prompt": SHOTS,
        "constraints": ["Be kind.", "", "Rhyme."],
        "completions": [[assistant("It is.")], [assistant("No, " * 9)]],
    },
    {"prompt": SHOTS[:1], "constraints": [], "completions": [[assistant("Blue.")]]},
]


def shown(make_config, rows, template="llama3", **options):
    tokenizer = copy.deepcopy(TOKENIZERS[template])
    return preview_dataset(Dataset.from_list(rows), tokenizer, make_config(**options), SHAPE, rows=9)


def test_statistics_count_answers(make_config):
    result = shown(make_config, ROWS, train_turns="all")
    got, (row, other) = result["statistics"], result["rows"]
    assert [len(row["answers"]) for row in (row, other)] == [3, 1]
    assert (got["examples"], got["answers"]) == (2, 4)
    assert got["answers_per_example"] == {"1": 1, "3": 1}
    assert got["contexts_per_answer"] == {"1": 2, "4": 2}
    assert got["tokens"]["labelled"] == sum(label != -100 for row in result["rows"] for label in row["labels"])
    outputs = [answer["length"] for row in result["rows"] for answer in row["answers"]]
    assert got["lengths"]["output"] == [percentile(outputs, p) for p in got["lengths"]["percentiles"]]
    names = ["full", "constraint 1", "constraint 2", "bare"]
    assert [[context["name"] for context in answer["contexts"]] for answer in row["answers"]] == [[], names, names]
    assert got["train_turns"].startswith("all: every completion is trained, and every assistant turn")


@pytest.mark.parametrize("template", ["qwen3", "llama3"])
def test_the_cost_is_compared_with_one_run_per_conversation_or_completion(template, make_config):
    """SFTTrainer's own rows, one for each completion; of a conversation one run, whatever a template strips from it."""
    chats = [{"messages": CONVERSATIONS[kind]} for kind in ("long", "plain")]
    options = {"chunk_probs": [1.0], "max_length": None}
    got = shown(make_config, chats, template, **options)["statistics"]
    plain = shown(make_config, chats, template, context_mode="single", max_length=None)["rows"]
    tokens = sum(len(row["ids"]) for row in plain)
    assert got["cost"]["tokens"] == pytest.approx(got["tokens"]["unique"] / tokens)
    assert (got["cost"]["tokens"] == 1) == (template == "llama3")

    got = shown(make_config, ROWS, template, max_length=None)["statistics"]
    one_each = [
        {"prompt": full_row(row | {"completion": completion}, "constraints").contexts[0], "completion": completion}
        for row in ROWS
        for completion in row["completions"]
    ]
    plain = shown(make_config, one_each, template, context_mode="single", max_length=None)["rows"]
    sizes = [len(row["ids"]) for row in plain]
    assert got["cost"]["tokens"] == pytest.approx(got["tokens"]["unique"] / sum(sizes))
    pairs = sum(np.tri(size).sum() for size in sizes)
    ours = sum(score_pairs(example) for example in map(_example, shown(make_config, ROWS, template)["rows"]))
    assert got["cost"]["score_pairs"] == pytest.approx(ours / pairs)


def _example(row):
    segments = tuple(Segment(**segment) for segment in row["segments"])
    outputs = []
    for answer in row["answers"]:
        if answer["contexts"]:
            branches = [Branch(c["segment"], c["offset"], c["weight"]) for c in answer["contexts"]]
            outputs.append(Output(answer["segment"], tuple(branches)))
    return Example(segments, tuple(outputs))


@pytest.mark.parametrize(
    "options", [{}, {"context_mode": "succ", "chunk_probs": [0, 0.5, 0.5]}, {"train_turns": "all"}]
)
def test_each_answer_shows_what_was_cut_from_it(options, make_config):
    whole = shown(make_config, ROWS[:1], max_length=None, **options)["rows"][0]
    last = whole["answers"][-1]
    limit = whole["segments"][last["segment"]]["start"] + last["length"] - 5
    result = shown(make_config, ROWS[:1], max_length=limit, **options)
    (row,) = result["rows"]
    assert [len(answer["cut"]) for answer in row["answers"]] == [0] * (len(row["answers"]) - 1) + [5]
    assert row["answers"][-1]["cut"] == whole["texts"][-5:]
    assert row["cut"] == 5 and result["statistics"]["cut"] == {"rows": 1, "tokens": 5}


def test_notes_are_shown_and_counted(make_config):
    """An answer that does not fit is left out, and its row is shown beyond the first ones."""
    chat = {"messages": [*SHOTS[:2], user("the sea is blue and calm " * 9), assistant("Yes.")]}
    result = shown(make_config, [{"messages": CONVERSATIONS["plain"]}] * 9 + [chat], max_length=60)
    assert result["statistics"]["notes"] == {NOT_FITTING: {"rows": 1, "first_row": 9}}
    assert result["rows"][-1]["index"] == 9 and result["rows"][-1]["notes"] == [NOT_FITTING]
    assert len(result["rows"][-1]["answers"]) == 1 and result["rows"][-1]["cut"] > 0


def test_answers_are_in_the_order_of_the_conversation(make_config):
    """Whatever the number of chunks of each: outputs come last among the segments."""
    (row,) = shown(make_config, [{"messages": CONVERSATIONS["long"]}], chunk_probs=[0.5, 0.5], seed=1)["rows"]
    assert [len(answer["contexts"]) for answer in row["answers"]] == [2, 0, 2, 0]
    texts = ["".join(row["texts"][a["start"] : a["start"] + a["length"]]) for a in row["answers"]]
    said = [message["content"] for message in CONVERSATIONS["long"] if message["role"] == "assistant"]
    assert all(answer in text for answer, text in zip(said, texts, strict=True))


def test_what_train_turns_means_is_said(make_config):
    chat = {"messages": CONVERSATIONS["plain"]}
    for rows, options, sentence in (
        ([chat], {}, "auto: every assistant turn is trained"),
        ([chat], {"train_turns": "last"}, "last: the last assistant turn is trained, earlier ones are not"),
        (ROWS, {}, "auto: every completion is trained, assistant turns within the prompts are not"),
        ([chat], {"context_mode": "single"}, "no effect in single, whose labels are those of SFTTrainer"),
        (
            [chat | {"train_turns": own} for own in ("last", "last", None, "all")],
            {},
            "auto: every assistant turn is trained; column train_turns overrides it (rows: last 2, all 1)",
        ),
    ):
        assert shown(make_config, rows, **options)["statistics"]["train_turns"] == sentence


def test_contexts_have_names():
    def names(kind, row, **options):
        row = {"completion": "c", **row}
        return parallel_row(row, kind, DataOptions(**options), full_row(row, kind)).names

    row = {"prompt": "p", "constraints": ["a", " ", "b"]}
    assert names("constraints", row) == ("full", "constraint 1", "constraint 2", "bare")
    assert names("constraints", row, include_full=False, include_bare=False) == ("constraint 1", "constraint 2")
    assert names("constraints", row | {"constraints": ["a"]}) == ("full", "bare")
    assert names("constraints", row | {"constraints": []}) == ("full",)
    assert names("contexts", {"contexts": ["a", "b", "c"]}) == ("full", "context 2", "context 3")
    assert names("contexts", {"contexts": ["a", "b", "c"], "prompt": "b"}) == ("full", "context 1", "context 3")
    assert names("contexts", {"contexts": ["a", "b"], "prompt": "p"}) == ("context 1", "context 2")
