"""A small random model behind the app, asked in-process, and behind one real server on a loopback port."""

import asyncio
import json
import socket
import threading
from contextlib import asynccontextmanager, closing, contextmanager

import httpx
import pytest

from internlm3 import LLM, AsyncLLM
from internlm3.runtime.server.app import create_app
from internlm3.runtime.server.serve import server_of
from internlm3.runtime.server.settings import Settings
from internlm3.tests.api.conftest import make  # noqa: F401 - a fixture

NAME = "tiny"


@pytest.fixture(scope="session")
def llm(make):
    return LLM(make(max_position_embeddings=1024, num_hidden_layers=1), progress=False, max_batch_size=8)


@pytest.fixture(scope="session")
def asynchronous(llm):
    """Without a bound of its own on waiting requests."""
    return AsyncLLM(llm)


def body(fields):
    """The arguments of httpx for a body with these fields, whatever characters are in it."""
    return {"content": json.dumps(fields).encode(), "headers": {"content-type": "application/json"}}


class App:
    """An app, asked without a network: `await app.post(path, field=value)`."""

    def __init__(self, model, **settings):
        self.app = create_app(model, Settings(NAME, **settings))
        self.service = self.app.state.service
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False), base_url="http://localhost"
        )

    async def post(self, path, **fields):
        return await self.client.post(path, **body(fields))

    async def get(self, path):
        return await self.client.get(path)


@pytest.fixture
def ask(asynchronous):
    """Posts one request to an app with these settings, and returns the answer."""

    def ask(path, _settings=None, _headers=None, _content=None, _method="POST", **fields):
        async def once():
            app = App(asynchronous, **(_settings or {}))
            sent = body(fields) if _method == "POST" else {"headers": {}}
            sent |= {} if _content is None else {"content": _content}
            sent["headers"] = {**sent["headers"], **(_headers or {})}
            return await app.client.request(_method, path, **sent)

        return asyncio.run(once())

    return ask


@asynccontextmanager
async def running(model, name=NAME, **settings):
    """A real server on a free port, in this event loop. Yields it, and its port."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    server = server_of(model, Settings(name, **settings), port)
    serving = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield server, port
    finally:
        server.should_exit = True
        await serving


@contextmanager
def served(model, name=NAME):
    """A real server in a thread. Yields its address."""
    started, address = threading.Event(), []

    async def main():
        stop = asyncio.Event()
        async with running(model, name) as (_, port):
            address.extend([f"http://127.0.0.1:{port}", asyncio.get_running_loop(), stop])
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    started.wait()
    url, loop, stop = address
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@pytest.fixture(scope="session")
def url(llm):
    """The address of a server that runs as long as the tests do."""
    with served(AsyncLLM(llm)) as url:
        yield url


def idle(llm):
    """Whether nothing waits or runs, and every page is free."""
    return not llm.engine.busy and llm.engine.pages.free == len(llm.engine.pages)
