"""Conversations with tools as prompts: in InternLM's format by a few lines of string joining, else by transformers."""

import json

import pytest

from internlm3 import InternLM3Tokenizer
from internlm3.runtime.chat_template.messages import check_messages
from internlm3.runtime.chat_template.render import PUBLISHED_TEMPLATE
from internlm3.runtime.tools.formats import HERMES, INTERNLM, format_of
from internlm3.runtime.tools.prompt import chat_prompt
from internlm3.runtime.tools.schemas import tool_schemas
from internlm3.tests.support.chat import by_transformers

WEATHER = {
    "type": "function",
    "function": {
        "parameters": {"type": "object", "properties": {"城市": {"type": "string"}}, "required": ["城市"]},
        "strict": True,
        "description": "天气 of a city",
        "name": "weather",
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def asked(name, id, arguments):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "今天上海的天气？ And the time?"},
    {
        "role": "assistant",
        "content": "One moment.",
        "tool_calls": [asked("weather", "call_1", '{"城市": "上海"}'), asked("clock", "call_2", "")],
        "refusal": None,
    },
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "12:00"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"celsius": 22}'},
    {"role": "assistant", "content": None, "tool_calls": [asked("clock", "call_3", {})]},
    {"role": "tool", "tool_call_id": "call_3", "content": "12:01"},
]
# By InternLM's chat_format.md: https://github.com/InternLM/InternLM/blob/main/chat/chat_format.md
INTERNLM_PROMPT = """\
<s><|im_start|>system
Be brief.<|im_end|>
<|im_start|>system name=<|plugin|>
[{"name": "weather", "description": "天气 of a city", "parameters": {"type": "object", "properties": {"城市": \
{"type": "string"}}, "required": ["城市"]}}, {"name": "clock", "parameters": {"type": "object", "properties": {}}}]\
<|im_end|>
<|im_start|>user
今天上海的天气？ And the time?<|im_end|>
<|im_start|>assistant
One moment.<|action_start|><|plugin|>
{"name": "weather", "parameters": {"城市": "上海"}}<|action_end|><|action_start|><|plugin|>
{"name": "clock", "parameters": {}}<|action_end|><|im_end|>
<|im_start|>environment name=<|plugin|>
{"celsius": 22}<|im_end|>
<|im_start|>environment name=<|plugin|>
12:00<|im_end|>
<|im_start|>assistant
<|action_start|><|plugin|>
{"name": "clock", "parameters": {}}<|action_end|><|im_end|>
<|im_start|>environment name=<|plugin|>
12:01<|im_end|>
<|im_start|>assistant
"""
# A template that knows tools, in the manner of Hermes's and Qwen's.
HERMES_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- 'Call by <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{%- set written = {'name': call.function.name, 'arguments': call.function.arguments} %}
{{- '\\n<tool_call>\\n' + (written | tojson) + '\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@pytest.fixture
def tokenizer(plain):
    tokenizer = InternLM3Tokenizer.from_pretrained(plain)
    tokenizer.chat_template = PUBLISHED_TEMPLATE
    return tokenizer


def prompt_of(tokenizer, messages, tools=()):
    return chat_prompt(tokenizer, check_messages(messages), tool_schemas(list(tools)))


def test_internlms_format(tokenizer):
    assert prompt_of(tokenizer, CONVERSATION, [WEATHER, CLOCK]) == INTERNLM_PROMPT
    without_system = INTERNLM_PROMPT.replace("<|im_start|>system\nBe brief.<|im_end|>\n", "")
    assert prompt_of(tokenizer, CONVERSATION[1:], [WEATHER, CLOCK]) == without_system
    begin, end = INTERNLM_PROMPT.index("<|im_start|>system name"), INTERNLM_PROMPT.index("<|im_start|>user")
    assert prompt_of(tokenizer, CONVERSATION) == INTERNLM_PROMPT[:begin] + INTERNLM_PROMPT[end:]


def test_conversations_without_tools_are_rendered_as_before(tokenizer):
    messages = [*CONVERSATION[:2], {"role": "environment name=<|plugin|>", "content": "x"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt_of(tokenizer, messages) == expected


def test_a_template_that_knows_tools_is_used_as_it_is(tokenizer):
    """Arguments are objects, as transformers gives them, and results are in the order of the calls."""
    tokenizer.chat_template = HERMES_TEMPLATE
    messages = json.loads(json.dumps(CONVERSATION))
    messages[2]["tool_calls"][0]["function"]["arguments"] = {"城市": "上海"}
    messages[2]["tool_calls"][1]["function"]["arguments"] = {}
    messages[3:5] = [messages[4], {**messages[3], "content": "12:00"}]
    expected = by_transformers(HERMES_TEMPLATE, messages, tools=[WEATHER, CLOCK], add_generation_prompt=True)
    assert prompt_of(tokenizer, CONVERSATION, [WEATHER, CLOCK]) == expected


def test_results_without_ids_stay_in_their_order(tokenizer):
    """As transformers' own examples have them, with the calls' functions beside their ids or without."""
    calls = {"role": "assistant", "tool_calls": [{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": 1}}]}
    results = [{"role": "tool", "name": "a", "content": "A"}, {"role": "tool", "name": "b", "content": "B"}]
    prompt = prompt_of(tokenizer, [CONVERSATION[1], calls, *results])
    assert '{"name": "b", "parameters": {"x": 1}}' in prompt
    assert prompt.index("\nA<|im_end|>") < prompt.index("\nB<|im_end|>")


@pytest.mark.parametrize("text", ['{"a": "x', "{'a': 1}", "[1]", '"x"', "[" * 100_000])
def test_arguments_that_are_no_object_are_in_the_prompt_as_they_were_written(tokenizer, text):
    """A model may write such a call, and its result says so: the conversation goes on."""
    call = {"role": "assistant", "content": None, "tool_calls": [asked("f", "1", text)]}
    result = {"role": "tool", "tool_call_id": "1", "content": "an error"}
    prompt = prompt_of(tokenizer, [CONVERSATION[1], call, result])
    assert f'<|plugin|>\n{{"name": "f", "parameters": {text}}}<|action_end|>' in prompt
    tokenizer.chat_template = HERMES_TEMPLATE
    written = {"name": "f", "arguments": text}
    assert json.dumps(written, ensure_ascii=False) in prompt_of(tokenizer, [CONVERSATION[1], call, result], [CLOCK])


@pytest.mark.parametrize("nothing", [None, "", "null", "{}", {}])
def test_no_arguments(tokenizer, nothing):
    call = {"role": "assistant", "content": None, "tool_calls": [asked("f", "1", nothing)]}
    assert '{"name": "f", "parameters": {}}' in prompt_of(tokenizer, [CONVERSATION[1], call])


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "tool", "tool_call_id": "call_9", "content": ""}, r"messages\[7\]: tool_call_id 'call_9'.*'call_3'"),
        ({"role": "assistant", "tool_calls": {"name": "f"}}, r"messages\[7\]: tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": ["f"]}, r"messages\[7\]: tool_calls\[0\] must be"),
        ({"role": "assistant", "tool_calls": [asked("", "1", "{}")]}, r"messages\[7\]: tool_calls\[0\] must be"),
        ({"role": "assistant", "tool_calls": [asked("f", "1", [1])]}, r"tool_calls\[0\] \('f'\) must be a JSON object"),
        ({"role": "assistant", "content": None}, r"messages\[7\]: 'content' must be"),
    ],
)
def test_a_bad_message_is_named(tokenizer, message, says):
    with pytest.raises(ValueError, match=says):
        prompt_of(tokenizer, [*CONVERSATION, message])


def test_a_template_that_drops_the_tools_is_an_error(tokenizer):
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert prompt_of(tokenizer, CONVERSATION) == CONVERSATION[1]["content"]
    with pytest.raises(ValueError, match="the model would not see the tools"):
        prompt_of(tokenizer, CONVERSATION, [WEATHER])


def test_the_format_of_calls_is_the_templates():
    assert format_of(PUBLISHED_TEMPLATE) is format_of("{{ messages[0].content }}") is INTERNLM
    assert format_of(HERMES_TEMPLATE) is HERMES
    assert format_of("{{ tools }}{{ '<|action_start|><|plugin|>' }}") is INTERNLM
    # The same tag around a format of functions and parameters in tags of their own.
    for other in ("<tool_call>\n<function=f>", "[TOOL_CALLS]"):
        with pytest.raises(ValueError, match="a format of tool calls that is not known here"):
            format_of("{{ tools }}" + other)
