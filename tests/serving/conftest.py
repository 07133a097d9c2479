"""A browser, and the chat page in it beside a server that answers what the test says."""

import pytest

from internlm3.tests.support.browser import Browser, chromium
from internlm3.tests.support.chat_server import chat_server


@pytest.fixture(scope="session")
def browser():
    path = chromium()
    if not path:
        pytest.skip("no Chromium is installed here (Debian's package is chromium): the chat page is not tested in it")
    with Browser(path) as browser:
        yield browser


@pytest.fixture
def server():
    with chat_server() as server:
        yield server


@pytest.fixture
def visit(browser, server):
    """Opens the chat page in a profile of its own, with the options of a Page, when the server's model is there."""
    pages = []

    def visit(**options):
        pages.append(browser.page(**options))
        page = pages[-1].__enter__()
        page.open(server.url)
        page.wait("model")
        return page

    yield visit
    for page in pages:
        page.__exit__(None, None, None)


@pytest.fixture
def page(visit):
    """The chat page on a desk, in English and light."""
    return visit()


@pytest.fixture
def ask(server):
    """Sends a message and waits for the whole answer, which has these parts and figures."""

    def ask(page, message, *parts, **usage):
        server.answer(*(parts or ["Yes."]), **usage)
        page.run("input.focus()")
        page.type(message)
        page.press("Enter")
        page.wait("!running")

    return ask
