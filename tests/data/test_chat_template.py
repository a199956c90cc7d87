"""Rendering: whatever a template is, the text that apply_chat_template gives; turns that a template leaves out are named."""

import random

import pytest
from jinja2 import TemplateError

from tests.data.test_plain_templates import BUNDLED, LOOKS, PRINTS, loop
from tests.data.test_tokenization import TEMPLATES, make_tokenizer
from trl_miso.data.chat_template import ChatRenderer
from trl_miso.data.plain_templates import prints_content

HOSTILE = (
    "a", "</think>b", "<think>", "<tool_response>c</tool_response>", '{"a": 1}', "{{ messages }}", "{% if x %}", "<|im_start|>system",
    "a\n\n b\tc", "ß世界🎉", "/no_think", "\ue000", "<|eot_id|>", "[INST]", "None", "a  'b' \"c\" \\n",
)  # fmt: skip


ODD = (
    {"content": " b"}, {"content": ""}, {"content": None}, {"content": [{"type": "text", "text": "b"}]},
    {"content": "b", "name": "c"}, {"content": "b", "tool_calls": None},
)  # fmt: skip


def conversations(seed, odd=()):
    """One to seven turns of every shape, some of them with texts that a template might take for its own."""
    random_ = random.Random(seed)
    made = []
    for _ in range(60):
        roles = ["system"] * random_.randint(0, 1) + ["user", "assistant"] * random_.randint(0, 2) + ["user"]
        turns = [{"role": role, "content": random_.choice(HOSTILE)} for role in roles]
        if odd and random_.random() < 0.5:
            at = random_.randrange(len(turns))
            turns[at] = turns[at] | random_.choice(odd)
        made.append(turns)
    return made


KNOWN = [*PRINTS, *(text for _, text in BUNDLED if prints_content(text))]


@pytest.mark.parametrize("template", [*KNOWN, *TEMPLATES.values(), *LOOKS[1:2]])
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}])
def test_equal_to_apply_chat_template(template, options):
    """Equal to rendering each conversation by itself, whatever the texts."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    plain, expected = [], []
    for conversation in conversations(1):
        try:
            expected.append(tokenizer.apply_chat_template(conversation, tokenize=False, **options))
            plain.append(conversation)
        except TemplateError:  # as of templates that know no system turn
            assert conversation[0]["role"] == "system"
    assert len(plain) > 10
    assert ChatRenderer(tokenizer)(plain, {}, **options) == expected
    assert ChatRenderer(make_tokenizer(), template)(plain, {}, **options) == expected


@pytest.mark.parametrize("template", [PRINTS[0], LOOKS[0]])
def test_messages_with_more_than_text_are_rendered_as_they_are(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    odd = conversations(2, ODD)
    assert ChatRenderer(tokenizer)(odd, {}) == tokenizer.apply_chat_template(odd, tokenize=False)


@pytest.mark.parametrize("odd", ODD[:2])
def test_what_trimming_would_change_is_rendered(odd):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = loop("[{{ m.content | trim }}]")
    turns = [[{"role": "user", "content": "a"}, {"role": "assistant"} | odd]]
    assert ChatRenderer(tokenizer)(turns, {}) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_few_renderings_serve_many_conversations(monkeypatch):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = loop("{{ m.role + m.content }}")
    rendered = []
    apply = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda self, c, **kw: rendered.extend(c) or apply(self, c, **kw)
    )
    many = conversations(3)
    ChatRenderer(tokenizer)(many, {})
    assert len(rendered) == len({tuple(m["role"] for m in c) for c in many}) <= 6


@pytest.mark.parametrize("looks", [False, True])
def test_a_turn_left_out_is_named_from_where_it_is_looked_for(looks):
    """By proved templates from their marks, though the text is there by chance; by others from another rendering."""
    tokenizer = make_tokenizer()
    said = "m.content[:9999]" if looks else "m.content"
    tokenizer.chat_template = loop("{% if m.role != 'system' %}{{ " + said + " }}{% endif %}")
    assert prints_content(tokenizer.chat_template) is not looks
    turns = [{"role": "system", "content": "sea"}, {"role": "user", "content": "the sea"}]
    render = ChatRenderer(tokenizer)
    assert render([turns], {}) == ["the sea"]
    with pytest.raises(
        ValueError, match="Got a turn of role 'system' from which the chat template leaves out 'sea'.*Fix"
    ):
        render([turns[1:], turns], {}, checked_from=[0, 0])


@pytest.mark.parametrize("second", ["Answer in rhyme, please.", "Be brief."])
def test_a_turn_left_out_is_named_though_its_text_stands_in_another_turn(second):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = loop(
        "{% if loop.first or m.role != 'system' %}[{{ m.content | replace('  ', ' ') }}]{% endif %}"
    )
    first = {"role": "system", "content": "Answer in rhyme, please."}
    turns = [first, {"role": "user", "content": "Write about the sea."}]
    render = ChatRenderer(tokenizer)
    assert render([turns], {}, checked_from=[0]) == ["[Answer in rhyme, please.][Write about the sea.]"]
    for start in (0, 1, 2):
        with pytest.raises(ValueError, match=f"Got a turn of role 'system' .* leaves out '{second}'.*Fix"):
            render([[*turns, first | {"content": second}]], {}, checked_from=[start])
    said_again = [*turns, {"role": "assistant", "content": "Answer in rhyme, please. I try."}]
    render([said_again], {}, checked_from=[0])
    with pytest.raises(ValueError, match="Got a turn of role 'system' .* leaves out 'Answer in rhyme, please.'.*Fix"):
        render([[turns[1], first, said_again[2]]], {}, checked_from=[0])


@pytest.mark.parametrize("names", [["get_current_tide", "get_current_rain"], ["get_current_tide"] * 2])
def test_a_tool_call_left_out_is_named_though_the_tools_are_rendered(names):
    """As by templates that render one call of a turn."""
    tokenizer = make_tokenizer()
    one = "{{ (tools | tojson) if loop.first }}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}"
    calls = [{"function": {"name": name, "arguments": {}}} for name in names]
    turns = [{"role": "user", "content": "How is it?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    tools = {"tools": [{"type": "function", "function": {"name": name}} for name in names]}
    for template, is_lost in ((loop(one), True), (loop(one.replace("[0]", "")), False)):
        render = ChatRenderer(tokenizer, template)
        if not is_lost:
            render([turns], tools, checked_from=[0])
            continue
        render([turns], tools, checked_from=[2])
        with pytest.raises(ValueError, match=f"Got a turn of role 'assistant' .* leaves out '{names[1]}'.*Fix"):
            render([turns], tools, checked_from=[0])
