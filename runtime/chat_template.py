"""Renders messages to a prompt with a checkpoint's Jinja chat template.

A template comes from a stranger, so it runs in Jinja's immutable sandbox, sees plain JSON data only, and has no way to
Python's internals. Whatever goes wrong in it becomes one ValueError that names the template's line.
"""

import json
import re
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

# InternLM3-8B-Instruct's published template; used for checkpoints that ship none.
PUBLISHED_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

ROLES = ("system", "developer", "user", "assistant", "tool", "environment", "function")
# InternLM names the plugin in the role ("environment name=<|plugin|>"), and its template prints the role as it is.
_ROLE = re.compile(rf"({'|'.join(ROLES)})( name=\S+)?")

# Marks where the final message ends. The trailing space tells whether the template trims what it prints.
_CONTINUE_TAG = "[[the final message continues here]] "


class _Environment(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks text for training masks; for rendering it is its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way to declare them)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


_environment = _Environment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
)
_environment.filters["tojson"] = _tojson
_environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)


@lru_cache
def _compile(template: str) -> jinja2.Template:
    if not isinstance(template, str):
        raise TypeError(f"chat_template must be a string of Jinja, not {type(template).__name__}")
    try:
        return _environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: syntax error: {error.message}") from error


@lru_cache
def template_variables(template: str) -> frozenset[str]:
    """The names that a template reads and does not set itself."""
    _compile(template)
    return frozenset(jinja2.meta.find_undeclared_variables(_environment.parse(template)))


def _plain(value: Any, name: str) -> Any:
    """A copy of `value` made of JSON's types only, so that a template can reach no method of a caller's object."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: a chat template is given JSON data only: {error}") from error


def _content(message: Mapping[str, Any], where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("role") == "assistant" and message.get("tool_calls"):
        return ""
    if not isinstance(content, list):
        raise ValueError(f"{where}: 'content' must be a string or a list of text parts, not {type(content).__name__}")
    for part in content:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f"{where}: this model reads text only: a part of 'content' must look like "
                             f"{{'type': 'text', 'text': '...'}}, but one is {part!r:.80}")  # fmt: skip
    return "\n".join(part["text"] for part in content)


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A plain copy of `messages` with every content as one string; the text parts of a list are joined by newlines.

    Raises:
        ValueError: no messages, or one that is no dict with a known role and text; the message names its index.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{'role', 'content'}} dicts, not {messages!r:.80}")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} must be a dict with 'role' and 'content', not {message!r:.80}")
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise ValueError(f"{where}: unknown role {role!r}; known roles are {', '.join(ROLES)}")
        fields = {key: value for key, value in message.items() if value is not None}
        checked.append(_plain({**fields, "content": _content(message, where)}, where))
    return checked


def _line(error: Exception) -> int | str:
    """The template's line that raised: Jinja gives a template's frames the file name <template>."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return lines[-1] or "?" if lines else "?"


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The prompt for one conversation.

    Args:
        template: Jinja source.
        messages: dicts with `role` and `content`, see `check_messages`.
        add_generation_prompt: end with the header of an assistant's message.
        continue_final_message: end inside the last message, so that the model goes on writing it.
        variables: what else the template may read (bos_token, tools, ...), as JSON data.

    Raises:
        ValueError: a wrong message, a template that fails or that breaks out of its sandbox (with its line), both
            switches at once, or a template that does not print the message to continue.
    """
    if add_generation_prompt and continue_final_message:
        raise ValueError("add_generation_prompt starts a new message and continue_final_message goes on with the last "
                         "one: give one of them")  # fmt: skip
    checked = check_messages(messages)
    if continue_final_message:
        checked[-1]["content"] += _CONTINUE_TAG
    compiled = _compile(template)
    plain = {name: _plain(value, name) for name, value in variables.items()}
    try:
        prompt = compiled.render(messages=checked, add_generation_prompt=add_generation_prompt, **plain)
    except Exception as error:  # the template is foreign code: whatever it does wrong is one kind of error here
        raise ValueError(f"chat template, line {_line(error)}: {error}") from error
    return _cut_at_tag(prompt) if continue_final_message else prompt


def _cut_at_tag(prompt: str) -> str:
    position = prompt.rfind(_CONTINUE_TAG.strip())
    if position < 0:
        raise ValueError("continue_final_message: the chat template does not print the final message's content")
    trimmed = not prompt.startswith(_CONTINUE_TAG, position)
    return prompt[:position].rstrip() if trimmed else prompt[:position]
