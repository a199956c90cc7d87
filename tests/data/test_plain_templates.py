"""Which chat templates only print what messages say."""

from importlib.resources import files

import pytest

from trl_miso.data.plain_templates import prints_content

BUNDLED = sorted(
    (file.name, file.read_text())
    for file in files("trl").joinpath("chat_templates").iterdir()
    if file.name.endswith(".jinja")
)


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
