"""Which chat templates only print what messages say, and that one rendering then serves all contexts."""

from importlib.resources import files

import pytest

from tests.test_tokenization import make_tokenizer
from trl_miso.contexts import Row
from trl_miso.templates import in_place_of, prints_content
from trl_miso.tokenization import Tokenizer

BUNDLED = sorted(
    (file.name, file.read_text())
    for file in files("trl").joinpath("chat_templates").iterdir()
    if file.name.endswith(".jinja")
)
HOSTILE = (
    "a", "</think>b", "<think>", "<tool_response>c</tool_response>", '{"a": 1}', "{{ messages }}", "{% if x %}", "<|im_start|>system",
    "a\n\n b\tc", "ß世界🎉", "/no_think", "\ue000", "<|eot_id|>", "[INST]", "None", "a  'b' \"c\" \\n",
)  # fmt: skip


def loop(body):
    return "{% for m in messages %}" + body + "{% endfor %}"


PRINTS = [
    loop("{{ m.content }}"),
    loop("{{ m['role'] + ': ' + m['content'] | trim + eos_token }}"),
    loop("{{ m.content ~ '\n' }}{% if loop.last and not loop.first %}x{% endif %}"),
    loop("{% if m.role == 'user' %}{{ m.content if m.role == 'user' else '' }}{% endif %}"),
    loop("{% generation %}{{ m.content }}{% endgeneration %}") + "{{ messages | length }}",
]
LOOKS = [
    loop("{{ m }}"),
    loop("{{ m.content | upper }}"),
    loop("{{ m.content | length }}"),
    loop("{{ (m | string) }}"),
    loop("{% if '<' in m.content %}x{% endif %}{{ m.content }}"),
    loop("{% set c = m.content %}{{ c | upper }}"),
    loop("{% set c %}{{ m.content }}{% endset %}{{ c | upper }}"),
    loop("{{ m.get('content') | upper }}"),
    loop("{{ m.content.upper() }}"),
    loop("{% for k in m %}{{ m[k] | upper }}{% endfor %}"),
    loop("{{ m.content[:3] }}"),
    loop("{{ m.content if m.content else '' }}"),
    loop("{{ m.content * 2 }}"),
    loop("{{ m.content is string }}"),
    loop("{{ m.content == 'a' }}"),
    loop("{% for c in m.content %}{{ c }}-{% endfor %}"),
    loop("{{ loop.previtem }}"),
    "{{ messages[-1] }}",
    "{{ messages }}",
    "{{ messages[0].items() | list }}",
    "{% macro p(m) %}{{ m.content | upper }}{% endmacro %}" + loop("{{ p(m) }}"),
    "{% filter upper %}" + loop("{{ m.content }}") + "{% endfilter %}",
    "{% for m in messages if m.content %}{{ m.content }}{% endfor %}",
    "{% set last = messages[-1] %}{{ last }}",
    "{% for",
]


@pytest.mark.parametrize("template", PRINTS)
def test_templates_that_only_print(template):
    assert prints_content(template)


@pytest.mark.parametrize("template", LOOKS)
def test_templates_that_may_look_into_messages(template):
    assert not prints_content(template)


def test_bundled_templates_are_both():
    known = {name for name, template in BUNDLED if prints_content(template)}
    assert {"llama3_training.jinja", "phi3.jinja"} <= known
    assert len(known) < len(BUNDLED)


@pytest.mark.parametrize("template", [*PRINTS, *(text for _, text in BUNDLED if prints_content(text))])
def test_one_rendering_serves_all_contexts(template):
    """Equal to rendering each context by itself, whatever the texts."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "second"}]
    contexts = [[*turns, {"role": "user", "content": text}] for text in HOSTILE]
    row = Row(contexts, [{"role": "assistant", "content": "third"}])
    assert in_place_of(contexts) == list(HOSTILE)
    (prompts,) = Tokenizer(tokenizer)._prompts([row], {})
    assert prompts == tokenizer.apply_chat_template(contexts, tokenize=False, add_generation_prompt=True)


def test_what_cannot_stand_in_place():
    user = {"role": "user", "content": "a"}
    for other in (
        [{"role": "user", "content": " b"}],  # a template may trim
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "b"}]}],
        [{"role": "system", "content": "b"}],
        [{"role": "user", "content": "b", "name": "c"}],
        [user, user],
    ):
        assert in_place_of([[user], other]) is None
    assert in_place_of([[user], [{"role": "user", "content": "b"}]]) == ["a", "b"]
