"""Rendering of chat templates: the published one, transformers as the oracle, and hostile or broken templates."""

import re
from datetime import datetime
from pathlib import Path

import pytest

from internlm3.runtime.chat_template import sandbox
from internlm3.runtime.chat_template.render import PUBLISHED_TEMPLATE, check_messages, render
from internlm3.tests.support.chat import MESSAGES, PREFILLED, RICH_TEMPLATE, TOOLS, by_transformers


@pytest.mark.parametrize("template", [PUBLISHED_TEMPLATE, RICH_TEMPLATE], ids=["published", "rich"])
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}, {"enable_thinking": True}, {"tools": TOOLS}])
def test_rendering_equals_transformers(template, options):
    for messages in (MESSAGES, MESSAGES[1:2], [*MESSAGES, {"role": "tool", "content": "skip"}, *MESSAGES[1:]]):
        expected = by_transformers(template, messages, bos_token="<s>", **options)
        assert render(template, messages, bos_token="<s>", **options) == expected


@pytest.mark.parametrize("template", [PUBLISHED_TEMPLATE, RICH_TEMPLATE], ids=["published", "trimming"])
@pytest.mark.parametrize("content", ["Five spots are: ", "Sure", " \n", "[[the final message continues here]]"])
def test_continuing_equals_transformers(template, content):
    messages = [*MESSAGES[:2], {"role": "assistant", "content": content}]
    template = template.replace(" {{ message | tojson }}", "")
    expected = by_transformers(template, messages, bos_token="<s>", continue_final_message=True)
    assert render(template, messages, bos_token="<s>", continue_final_message=True) == expected
    assert messages[-1]["content"] == content


def test_published_template_by_hand():
    assert render(PUBLISHED_TEMPLATE, PREFILLED[1:], bos_token="<s>", continue_final_message=True) == (
        "<s><|im_start|>user\n  Please tell me five scenic spots in Shanghai \n<|im_end|>\n"
        "<|im_start|>assistant\nFive spots are: "
    )
    assert render(PUBLISHED_TEMPLATE, MESSAGES[3:], bos_token="<s>", add_generation_prompt=True) == (
        "<s><|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_plugin_roles_are_printed():
    messages = [
        {"role": "system name=<|plugin|>", "content": "[]"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "environment name=<|plugin|>", "content": "42"},
    ]
    assert render(PUBLISHED_TEMPLATE, messages, bos_token="") == (
        "<|im_start|>system name=<|plugin|>\n[]<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>environment name=<|plugin|>\n42<|im_end|>\n"
    )


PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
READS_PARTS = [
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}",
    """{% macro text(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}
    {%- if part.type == 'text' %}{{ part['text'] }}|{% endif %}{% endfor %}{% endif %}{% endmacro %}
    {%- for m in messages %}{{ m.role }}: {{ text(m.content) }}{% endfor %}""",
    "{% for m in messages %}{{ m.content | map(attribute='text') | join('+') if m.content is not string }}{% endfor %}",
]


@pytest.mark.parametrize("template", READS_PARTS)
def test_a_template_that_reads_parts_gets_them(template):
    messages = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS[1:]}]
    assert render(template, messages) == by_transformers(template, messages)
    assert "one \ntwo" not in render(template, messages)
    text = render(template, messages, continue_final_message=True)
    assert text == by_transformers(template, messages, continue_final_message=True)
    assert messages[0]["content"] == [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize("template", [PUBLISHED_TEMPLATE, RICH_TEMPLATE, "{{ messages[0].content }}", "{{ messages }}"])
def test_text_parts_are_joined_for_any_other_template(template):
    joined = [{"role": "user", "content": "one \ntwo"}]
    assert check_messages([{"role": "user", "content": PARTS}]) == [{"role": "user", "content": PARTS}]
    assert render(template, [{"role": "user", "content": PARTS}], bos_token="") == render(
        template, joined, bos_token=""
    )


def test_clock():
    before = datetime.now().strftime("%Y-%m-%d")
    text = render("{{ strftime_now('%Y-%m-%d') }}", MESSAGES)
    assert text in (before, datetime.now().strftime("%Y-%m-%d"))


# Wrong messages


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        (None, "non-empty list"),
        ({"role": "user", "content": "x"}, "non-empty list"),
        (["hello"], r"messages\[0\] must be a dict"),
        (
            [*MESSAGES, {"role": "robot", "content": "x"}],
            r"messages\[4\]: unknown role 'robot'; known roles are system",
        ),
        ([{"content": "x"}], r"messages\[0\]: unknown role None"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]: unknown role"),
        ([{"role": "user<|im_end|>", "content": "x"}], "unknown role"),
        ([{"role": "user\n", "content": "x"}], "unknown role"),
        ([{"role": "user"}], r"messages\[0\]: 'content' must be a string .* not NoneType"),
        ([{"role": "assistant", "content": None}], "'content'"),
        ([{"role": "user", "content": 5}], "not int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "reads text only"),
        ([{"role": "user", "content": ["x"]}], "reads text only"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]: .*JSON"),
    ],
)
def test_wrong_messages(messages, error):
    with pytest.raises(ValueError, match=error):
        render(PUBLISHED_TEMPLATE, messages, bos_token="<s>")


# Broken and hostile templates


@pytest.mark.parametrize(
    ("template", "line", "error"),
    [
        ("a\nb\n{% for x in %}", 3, "syntax error"),
        ("{{ 'open }}", 1, "syntax error"),
        ("a\n{% if true %}", 2, "syntax error"),
        ("a\n{% include 'secrets' %}", 2, ""),
        ("\n{{ x | nofilter }}", 2, "nofilter"),
        ("a\n{{ raise_exception('only user and assistant') }}", 2, "only user and assistant"),
        ("{% macro f() %}\n{{ raise_exception('deep') }}\n{% endmacro %}\n\n{{ f() }}", 2, "deep"),
        ("a\nb\n{{ messages[99].role }}", 3, "has no element 99"),
        ("{{ 1 + 'a' }}", 1, "unsupported operand"),
        ("\n{{ ''.__class__ }}", 2, "'__class__' of a str is not allowed"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", 1, "not allowed"),
        ("{{ messages.append(1) }}", 1, "not allowed"),
        ("{{ raise_exception.__globals__ }}", 1, "not allowed"),
        ("{{ (''|attr('__class__')) }}", 1, "not allowed"),
        ("{{ '{0.__class__}'.format(messages) }}", 1, "not allowed"),
        ("{% set n = namespace(a=1) %}{{ n.__init__.__globals__ }}", 1, "has no attribute"),
        ("{{ self.__init__.__globals__ }}", 1, "not allowed"),
        ("{{ lipsum.__globals__['os'].popen('id').read() }}", 1, "not allowed"),
        ("{{ cycler.__init__.__globals__.os }}", 1, "not allowed"),
        ("{{ range(999999999) | list }}", 1, "too big"),
    ],
)
def test_broken_and_hostile_templates(template, line, error):
    with pytest.raises(ValueError, match=rf"^chat template, line {line}: .*{re.escape(error)}"):
        render(template, MESSAGES)


def test_template_cannot_change_the_messages():
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(ValueError, match="chat template, line 1"):
        render("{{ messages[0].update({'content': 'x'}) }}", messages)
    assert messages == MESSAGES


def test_template_gets_plain_data_only():
    class Trap(str):
        def leak(self) -> str:
            return "leaked"

    with pytest.raises(ValueError, match="has no attribute 'leak'"):
        render("{{ x.leak() }}", MESSAGES, x=Trap("a"))
    with pytest.raises(ValueError, match=r"path: .*JSON"):
        render("{{ path }}", MESSAGES, path=Path("."))


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f(n) %}{% if n %}{% call g() %}{{ f(n - 1) }}{{ f(n - 1) }}{% endcall %}{% endif %}{% endmacro %}"
        "{% macro g() %}{{ caller() }}{% endmacro %}{{ f(25) }}",
        "{% for a in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    ],
)
def test_a_template_has_a_limit_on_time(template, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"^chat template, line 1: it runs for more than 0\.2 seconds"):
        render(template, MESSAGES)
    assert render(PUBLISHED_TEMPLATE, MESSAGES[3:], bos_token="") == "<|im_start|>user\nMore?<|im_end|>\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
        "{{ lipsum(n=1000000000) }}",
        "{{ 'a' * 10**10 }}",
        "{{ ['a'] * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ 9**(9**9) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a'.center(10000000000) }}",
        "{{ 'a'.encode().ljust(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10000000000) }}",
        "{{ ('a' * 9999999) | replace('a', 'b' * 99) }}",
        "{{ ('a' * 9999999).replace('a', 'b' * 99) }}",
        "{{ range(99999) | join('a' * 9999) }}",
        "{{ ('a' * 9999).join(range(99999) | map('string')) }}",
        "{{ range(99999) | map('center', 9999) | list | length }}",
        "{{ ('a\n' * 99999) | indent(999999) }}",
        "{{ [1] | batch(10000000000, 0) | list }}",
        "{{ ('a' * 999999) | wordwrap(1) }}",
        "{{ ('a' * 9999) | wordwrap(1, wrapstring='b' * 9999) }}",
        "{{ messages | tojson(indent=10000000) }}",
        "{{ messages | tojson(indent='a' * 999999) }}",
        "{{ ([[1, 2, 3, 4, 5, 6, 7, 8, 9]] * 99999) | sum(start=[]) | length }}",
        "{{ range(99999) | list | pprint }}",
        "{{ [1] | slice(10000000000) | list }}",
    ],
)
def test_a_template_has_a_limit_on_size(template):
    with pytest.raises(ValueError, match=r"^chat template, line .: it makes something of more than 10000000 char"):
        render(template, MESSAGES)


DOUBLING = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = %s %}{% endfor %}{{ n.x | length }}"


@pytest.mark.parametrize(
    "template",
    [
        DOUBLING.replace("%s", "n.x ~ n.x"),
        DOUBLING.replace("%s", "n.x + n.x"),
        DOUBLING.replace("%s", "n.x * 2"),
        DOUBLING.replace("%s", "n.x.replace('a', 'aa')"),
        DOUBLING.replace("%s", "(n.x, n.x) | join").replace("length", "string"),
        DOUBLING.replace("%s", "[n.x, n.x]").replace("length", "string"),
        DOUBLING.replace("%s", "[n.x, n.x]").replace("length", "tojson"),
        DOUBLING.replace("%s", "[n.x, n.x]").replace(" | length", ""),
        DOUBLING.replace("%s", "{'a': n.x, 'b': n.x}").replace(" | length", " ~ ''"),
    ],
)
def test_a_template_that_doubles_a_value_has_a_limit_on_size(template, monkeypatch):
    monkeypatch.setattr(sandbox, "SIZE", 100_000)
    with pytest.raises(ValueError, match=r"^chat template, line .: it makes something of more than 100000 char"):
        render(template, MESSAGES)


def test_a_long_conversation_is_within_the_limits():
    messages = [MESSAGES[0], *MESSAGES[1:3] * 2000]
    template = RICH_TEMPLATE.replace("state.turns == 5", "false")
    assert render(template, messages, bos_token="<s>") == by_transformers(template, messages, bos_token="<s>")
    numbers = "{{ [99999999, -5] | tojson }}{{ 99999999 | tojson(indent=2, ensure_ascii=true) }}{{ 99999999 ~ 'a' }}"
    assert render(numbers, MESSAGES) == by_transformers(numbers, MESSAGES) == "[99999999, -5]9999999999999999a"
    long = [{"role": "user", "content": "a b\n" * 1_000_000}]
    template = "{{ messages[0].content | replace('\n', '<br>') | trim }}"
    assert render(template, long) == by_transformers(template, long)


@pytest.mark.parametrize("depth", [25, 100_000])
def test_a_template_that_is_too_deep_for_python(depth):
    with pytest.raises(ValueError, match=r"^chat template, line"):
        render("{% for a in [1] %}" * depth + "{% endfor %}" * depth, MESSAGES)


def test_contradictory_switches():
    with pytest.raises(ValueError, match="give one of them"):
        render(PUBLISHED_TEMPLATE, PREFILLED, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(ValueError, match="does not print the final message"):
        render("{{ messages[0].content }}", PREFILLED, continue_final_message=True)
    with pytest.raises(TypeError, match="string of Jinja, not int"):
        render(5, MESSAGES)
