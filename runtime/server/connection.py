"""Awaiting work for as long as the client is there, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import ApiError, Disconnected
from .json_response import encoded

T = TypeVar("T")


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`. Cancels it, and raises Disconnected, when the client disconnects."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Disconnected
        return working.result()
    finally:
        for each in (working, leaving):
            each.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A stream of server-sent events: each object as JSON, under its type if it has one. An ApiError ends the stream.

    Objects without a type have [DONE] after them. The type of the last one says so itself.

    Closes `events` when the client disconnects.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(_lines(events), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(Disconnected):
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await self.stream_response(send)


async def _lines(events: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes | str, None]:
    typed = False
    async with aclosing(events):
        try:
            async for event in events:
                typed = "type" in event
                name = f"event: {event['type']}\n" if typed else ""
                yield name.encode() + b"data: " + encoded(event) + b"\n\n"
        except ApiError as error:
            yield error_event(error)
            return
    if not typed:
        yield "data: [DONE]\n\n"


def error_event(error: ApiError) -> str:
    """The last event of a stream that an error ends."""
    return f"data: {json.dumps(error.body)}\n\n"
