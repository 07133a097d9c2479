"""JSON for clients, whatever characters are in it."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


def encoded(value: Any, separators: tuple[str, str] = (",", ":")) -> bytes:
    """A value as JSON in UTF-8.

    Half of a surrogate pair has no UTF-8, and a client or a model may write one: then all of it is in ASCII.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=separators).encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=separators).encode()


class JSON(Response):
    """A response of JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encoded(content)
