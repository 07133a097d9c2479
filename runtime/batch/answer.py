"""Answers one request of a batch: the server's own app does, called in this process."""

from __future__ import annotations

import json
import traceback
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from ..api.async_llm import AsyncLLM
from ..common.shown import one_line
from ..server.app import create_app
from ..server.errors import ApiError
from ..server.in_process import ask
from ..server.settings import Settings
from .request import BatchRequest

_YEAR = 365 * 86400.0


@dataclass(frozen=True)
class Answer:
    """The answer to the request with this custom_id: an HTTP status, and the JSON object that came with it."""

    custom_id: str
    status: int
    body: dict[str, Any]

    @property
    def error(self) -> str | None:
        """What is wrong, if this is no answer but an error."""
        return f"{self.status}, {one_line(self.body['error']['message'])}" if self.status >= 400 else None

    @property
    def tokens(self) -> int:
        """The number of generated tokens."""
        usage = self.body.get("usage") or {}
        return usage.get("completion_tokens") or usage.get("output_tokens") or 0


def app_for(llm: AsyncLLM, name: str) -> ASGIApp:
    """The server's app for a model of this name. A request may take as long as it needs."""
    return create_app(llm, Settings(name, answer_seconds=_YEAR))


async def answer(app: ASGIApp, request: BatchRequest) -> Answer:
    """The app's answer; what it refuses is answered by an error."""
    if request.body.get("stream") is True:
        refused = ApiError(400, "a batch has no streams: leave stream out", param="stream")
        return Answer(request.custom_id, refused.status, refused.body)
    status, content = 0, bytearray()
    try:
        path, headers = "/" + request.url.strip("/"), [(b"host", b"localhost"), (b"content-type", b"application/json")]
        async for messages in ask(app, "POST", path, headers, json.dumps(request.body).encode()):
            for message in messages:
                status = message.get("status", status)
                content += message.get("body", b"")
    except Exception:
        if not status:
            raise
        traceback.print_exc()  # a fault of the app, which has answered with status 500
    return Answer(request.custom_id, status, json.loads(content))
