"""Renders messages to a prompt with a checkpoint's Jinja chat template.

A template sees plain JSON data only, and runs in the sandbox of sandbox.py. Whatever goes wrong in it becomes
one ValueError that names the template's line.
"""

import json
import re
import traceback
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes

from .sandbox import GENERATION_BEGIN, GENERATION_END, Environment, bounds

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


_environment = Environment()


@lru_cache
def _compile(template: str) -> jinja2.Template:
    if not isinstance(template, str):
        raise TypeError(f"chat_template must be a string of Jinja, not {type(template).__name__}")
    try:
        return _environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: syntax error: {error.message}") from error
    except Exception as error:  # Python's own compiler has limits too
        raise ValueError(f"chat template, line ?: {error}") from error


@lru_cache
def template_variables(template: str) -> frozenset[str]:
    """The names that a template reads and does not set itself."""
    _compile(template)
    return frozenset(jinja2.meta.find_undeclared_variables(_environment.parse(template)))


@lru_cache
def literals(template: str) -> str:
    """The text that stands in the template itself, as text or in quotes; a NUL between two such places."""
    _compile(template)
    tree = _environment.parse(template)
    texts = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    texts |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return "\0".join(sorted(texts))


def _plain(value: Any, name: str) -> Any:
    """A copy of `value` made of JSON's types only, so that a template can reach no method of a caller's object."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: a chat template is given JSON data only: {error}") from error


def _check_content(message: Mapping[str, Any], where: str) -> Any:
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
    return content


def joined_text(content: str | list[dict[str, Any]]) -> str:
    """The text of a message's content; the texts of parts are joined by newlines."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A plain copy of `messages`, every content a string or a list of text parts.

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
        checked.append(_plain({**fields, "content": _check_content(message, where)}, where))
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
    continue_final_message: bool | str = False,
    **variables: Any,
) -> str:
    """The prompt for one conversation.

    Content in parts goes to the template as it is, if that reads parts; else the parts' texts are joined by newlines.

    Args:
        template: Jinja source.
        messages: dicts with `role` and `content`, see `check_messages`.
        add_generation_prompt: end with the header of an assistant's message.
        continue_final_message: end inside the last message, so that the model goes on writing it; a string names the
            message's field to continue, where it is another one than "content".
        variables: what else the template may read (bos_token, tools, ...), as JSON data.

    Raises:
        ValueError: a wrong message, a template that fails, that goes beyond its bounds or that breaks out of its
            sandbox (with its line), both switches at once, or a template that does not print the message to continue.
    """
    return _render(template, messages, add_generation_prompt, continue_final_message, variables)


def render_generated(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The prompt, and where the texts lie in it that the template has in `{% generation %}` blocks: (start, end) each.

    Raises ValueError as `render`, and for a template without such a block.
    """
    if not re.search(r"{%[-+]?\s*generation\s*[-+]?%}", template):
        raise ValueError("return_assistant_tokens_mask needs a chat template with {% generation %} blocks")
    given = json.dumps([check_messages(messages), variables], ensure_ascii=False, default=str)
    if GENERATION_BEGIN in given or GENERATION_END in given:
        raise ValueError(
            "return_assistant_tokens_mask uses the characters U+F0002 and U+F0003, and the messages do too"
        )
    marked = _render(template, messages, add_generation_prompt, False, variables, marking=True)
    parts = re.split(f"([{GENERATION_BEGIN}{GENERATION_END}])", marked)
    prompt, begins, spans = "", [], []
    for part in parts:
        if part == GENERATION_BEGIN:
            begins.append(len(prompt))
        elif part == GENERATION_END:
            spans.append((begins.pop(), len(prompt)))
        else:
            prompt += part
    return prompt, spans


def _render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    continue_final_message: bool | str,
    variables: Mapping[str, Any],
    marking: bool = False,
) -> str:
    if add_generation_prompt and continue_final_message:
        raise ValueError("add_generation_prompt starts a new message and continue_final_message goes on with the last "
                         "one: give one of them")  # fmt: skip
    checked = check_messages(messages)
    compiled = _compile(template)
    plain = {name: _plain(value, name) for name, value in variables.items()}
    if any(isinstance(message["content"], list) for message in checked) and not _reads_parts(compiled, plain):
        checked = [{**message, "content": joined_text(message["content"])} for message in checked]
    if continue_final_message:
        _tag(checked[-1], "content" if continue_final_message is True else continue_final_message)
    try:
        with bounds(marking):
            prompt = compiled.render(messages=checked, add_generation_prompt=add_generation_prompt, **plain)
    except Exception as error:  # the template is foreign code: whatever it does wrong is one kind of error here
        raise ValueError(f"chat template, line {_line(error)}: {error}") from error
    return _cut_at_tag(prompt) if continue_final_message else prompt


def _reads_parts(compiled: jinja2.Template, variables: Mapping[str, Any]) -> bool:
    """Whether the template prints the text of a part, and not the part as Python or JSON writes it."""
    probe = "a text that no template has"
    message = {"role": "user", "content": [{"type": "text", "text": probe}]}
    try:
        with bounds(False):
            prompt = compiled.render(messages=[message], add_generation_prompt=False, **variables)
    except Exception:  # it takes a string, or it fails on any message: rendering will tell
        return False
    return probe in prompt and f"'{probe}'" not in prompt and f'"{probe}"' not in prompt


def _tag(message: dict[str, Any], field: str) -> None:
    """Marks the end of the message's text, in its last part if it has parts."""
    value = message.get(field)
    if isinstance(value, list) and value:
        value[-1]["text"] += _CONTINUE_TAG
    elif isinstance(value, str):
        message[field] = value + _CONTINUE_TAG
    else:
        raise ValueError(f"continue_final_message: the last message has no {field!r} to continue")


def _cut_at_tag(prompt: str) -> str:
    position = prompt.rfind(_CONTINUE_TAG.strip())
    if position < 0:
        raise ValueError("continue_final_message: the chat template does not print the final message's content")
    trimmed = not prompt.startswith(_CONTINUE_TAG, position)
    return prompt[:position].rstrip() if trimmed else prompt[:position]
