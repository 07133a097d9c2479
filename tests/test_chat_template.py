"""Chat templates: the published one, transformers as the oracle of rendering, and hostile or broken templates."""

import json
import re
from datetime import datetime
from pathlib import Path

import pytest
import sentencepiece
from internlm3 import InternLM3Tokenizer
from internlm3.runtime.chat_template import PUBLISHED_TEMPLATE, check_messages, render

MESSAGES = [
    {"role": "system", "content": "You are an AI assistant whose name is InternLM (书生·浦语)."},
    {"role": "user", "content": "  Please tell me five scenic spots in Shanghai \n"},
    {"role": "assistant", "content": "1. 外滩 <b>&</b> 2. 豫园🙂 "},
    {"role": "user", "content": "More?"},
]
PREFILLED = [*MESSAGES[:2], {"role": "assistant", "content": "Five spots are: "}]

# Every construct that real checkpoints' templates use: loops with controls, namespaces, macros, filters, tests, tools.
RICH_TEMPLATE = """\
{{- bos_token }}
{%- macro header(role) %}{{ '<|im_start|>' + role + '\\n' }}{% endmacro %}
{%- set state = namespace(turns=0) %}
{% if tools %}
  {{- header('system') }}
  {% for tool in tools %}
{{ tool | tojson(indent=2) }}
  {% endfor %}
{% endif %}
{% for message in messages %}
  {% if message.role == 'system' and not loop.first %}{{ raise_exception('system must come first') }}{% endif %}
  {% if message.content is string and message.content | trim == 'skip' %}{% continue %}{% endif %}
  {% set state.turns = state.turns + 1 %}
{{ header(message['role']) }}
  {%- if message.role == 'assistant' %}
    {%- generation %}{{ message.content | trim }}{% endgeneration %}
  {%- else %}{{ message.content }}{% endif %}
{{- '<|im_end|>' }} {# turn #} {{ state.turns }}/{{ messages | length }} {{ message | tojson }}
  {% if state.turns == 5 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ header('assistant') }}{% if enable_thinking is defined %}<think>{% endif %}
{% endif %}"""
TOOLS = [{"type": "function", "function": {"name": "天气", "parameters": {"q": {"type": "string", "x": "<&'>"}}}}]


def by_transformers(template: str, messages: list, **options) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template(conversations=[messages], chat_template=template, **options)
    return text


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


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert check_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "one\ntwo"}]


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


def test_contradictory_switches():
    with pytest.raises(ValueError, match="give one of them"):
        render(PUBLISHED_TEMPLATE, PREFILLED, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(ValueError, match="does not print the final message"):
        render("{{ messages[0].content }}", PREFILLED, continue_final_message=True)
    with pytest.raises(TypeError, match="string of Jinja, not int"):
        render(5, MESSAGES)


# Through the tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> InternLM3Tokenizer:
    directory = tmp_path_factory.mktemp("chat")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([json.dumps(MESSAGES, ensure_ascii=False)] * 5),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe", vocab_size=400, hard_vocab_limit=False, byte_fallback=True, minloglevel=2, num_threads=1,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    added = {"500": {"content": "<|im_start|>"}, "501": {"content": "<|im_end|>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "pad_token": "</s>"}))
    return InternLM3Tokenizer.from_pretrained(directory)


def test_model_page(tokenizer):
    """The tokenizer's lines of the model's page, word for word."""
    messages = MESSAGES[:2]
    tokenized_chat = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_tensors="pt"
    )
    assert tokenized_chat.dtype.is_signed
    assert tokenized_chat.shape == (1, tokenized_chat.numel())
    assert tokenized_chat[0, :2].tolist() == [1, 500]
    assert (tokenized_chat == 1).sum() == 1  # the template's own bos, and no second one
    prompt = tokenizer.batch_decode(tokenized_chat)[0]
    assert prompt == render(PUBLISHED_TEMPLATE, messages, bos_token="<s>", add_generation_prompt=True)
    generated_ids = [output_ids[3:] for output_ids in tokenized_chat]
    assert prompt.endswith(tokenizer.batch_decode(generated_ids)[0])


def test_kinds_of_output(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    ids = tokenizer.apply_chat_template(MESSAGES)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.apply_chat_template(MESSAGES, return_dict=True).attention_mask == [1] * len(ids)
    both = [MESSAGES, MESSAGES[:1]]
    assert tokenizer.apply_chat_template(both, tokenize=False)[0] == text
    batch = tokenizer.apply_chat_template(both, padding=True, return_tensors="pt", return_dict=True)
    assert batch.attention_mask.sum(1).tolist() == list(map(len, tokenizer.apply_chat_template(both)))
    assert tokenizer.apply_chat_template(MESSAGES, truncation=True, max_length=5) == ids[:5]
    assert (
        tokenizer.apply_chat_template(MESSAGES, tokenize=False, chat_template="{{ x }}{{ eos_token }}", x=3) == "3</s>"
    )
    tools = tokenizer.apply_chat_template(MESSAGES, tokenize=False, chat_template=RICH_TEMPLATE, tools=TOOLS)
    assert tools == by_transformers(RICH_TEMPLATE, MESSAGES, tools=TOOLS, bos_token="<s>")


def test_misspelt_keyword(tokenizer):
    with pytest.raises(TypeError, match="'add_generation_promt'; did you mean 'add_generation_prompt'"):
        tokenizer.apply_chat_template(MESSAGES, add_generation_promt=True)
    template = PUBLISHED_TEMPLATE + "{{ tool }}"
    assert tokenizer.apply_chat_template(MESSAGES, chat_template=template, tokenize=False, tool="hammer").endswith(
        "hammer"
    )
    for conversation in ([], [[]], "x", None, {"role": "user"}):
        with pytest.raises(ValueError, match="non-empty list"):
            tokenizer.apply_chat_template(conversation)
