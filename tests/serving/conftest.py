"""A browser, and a page in it beside a server that answers what the test says."""

import threading

import pytest

from internlm3.tests.support.browser import Browser, chromium
from internlm3.tests.support.chat_server import ChatServer


@pytest.fixture(scope="session")
def browser():
    path = chromium()
    if not path:
        pytest.skip("no Chromium is installed here (Debian's package is chromium): the chat page is not tested in it")
    with Browser(path) as browser:
        yield browser


@pytest.fixture
def server():
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def page(browser, server):
    """The chat page, ready: the server's model is there."""
    with browser.page() as page:
        page.open(server.url)
        page.wait("model")
        yield page
