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
        return _name(json.loads(body))
    except (ValueError, RecursionError):
        return ""


def _name(request: Any) -> str:
    if not isinstance(request, dict):
        return ""
    asked = request.get("messages", request.get("input", request.get("prompt")))
    if "input" in request and isinstance(asked, str):  # the same as a message, which it is in the next turn
        asked = [{"role": "user", "content": asked}]
    beginning = _beginning(asked)
    if beginning is None:
        return ""
    return hashlib.sha256(json.dumps([request.get("instructions"), beginning]).encode()).hexdigest()


def _beginning(asked: Any) -> Any:
    if not isinstance(asked, list):
        return asked[:BEGINNING] if isinstance(asked, str) else None
    if not all(isinstance(each, dict) for each in asked):  # token ids, or several prompts
        return asked[:BEGINNING]
    users = [place for place, message in enumerate(asked) if message.get("role") == "user"]
    return [[message.get("role"), message.get("content")] for message in asked[: users[0] + 1 if users else None]]
