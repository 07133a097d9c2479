"""uvicorn's protocol with limits on connections: how many, how long one may be idle, and how long leave unread."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .settings import Settings


class LimitedProtocol(H11Protocol):
    """One connection. `limited` makes the class for some settings.

    A connection that has not sent the head of its next request in time is closed: uvicorn's own limit on idle ones ends
    with the first byte. So is one whose client does not read: a disconnect cancels the answer.
    """

    settings: Settings

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(ApiError(503, "too many connections: try again later", code="too_many_connections"))
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self.settings.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _watch_head(self) -> None:
        """Starts the time for a head where no request is under way, and stops it where one is."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if self._head is not None and busy:
            self._head.cancel()
            self._head = None
        elif self._head is None and not busy:
            self._head = self.loop.call_later(self.settings.head_seconds, self.transport.close)

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body).encode()
        reason = {400: "Bad Request", 503: "Service Unavailable"}[error.status]
        head = f"HTTP/1.1 {error.status} {reason}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


def limited(settings: Settings) -> type[LimitedProtocol]:
    return type("LimitedProtocol", (LimitedProtocol,), {"settings": settings})
