"""The messages of a conversation: checked, and copied as plain JSON data."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.shown import shown

ROLES = ("system", "developer", "user", "assistant", "tool", "environment", "function")
# InternLM writes a plugin's name into the role ("environment name=<|plugin|>"), and its template prints the whole role.
_ROLE = re.compile(rf"({'|'.join(ROLES)})( name=\S+)?")


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A plain copy of `messages`, in which every content is a string or a list of text parts.

    Raises:
        ValueError: no messages, or a message that is not a dict with a known role and text. The error names its index.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{'role', 'content'}} dicts, not {shown(messages)}")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} must be a dict with 'role' and 'content', not {shown(message)}")
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise ValueError(f"{where}: unknown role {shown(role)}; known roles are {', '.join(ROLES)}")
        fields = {key: value for key, value in message.items() if value is not None}
        checked.append(plain_json({**fields, "content": _check_content(message, where)}, where))
    return checked


def joined_text(content: str | list[dict[str, Any]]) -> str:
    """The text of a message's content; the texts of parts are joined by newlines."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def plain_json(value: Any, name: str) -> Any:
    """A copy of `value` made of JSON's types, so that a template cannot reach the methods of a caller's object.

    Raises ValueError, naming `name`, for anything that JSON does not have.
    """
    try:
        return json.loads(json.dumps(value))
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply for a chat template") from None
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
                             f"{{'type': 'text', 'text': '...'}}, but one is {shown(part)}")  # fmt: skip
    return content
