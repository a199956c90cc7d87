"""Rows to contexts: formats, modes, the parallel contexts of the paper, and what is dropped or refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_miso.data.contexts import full_row, parallel_row, resolve_mode, split_row
from trl_miso.data.options import DataOptions
from trl_miso.data.schema import RowDropped, row_format
from trl_miso.data.schema import to_messages as messages_of
from trl_miso.data.sft_rows import SFTRows, messages_row

SYSTEM = {"role": "system", "content": "Be brief."}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TEXT = {"prompt": "Describe the sea.", "constraints": ["Use no commas.", "Rhyme."], "completion": "Blue and wide."}
CHAT = {
    "prompt": [SYSTEM, user("Hi"), assistant("Hello."), user("Describe the sea.")],
    "constraints": ["Use no commas.", "Rhyme."],
    "completion": [assistant("Blue and wide.")],
}
FULL = "Describe the sea.\n\nUse no commas.\nRhyme."


def texts(row):
    """Plain texts of contexts; of the last message where they are messages, whose earlier turns must be CHAT's."""
    for context in row.contexts:
        assert isinstance(context, str) or context[:-1] == CHAT["prompt"][:-1]
    return [context if isinstance(context, str) else context[-1]["content"] for context in row.contexts]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["contexts", "completion"], "contexts"),
        (["contexts", "completion", "prompt", "constraints", "messages"], "contexts"),
        (["prompt", "constraints", "completion", "id"], "constraints"),
        (["prompt", "completion", "text"], "prompt"),
        (["messages", "prompt"], "messages"),
        (["messages", "prompt", "constraints"], "constraints"),
        (["conversations", "constraints"], "constraints"),
        (["constraints", "body"], "text"),
        (["conversations"], "messages"),
        (["body"], "text"),
        (["input_ids", "prompt", "completion"], "tokenized"),
    ],
)
def test_format_is_the_first_that_fits(columns, expected):
    assert row_format(columns, "body") == expected


def test_contexts_beside_messages_are_refused():
    with pytest.raises(ValueError, match=r"contexts have no completion.*Fix: move the last answer"):
        row_format(["contexts", "messages", "prompt"], "text")


def test_unknown_columns_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Got .*'answer', 'question'.*expected .*prompt \+ completion.*Fix"):
        row_format(["question", "answer"], "text")


@pytest.mark.parametrize(
    ("mode", "kind", "expected"),
    [
        ("auto", "contexts", "para"),
        ("auto", "constraints", "para"),
        ("auto", "prompt", "succ"),
        ("auto", "messages", "succ"),
        ("auto", "text", "single"),
        ("succ", "constraints", "succ"),
        ("single", "messages", "single"),
        ("augment", "contexts", "augment"),
        ("auto", "tokenized", "single"),
    ],
)
def test_modes(mode, kind, expected):
    assert resolve_mode(mode, kind) == expected


@pytest.mark.parametrize(
    ("mode", "kind"), [("para", "prompt"), ("augment", "messages"), ("succ", "text"), ("para", "text")]
)
def test_modes_that_a_format_cannot_have_are_refused(mode, kind):
    with pytest.raises(ValueError, match=rf"Got context_mode='{mode}'.*expected.*Fix"):
        resolve_mode(mode, kind)


@pytest.mark.parametrize("row", [TEXT, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize(
    ("full", "bare", "expected"),
    [
        (True, True, [FULL, "Describe the sea.\n\nUse no commas.", "Describe the sea.\n\nRhyme.", "Describe the sea."]),
        (False, True, ["Describe the sea.\n\nUse no commas.", "Describe the sea.\n\nRhyme.", "Describe the sea."]),
        (True, False, [FULL, "Describe the sea.\n\nUse no commas.", "Describe the sea.\n\nRhyme."]),
        (False, False, ["Describe the sea.\n\nUse no commas.", "Describe the sea.\n\nRhyme."]),
    ],
)
def test_parallel_contexts_are_full_one_per_constraint_bare(row, full, bare, expected):
    made = parallel_row(row, "constraints", DataOptions(include_full=full, include_bare=bare))
    assert texts(made) == expected
    assert made.completion == row["completion"]
    assert made.weights is None
    assert texts(full_row(row, "constraints")) == [FULL]


def test_full_prompt_is_taken_verbatim():
    row = TEXT | {"full_prompt": "Use no commas. Rhyme. Describe the sea."}
    assert texts(parallel_row(row, "constraints"))[0] == row["full_prompt"]
    assert texts(full_row(row, "constraints")) == [row["full_prompt"]]
    assert texts(full_row(TEXT | {"full_prompt": None}, "constraints")) == [FULL]


def test_constraints_come_before_the_response_template():
    row = TEXT | {"prompt": "Describe the sea.\n\n### Response:\n"}
    end = "\n\n### Response:\n"
    for template in ("### Response:\n", end):
        made = parallel_row(row, "constraints", DataOptions(response_template=template))
        assert texts(made) == [
            f"{context}{end}"
            for context in (
                FULL,
                "Describe the sea.\n\nUse no commas.",
                "Describe the sea.\n\nRhyme.",
                "Describe the sea.",
            )
        ]
        assert full_row(row, "constraints", DataOptions(response_template=template)).contexts == made.contexts[:1]
    # a template that the prompt lacks is for the tokenization to refuse; messages have their chat template
    assert full_row(TEXT, "constraints", DataOptions(response_template=end)).contexts == [FULL]
    assert texts(full_row(CHAT, "constraints", DataOptions(response_template="sea"))) == [FULL]


def test_each_context_is_listed_once():
    # with one constraint the full context is that constraint's
    row = TEXT | {"constraints": ["Rhyme.", "Rhyme."]}
    assert texts(parallel_row(row, "constraints", DataOptions(include_full=False))) == [
        "Describe the sea.\n\nRhyme.",
        "Describe the sea.",
    ]
    row = CHAT | {"constraints": ["Rhyme."]}
    assert texts(parallel_row(row, "constraints")) == ["Describe the sea.\n\nRhyme.", "Describe the sea."]


# Constraints that stand in the prompt

WITHIN, REPEATED = "stands within a sentence", "more than once"
HELD = [
    # prompt, constraints, full prompt, bare prompt
    ("Write a poem. Use no commas. Be short.", ["Use no commas.", "Be short."], None, "Write a poem."),
    (
        "Write a poem. Be short.",
        ["Use no commas.", "Be short."],
        "Write a poem. Be short.\n\nUse no commas.",
        "Write a poem.",
    ),
    (
        "Write it.\n\n- No commas.\n- Be short.\n\nThe text:\nA sea.",
        ["Be short.", "No commas."],
        None,
        "Write it.\n\nThe text:\nA sea.",
    ),
    (
        "Write it under these rules:\n  1. No commas.\n  2. Be short",
        ["No commas", "Be short"],
        None,
        "Write it under these rules:",
    ),
    ("Be short. Write it! Rhyme.\nThanks.", ["Rhyme.", "Be short."], None, "Write it!\nThanks."),
    ("1. Rhyme. 2. Be short. Write it.", ["Rhyme.", "Be short."], None, "Write it."),
    ("Write it. Be short. Rhyme. Sing.", ["Be short. Rhyme.", "Rhyme."], None, "Write it. Sing."),
    ("Write it.\nUse:\n* a\n* b\nSing.", ["Use:\n* a\n* b"], None, "Write it.\nSing."),
    (
        "\u5199\u8bd7\u3002\u4e0d\u8981\u9017\u53f7\u3002\u8c22\u8c22\u3002",
        ["\u4e0d\u8981\u9017\u53f7\u3002"],
        None,
        "\u5199\u8bd7\u3002\u8c22\u8c22\u3002",
    ),
    # no constraint stands there: none is a piece of words
    ("Write a seashore poem.", ["sea", "poe"], "Write a seashore poem.\n\nsea\npoe", "Write a seashore poem."),
]
KEPT = [
    # prompt, constraints, full prompt, why there is one context
    ("Write it, and use no commas, please.", ["use no commas"], None, WITHIN),
    ("Write it, and use no commas.", ["use no commas", "Rhyme."], "Write it, and use no commas.\n\nRhyme.", WITHIN),
    ('Translate "Be short." to French.', ["Be short."], None, WITHIN),
    ("**Be short.** Write it.", ["Be short."], None, WITHIN),
    ("Rhyme. Sing. Write. Go.", ["Rhyme. Sing.", "Sing. Write."], None, WITHIN),
    ("Be short. Write it. Be short.", ["Be short."], None, REPEATED),
    ("Be short.\nRhyme.", ["Rhyme.", "Be short."], None, "nothing but constraints"),
]


def as_kinds(prompt, constraints):
    """The row in plain text, before a response template, as messages, and with the answer in its messages."""
    end = "\n\nAnswer:\n"
    chat = [*CHAT["prompt"][:-1], user(prompt)]
    yield TEXT | {"prompt": prompt, "constraints": constraints}, None, ""
    yield TEXT | {"prompt": prompt + end, "constraints": constraints}, "Answer:\n", end
    yield CHAT | {"prompt": chat, "constraints": constraints}, None, ""
    yield {"messages": [*chat, *CHAT["completion"]], "constraints": constraints}, None, ""


@pytest.mark.parametrize(("prompt", "constraints", "full", "bare"), HELD)
def test_constraints_that_stand_in_the_prompt_are_not_added_again(prompt, constraints, full, bare):
    for row, template, end in as_kinds(prompt, constraints):
        options = DataOptions(response_template=template)
        alone = [f"{bare}\n\n{constraint}{end}" for constraint in constraints]
        assert texts(full_row(row, "constraints", options)) == [(full or prompt) + end]
        expected = list(dict.fromkeys([(full or prompt) + end, *alone, bare + end]))
        assert texts(parallel_row(row, "constraints", options)) == expected
        assert not split_row(row, options).obstacle
        verbatim = row | {"full_prompt": row.get("prompt") or row["messages"][:-1]}
        expected = list(dict.fromkeys([prompt + end, *alone, bare + end]))
        assert texts(parallel_row(verbatim, "constraints", options)) == expected


@pytest.mark.parametrize(("prompt", "constraints", "full", "why"), KEPT)
@pytest.mark.parametrize("include", [True, False])
def test_constraints_that_cannot_be_taken_out_leave_one_context(prompt, constraints, full, why, include):
    for row, template, end in as_kinds(prompt, constraints):
        options = DataOptions(response_template=template, include_full=include, include_bare=include)
        assert texts(parallel_row(row, "constraints", options)) == [(full or prompt) + end]
        assert texts(full_row(row, "constraints", options)) == [(full or prompt) + end]
        assert why in split_row(row, options).obstacle


sentences = st.lists(st.text("abcde", min_size=1, max_size=4), min_size=1, max_size=5).map(" ".join)
_lists = {
    "lines": lambda text, constraints: text + "\n\n" + "\n".join(constraints),
    "marked": lambda text, constraints: text + "\n" + "\n".join(f"- {c}" for c in constraints),
    "numbered": lambda text, constraints: text + "\n" + "\n".join(f"  {i}. {c}" for i, c in enumerate(constraints)),
    "sentences": lambda text, constraints: " ".join([text, *constraints]),
    "first": lambda text, constraints: "\n".join(constraints) + "\n\n" + text,
    "between": lambda text, constraints: text.replace(". ", ". " + " ".join(constraints) + " ", 1),
}


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(
    st.lists(sentences, min_size=2, max_size=4),
    st.lists(sentences, min_size=1, max_size=4, unique=True),
    st.sampled_from("!?."),
)
def test_contexts_do_not_depend_on_where_constraints_stand(base, constraints, mark):
    """The paper's contexts of a prompt that holds its constraints are those of the bare prompt, besides the full one."""
    text = " ".join(f"{sentence}." for sentence in base)
    constraints = [f"Do {constraint}{mark}" for constraint in constraints]  # in no sentence of the text
    row = {"prompt": text, "constraints": constraints, "completion": "x"}
    expected = [f"{text}\n\n{constraint}" for constraint in constraints] + [text]
    assert parallel_row(row, "constraints", DataOptions(include_full=False)).contexts == expected
    for place in _lists.values():
        held = row | {"prompt": place(text, constraints)}
        assert parallel_row(held, "constraints", DataOptions(include_full=False)).contexts == expected
        assert full_row(held, "constraints").contexts == [held["prompt"]]


@pytest.mark.parametrize(
    "last", [assistant("a"), {"role": "tool", "content": "a"}, SYSTEM, {"role": "wizard", "content": "a"}]
)
def test_constraints_are_added_to_a_users_turn_alone(last):
    row = CHAT | {"prompt": [user("a"), last]}
    for make in (full_row, parallel_row):
        with pytest.raises(
            ValueError, match=rf"column 'prompt' whose last turn has role '{last['role']}', expected role 'user'.*Fix"
        ):
            make(row, "constraints")
        beside = {"messages": [*row["prompt"], assistant("b")], "constraints": ["Rhyme."]}
        with pytest.raises(ValueError, match="column 'messages' whose last turn has role"):
            make(beside, "constraints")
        assert make(row | {"constraints": []}, "constraints").contexts == [row["prompt"]]
    assert full_row(row | {"full_prompt": row["prompt"]}, "constraints").contexts == [row["prompt"]]


@pytest.mark.parametrize("constraints", [[], None, ["", " \n"]])
@pytest.mark.parametrize("include", [True, False])
def test_a_row_without_constraints_keeps_its_full_context(constraints, include):
    assert texts(
        parallel_row(
            TEXT | {"constraints": constraints}, "constraints", DataOptions(include_full=include, include_bare=include)
        )
    ) == [TEXT["prompt"]]


def test_given_contexts_are_taken_as_given_with_weights_scaled():
    row = {"contexts": ["a", "b", "a"], "completion": "c", "context_weights": [1, 2, 5.0]}
    made = parallel_row(row, "contexts", DataOptions(include_full=False, include_bare=False))
    assert made.contexts == ["a", "b", "a"]
    assert made.weights == [0.125, 0.25, 0.625]
    assert full_row(row, "contexts").contexts == ["a"]
    assert parallel_row(row | {"context_weights": None}, "contexts").weights is None


def test_the_prompt_among_given_contexts_comes_first_with_its_weight():
    row = {"contexts": ["a", "b", "c"], "completion": "d", "prompt": "b", "context_weights": [1, 2, 1]}
    made = parallel_row(row, "contexts")
    assert made.contexts == ["b", "a", "c"]
    assert made.weights == [0.5, 0.25, 0.25]
    assert full_row(row, "contexts").contexts == ["b"]
    assert parallel_row(row | {"prompt": "other"}, "contexts").contexts == ["a", "b", "c"]


def test_a_row_with_a_prompt_and_no_contexts_keeps_its_prompt():
    row = {"contexts": None, "completion": "c", "prompt": "p", "context_weights": None}
    assert parallel_row(row, "contexts").contexts == ["p"]


@pytest.mark.parametrize(
    "weights",
    [[1, 2], [1, 2, 3, 4], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1], [1, float("inf"), 1], ["1", 1, 1], 1.0],
)
def test_wrong_weights_are_refused(weights):
    row = {"contexts": ["a", "b", "c"], "completion": "d", "context_weights": weights}
    with pytest.raises(ValueError, match=r"Got context_weights .* for 3 contexts, expected 3 positive numbers.*Fix"):
        parallel_row(row, "contexts")


def test_messages_are_cut_before_the_last_assistant_turn():
    messages = [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]
    made = full_row({"messages": messages}, "messages")
    assert made.contexts == [messages[:-1]]
    assert made.completion == messages[-1:]


@pytest.mark.parametrize("human", ["human", "user"])
@pytest.mark.parametrize("gpt", ["gpt", "chatgpt", "bing", "bard", "assistant"])
def test_sharegpt_roles_are_mapped(human, gpt):
    turns = [{"from": "system", "value": "s"}, {"from": human, "value": "u"}, {"from": gpt, "value": "a", "weight": 1}]
    expected = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "weight": 1},
    ]
    assert messages_of({"conversations": turns}) == expected
    # arrow fills in the keys of the other kind of turn, and of the other column
    mixed = [turn | {"role": None, "content": None} for turn in turns[:2]] + [
        {"from": None, "value": None} | expected[2]
    ]
    assert [
        {key: value for key, value in message.items() if value is not None}
        for message in messages_of({"messages": None, "conversations": mixed})
    ] == expected
    assert full_row({"conversations": turns}, "messages").completion == expected[2:]
    assert turns[0] == {"from": "system", "value": "s"}, "rows are not changed in place"


BLANK_CHAT = CHAT | {"completion": [assistant(" ")]}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (TEXT | {"completion": ""}, "constraints", "no output"),
        (TEXT | {"completion": " \n"}, "prompt", "no output"),
        (TEXT | {"completion": None}, "prompt", "no output"),
        (BLANK_CHAT, "constraints", "no output"),
        (CHAT | {"completion": []}, "constraints", "no output"),
        (CHAT | {"completion": [{"role": "assistant", "content": None, "tool_calls": None}]}, "prompt", "no output"),
        (TEXT | {"prompt": ""}, "constraints", "an empty context"),
        (TEXT | {"prompt": None}, "constraints", "an empty context"),
        (TEXT | {"prompt": None}, "prompt", "an empty context"),
        (CHAT | {"prompt": []}, "constraints", "an empty context"),
        (CHAT | {"prompt": [user("")]}, "prompt", "an empty context"),
        ({"contexts": [], "completion": "c"}, "contexts", "the contexts column is empty"),
        ({"contexts": None, "completion": "c"}, "contexts", "the contexts column is empty"),
        ({"contexts": ["a", ""], "completion": "c"}, "contexts", "an empty context"),
        ({"contexts": [[user("a")], []], "completion": [assistant("c")]}, "contexts", "an empty context"),
        ({"messages": []}, "messages", "the conversation has no answer"),
        ({"messages": None}, "messages", "the conversation has no answer"),
        ({"messages": [user("a")]}, "messages", "the conversation has no answer"),
        ({"messages": [assistant("a")]}, "messages", "an empty context"),
        ({"messages": [user("a"), assistant("")]}, "messages", "no output"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "messages", "the conversation has no answer"),
    ],
)
def test_rows_that_carry_nothing_are_dropped(row, kind, reason):
    with pytest.raises(RowDropped, match=reason):
        if kind in ("contexts", "constraints"):
            parallel_row(row, kind)
        else:
            full_row(row, kind)


def test_a_tool_call_is_an_output():
    assert full_row({"messages": [user("a"), CALL]}, "messages").completion == [CALL]


@pytest.mark.parametrize(
    ("row", "kind", "column"),
    [
        (TEXT | {"prompt": 5}, "prompt", "prompt"),
        (TEXT | {"prompt": 5}, "constraints", "prompt"),
        (TEXT | {"full_prompt": 5}, "constraints", "full_prompt"),
        (TEXT | {"completion": 5}, "prompt", "completion"),
        (TEXT | {"constraints": "Rhyme."}, "constraints", "constraints"),
        (TEXT | {"constraints": ["Rhyme.", None]}, "constraints", "constraints"),
        (CHAT | {"prompt": ["Describe the sea."]}, "prompt", "prompt"),
        (CHAT | {"prompt": [{"content": "no role"}]}, "constraints", "prompt"),
        (CHAT | {"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "constraints", "prompt"),
        ({"contexts": "abc", "completion": "c"}, "contexts", "contexts"),
        ({"contexts": ["a", 1], "completion": "c"}, "contexts", "contexts"),
        ({"contexts": [["a"]], "completion": "c"}, "contexts", "contexts"),
        ({"messages": "abc"}, "messages", "messages"),
        ({"messages": ["abc"]}, "messages", "messages"),
        ({"messages": [{"content": "a"}]}, "messages", "messages"),
        ({"conversations": [{"value": "a"}]}, "messages", "conversations"),
    ],
)
def test_wrong_types_are_refused_naming_the_column(row, kind, column):
    with pytest.raises(ValueError, match=rf"Got .* in column '{column}', expected .* Fix: convert the column"):
        if kind in ("contexts", "constraints"):
            parallel_row(row, kind)
        else:
            full_row(row, kind)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (CHAT | {"completion": "text"}, "constraints"),
        (TEXT | {"completion": [assistant("chat")]}, "prompt"),
        ({"contexts": ["a", [user("b")]], "completion": "c"}, "contexts"),
        (TEXT | {"full_prompt": [user("a")]}, "constraints"),
    ],
)
def test_strings_beside_messages_are_refused(row, kind):
    with pytest.raises(
        ValueError, match=r"Got .*completion.*expected all .* to be strings, or all lists of messages.*Fix"
    ):
        if kind in ("contexts", "constraints"):
            parallel_row(row, kind)
        else:
            full_row(row, kind)


def test_rows_for_trl_keep_what_the_chat_template_reads():
    row = {"messages": [user("a")], "tools": '[{"name": "f"}]', "chat_template_kwargs": None, "id": 1}
    kept = {"tools": '[{"name": "f"}]', "chat_template_kwargs": {}}
    assert messages_row(row) == {"messages": [user("a")]} | kept
    row |= {"prompt": "p", "completion": "c"}
    assert SFTRows("prompt").make(row, 0) == [{"prompt": "p", "completion": "c"} | kept]
    with pytest.raises(RowDropped, match="an empty conversation"):
        messages_row({"conversations": []})
