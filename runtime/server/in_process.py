"""Asking an ASGI app in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

from starlette.types import ASGIApp, Message

Headers = Iterable[tuple[bytes, bytes]]


async def ask(
    app: ASGIApp, method: str, path: str, headers: Headers, body: bytes, query: bytes = b""
) -> AsyncGenerator[list[Message], None]:
    """What an app sends for a request: lists of ASGI messages, each with all that has come since the last.

    Closing it cancels what the app does for the request.

    Raises what the app raises, after its messages.
    """
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(errors="surrogatepass"),
        "query_string": query,
        "root_path": "",
        "headers": [*headers],
    }
    unread = [body]
    sent: list[Message] = []
    news = asyncio.Event()

    async def receive() -> Message:
        if not unread:
            await asyncio.Event().wait()  # for a disconnect, which never comes
        return {"type": "http.request", "body": unread.pop(), "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)
        news.set()

    work = asyncio.ensure_future(app(scope, receive, send))
    work.add_done_callback(lambda _: news.set())
    try:
        while not work.done() or sent:
            await news.wait()
            news.clear()
            if sent:
                messages, sent[:] = [*sent], []
                yield messages
        work.result()
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
