"""Asking an app without a network."""

import asyncio
from contextlib import aclosing

import pytest

from internlm3.runtime.server.in_process import ask

START = {"type": "http.response.start", "status": 200, "headers": []}


def part(text, more=True):
    return {"type": "http.response.body", "body": text, "more_body": more}


def asked(app, body=b"", query=b""):
    return ask(app, "POST", "/path", [(b"host", b"here")], body, query)


def test_the_app_gets_the_request():
    got = {}

    async def app(scope, receive, send):
        got.update(scope, message=await receive())
        await send(START)

    async def main():
        return [messages async for messages in asked(app, b"content", b"a=b")]

    assert asyncio.run(main()) == [[START]]
    assert (got["method"], got["path"], got["query_string"]) == ("POST", "/path", b"a=b")
    assert got["headers"] == [(b"host", b"here")]
    assert got["message"] == {"type": "http.request", "body": b"content", "more_body": False}


def test_messages_come_as_they_are_sent_and_none_is_lost():
    async def main():
        go_on = asyncio.Event()

        async def app(scope, receive, send):
            await send(START)
            await send(part(b"0"))
            await go_on.wait()
            for number in range(1, 50):
                await send(part(b"%d" % number))
                if number % 7 == 0:
                    await asyncio.sleep(0)
            await send(part(b"", more=False))

        found = []
        async with aclosing(asked(app)) as lists:
            async for messages in lists:
                assert messages
                found.append(messages)
                go_on.set()
        return found

    found = asyncio.run(main())
    assert found[0] == [START, part(b"0")] and len(found) > 2
    sent = [message for messages in found for message in messages]
    assert sent == [START, *(part(b"%d" % number) for number in range(50)), part(b"", more=False)]


def test_closing_cancels_the_app_and_waits_for_its_end():
    ended = []

    async def app(scope, receive, send):
        await receive()
        await send(START)
        try:
            await receive()  # a disconnect, which does not come
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            ended.append("cancelled")
            raise

    async def main():
        async with aclosing(asked(app)) as lists:
            assert await anext(lists) == [START]
        return list(ended)

    assert asyncio.run(main()) == ["cancelled"]


def test_what_the_app_raises_comes_after_its_messages():
    async def app(scope, receive, send):
        await send(START)
        raise KeyError("a fault")

    async def main():
        async with aclosing(asked(app)) as lists:
            assert await anext(lists) == [START]
            with pytest.raises(KeyError, match="a fault"):
                await anext(lists)

    asyncio.run(main())
