"""Limits on a request's body and its time, and the count of requests under way."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, Disconnected
from .service import Service
from .settings import Settings

# What is answered while the server drains, too.
_ALWAYS = ("/health", "/metrics")


class Limits:
    """Middleware that reads bodies, within limits of size and time, and refuses requests while the server drains."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _ALWAYS:
            await self._app(scope, receive, send)
            return
        try:
            if self._service.draining:
                raise draining()
            body = await read_body(scope, receive, self._service.settings)
        except Disconnected:
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        self._service.active += 1
        try:
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._service.active -= 1


async def read_body(scope: Scope, receive: Receive, settings: Settings) -> bytes:
    """The whole body of a request. Raises ApiError if it is too large or late, or Disconnected."""
    length = Headers(scope=scope).get("content-length", "")
    if length.isdigit() and int(length[:20]) > settings.max_body:
        raise _too_large(settings.max_body)
    try:
        return await asyncio.wait_for(_read(receive, settings.max_body), settings.body_seconds)
    except asyncio.TimeoutError:
        what = f"the body did not come within {settings.body_seconds:g} seconds"
        raise ApiError(408, what, code="body_timeout") from None


async def _read(receive: Receive, most: int) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if len(body) > most:
            raise _too_large(most)
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body, and then what else comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most:,} bytes", code="body_too_large")


def draining() -> ApiError:
    return ApiError(503, "this server is about to end, and takes no new requests", code="draining")
