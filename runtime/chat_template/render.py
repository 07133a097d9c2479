"""Renders messages to a prompt with a checkpoint's Jinja chat template.

A template sees only plain JSON data and runs in the sandbox of sandbox.py: the published one in this process, any other
in a child process that limits its time and memory. Any error in it becomes a ValueError that names the template's line.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from .isolation import isolated
from .messages import check_messages, plain_json
from .sandbox import GENERATION_BEGIN, GENERATION_END, describe, expand

# InternLM3-8B-Instruct's published template; for checkpoints without one.
PUBLISHED_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Marks the end of the final message. If its trailing space is missing in the output, the template trims what it prints.
_CONTINUE_TAG = "[[the final message continues here]] "


def _run(task: Callable[..., Any], template: str, *arguments: Any) -> Any:
    if not isinstance(template, str):
        raise TypeError(f"chat_template must be a string of Jinja, not {type(template).__name__}")
    return task(template, *arguments) if template == PUBLISHED_TEMPLATE else isolated(task, template, *arguments)


@lru_cache(maxsize=8)
def _description(template: str) -> tuple[frozenset[str], str]:
    variables, literals = _run(describe, template)
    return frozenset(variables), "\0".join(literals)


def template_variables(template: str) -> frozenset[str]:
    """The variables that a template reads and does not set itself."""
    return _description(template)[0]


def literals(template: str) -> str:
    """The literal text of a template, outside of blocks and in quotes, joined by NUL characters."""
    return _description(template)[1]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> str:
    """The prompt for one conversation.

    A template that reads content in parts gets it unchanged; for any other the parts' texts are joined by newlines.

    Args:
        template: Jinja source.
        messages: dicts with `role` and `content`, see `check_messages`.
        add_generation_prompt: end with the header of an assistant's message.
        continue_final_message: end inside the last message, so that the model continues it; a string names the field
            to continue, if it is not "content".
        variables: further variables of the template (bos_token, tools, ...), as JSON data.

    Raises:
        ValueError: an invalid message; a template that fails, exceeds its limits or tries to leave its sandbox (with
            its line); both switches at once; or a template that does not print the message to continue.
        OSError: the template is not the published one, and no process can be started to run it.
    """
    return _render(template, messages, add_generation_prompt, continue_final_message, variables)


def render_generated(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The prompt, and the (start, end) of each text in it that comes from a `{% generation %}` block.

    Raises ValueError as `render` does, and for a template without such a block.
    """
    if not re.search(r"{%[-+]?\s*generation\s*[-+]?%}", template):
        raise ValueError("return_assistant_tokens_mask needs a chat template with {% generation %} blocks")
    plain = {name: plain_json(value, name) for name, value in variables.items()}
    given = json.dumps([check_messages(messages), plain], ensure_ascii=False)
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
    plain = {name: plain_json(value, name) for name, value in variables.items()}
    if continue_final_message:
        _tag(checked[-1], "content" if continue_final_message is True else continue_final_message)
    prompt = _run(expand, template, checked, {**plain, "add_generation_prompt": add_generation_prompt}, marking)
    return _cut_at_tag(prompt) if continue_final_message else prompt


def _tag(message: dict[str, Any], field: str) -> None:
    """Appends the tag to the message's text, or to the last part's text."""
    value = message.get(field)
    if isinstance(value, list) and value:
        value[-1]["text"] += _CONTINUE_TAG
    elif isinstance(value, str):
        message[field] = value + _CONTINUE_TAG
    else:
        raise ValueError(f"continue_final_message: the last message has no {field!r} to continue")


def _cut_at_tag(prompt: str) -> str:
    """The prompt up to the tag, without trailing white space if the template trims the message."""
    position = prompt.rfind(_CONTINUE_TAG.strip())
    if position < 0:
        raise ValueError("continue_final_message: the chat template does not print the final message's content")
    trimmed = not prompt.startswith(_CONTINUE_TAG, position)
    return prompt[:position].rstrip() if trimmed else prompt[:position]
