"""Which conversation a request belongs to, so that all its turns reach the replica that has its beginning cached."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# Characters of a bare prompt that two requests must share.
BEGINNING = 256


def conversation(body: bytes) -> str:
    """A name that requests with one beginning share; "" for a request that has none.

    A chat begins with its messages up to the first of the user, a text with its first 256 characters. What is no valid
    request may have any name: a replica refuses it.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(request, dict):
        return ""
    if request.get("instructions") or "input" in request:
        beginning: Any = [request.get("instructions"), _up_to_the_user(request.get("input"))]
    else:
        beginning = _up_to_the_user(request.get("messages", request.get("prompt")))
    return "" if beginning is None else hashlib.sha256(json.dumps(beginning).encode()).hexdigest()


def _up_to_the_user(content: Any) -> Any:
    if not isinstance(content, list):
        return content[:BEGINNING] if isinstance(content, str) else None
    if not all(isinstance(each, dict) for each in content):  # token ids, or several prompts
        return content[:BEGINNING]
    users = [place for place, message in enumerate(content) if message.get("role") == "user"]
    return content[: users[0] + 1] if users else content
