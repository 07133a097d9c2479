"""Rendering of chat templates: the published one, transformers as the oracle, and hostile or broken templates."""

import contextlib
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from internlm3.runtime.chat_template import isolation, sandbox
from internlm3.runtime.chat_template.messages import check_messages
from internlm3.runtime.chat_template.render import PUBLISHED_TEMPLATE, render, template_variables
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


# Limits


@pytest.fixture
def short_time(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    monkeypatch.setattr(isolation, "_GRACE", 0.2)


def refused(template):
    """The message of the error that a template raises. It ends its child process, and another one serves the next."""
    with pytest.raises(ValueError, match=r"^chat template, line [0-9?]+: ") as caught:
        render(template, MESSAGES)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    assert render("{{ messages[3].content }}", MESSAGES) == "More?"
    return str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    ],
)
def test_time_has_a_limit(template, short_time):
    assert refused(template) == "chat template, line 1: it runs for more than 0.2 seconds"


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("[@, @]", "{{ n.x == n.y }}"),
        ("[@, @]", "{{ n.x in [n.y] }}"),
        ("(@, @)", "{{ {n.x: 1} }}"),
        ("{'a': @, 'b': @}", "{{ n.x == n.y }}"),
        ("[@, @]", "{{ n.x | tojson }}"),
        ("[@, @]", "{{ n.x }}"),
        ("@ * 9 + 2 ** (i * 99999)", "{{ n.x ** 99 // n.y is odd }}"),  # takes minutes; constants would be folded
    ],
)
def test_c_code_has_the_same_limit_on_time(kind, use, short_time):
    sets = "".join("{% set n." + name + " = " + kind.replace("@", f"n.{name}") + " %}" for name in "xy")
    template = "{% set n = namespace(x=1, y=1) %}{% for i in range(40) %}" + sets + "{% endfor %}" + use
    assert refused(template).endswith("it runs for more than 0.2 seconds")


@pytest.mark.parametrize(
    "template",
    [
        "{{ a }}" * 300_000,
        "{{ " + "+".join("1" * 1_000_000) + " }}",
        "{% if a %}" + "{% elif a %}" * 100_000 + "{% endif %}",
    ],
    ids=["outputs", "operators", "branches"],
)
def test_compiling_has_the_same_limit(template, short_time):
    assert refused(template) == "chat template, line ?: it runs for more than 0.2 seconds"
    with pytest.raises(ValueError, match=r"0\.2 seconds"):
        template_variables(template)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space of a process")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{{ ('a' * 9999999) | replace('a', 'b' * 99) | length }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=[]) %}{% for i in range(999) %}{% set n.x = n.x + [('a' * 999999) ~ i] %}{% endfor %}",
        "{{ 9" + "9" * 2_000_000 + " }}",
    ],
)  # fmt: skip
def test_memory_has_a_limit(template):
    """The sum of all values counts."""
    assert "it needs more than 512 MB of memory" in refused(template)


def test_sizes_have_a_limit(monkeypatch):
    monkeypatch.setattr(sandbox, "SIZE", 10_000)
    assert refused("{{ 'a' * 10001 }}") == "chat template, line ?: it makes a text of more than 10000 characters"
    assert "it and the messages have more than 10000 char" in refused("a" * 10_000)
    assert render("{{ 'a' * 10000 }}", MESSAGES) == "a" * 10_000


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
        "{% for a in [1] %}" * 100_000 + "{% endfor %}" * 100_000,
        "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "{{ " + "[" * 100_000 + "1" + "]" * 100_000 + " }}",
        "{{ " + "not " * 100_000 + "1 }}",
        "{{ " + "1 if 0 else " * 100_000 + "1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
    ids=["a few loops", "loops", "brackets", "lists", "operators", "conditions", "macros"],
)
def test_a_template_that_is_too_deep_for_python(template):
    refused(template)


def test_a_child_process_serves_one_template_after_another():
    render("{{ messages[0].role }}", MESSAGES)
    children = list(isolation._idle)
    for index in range(20):
        assert render("{{ messages[0].role }}" + str(index), MESSAGES) == f"system{index}"
        refused("{{ raise_exception('no') }}")
    assert children and isolation._idle == children


def test_several_threads():
    with ThreadPoolExecutor(6) as pool:
        texts = pool.map(lambda index: render("{{ x }}", MESSAGES, x=index), range(60))
        assert list(texts) == [str(index) for index in range(60)]
    assert len(isolation._idle) <= isolation._MOST_IDLE


def test_the_published_template_needs_no_child_process(monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    monkeypatch.setattr(isolation, "_idle", [])
    assert render(PUBLISHED_TEMPLATE, MESSAGES[3:], bos_token="") == "<|im_start|>user\nMore?<|im_end|>\n"
    with pytest.raises(OSError, match=r"sys\.executable does not name Python"):
        render("{{ messages }}", MESSAGES)


INTERRUPTED = """
import os, signal, sys
from internlm3.runtime.chat_template import sandbox
from internlm3.runtime.chat_template.render import render
def once(*_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, once)
sandbox.SECONDS = 1000
messages = [{"role": "user", "content": "hi"}]
assert render("{{ messages[0].content }}", messages) == "hi"
try:
    print("begins", flush=True)
    render("{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}", messages)
except KeyboardInterrupt:
    assert render("{{ messages[0].content }}", messages) == "hi"
    os._exit(9)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_ends_a_rendering():
    """And the next one gets its own text, from another child."""
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        for _ in range(600):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
                break
    assert process.returncode == 9


PROGRAM = """
import os, sys
from internlm3.runtime.chat_template.render import render
def text(who):
    return render("{{ messages[0].content }}", [{"role": "user", "content": who}])
assert text("one") == "one"
if hasattr(os, "fork"):
    child = os.fork()
    assert text(f"child {child}") == f"child {child}"
    if child == 0:
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert text("parent") == "parent"
os._exit(3)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="closes streams in a POSIX shell")
@pytest.mark.parametrize("streams", ["", "<&-", "<&- >&- 2>&-"])
def test_forks_and_closed_streams(streams):
    command = f'exec "$0" -c "$1" {streams}'
    assert subprocess.run(["sh", "-c", command, sys.executable, PROGRAM], timeout=120).returncode == 3


def test_a_long_conversation_is_within_the_limits():
    messages = [MESSAGES[0], *MESSAGES[1:3] * 2000]
    template = RICH_TEMPLATE.replace("state.turns == 5", "false")
    assert render(template, messages, bos_token="<s>") == by_transformers(template, messages, bos_token="<s>")
    numbers = "{{ [99999999, -5] | tojson }}{{ 99999999 | tojson(indent=2, ensure_ascii=true) }}{{ 99999999 ~ 'a' }}"
    assert render(numbers, MESSAGES) == by_transformers(numbers, MESSAGES) == "[99999999, -5]9999999999999999a"
    long = [{"role": "user", "content": "a b\n" * 1_000_000}]
    template = "{{ messages[0].content | replace('\n', '<br>') | trim }}"
    assert render(template, long) == by_transformers(template, long)


def test_contradictory_switches():
    with pytest.raises(ValueError, match="give one of them"):
        render(PUBLISHED_TEMPLATE, PREFILLED, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(ValueError, match="does not print the final message"):
        render("{{ messages[0].content }}", PREFILLED, continue_final_message=True)
    with pytest.raises(TypeError, match="string of Jinja, not int"):
        render(5, MESSAGES)
