"""Conversations and chat templates for tests, and transformers as the oracle of rendering."""

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


def by_transformers(template, messages, **options):
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(conversations=[messages], chat_template=template, **options)
    return texts[0]
