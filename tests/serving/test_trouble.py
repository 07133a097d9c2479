"""The chat page: a server that loads, refuses, fails, goes away, or wants a key."""

import pytest


def error(page):
    (text,) = page.texts("article .error")
    return text


def send(page, text="Hello"):
    page.run("input.focus()")
    page.type(text)
    page.press("Enter")


@pytest.mark.parametrize("status", [400, 429, 500])
def test_a_refusal_is_shown_with_the_servers_words_and_can_be_retried(page, server, status):
    server.refusal = (status, f"reason {status}")
    send(page)
    page.wait("!running")
    assert error(page) == f"reason {status}"
    server.refusal = None
    server.answer("Hi")
    page.click("Retry")
    page.wait("!running")
    assert page.texts("article .error") == [] and page.texts(".assistant .body") == ["Hi"]
    assert [each["content"] for each in server.asked[-1]["messages"]] == ["Hello"]


def test_an_error_in_the_middle_keeps_what_came(page, server):
    server.say("Half")
    server.fail("out of memory")
    send(page)
    page.wait("!running")
    assert page.texts(".assistant .body") == ["Half"] and error(page) == "out of memory"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("", "The connection ended before the answer did."),
        ('data: {"choices": [{"del', "The connection ended before the answer did."),
        ("data: {broken}\n\n", "The server sent something that is no answer."),
        ("<html>a proxy's page</html>", "The connection ended before the answer did."),
    ],
)
def test_a_stream_that_is_cut_or_broken(page, server, data, said):
    server.say("Half")
    server.cut(data)
    send(page)
    page.wait("!running")
    assert page.texts(".assistant .body") == ["Half"] and error(page) == said


def test_a_server_that_loads_is_waited_for(browser, server):
    server.refusal = (503, "loading")
    with browser.page() as page:
        page.open(server.url)
        page.wait("notice.textContent")
        assert page.texts("#notice") == ["The model is loading …"]
        send(page, "Hello")  # is kept, and not sent
        assert page.run("document.querySelector('#send').disabled") and page.run("input.value") == "Hello"
        server.refusal = None
        page.wait("model")
        assert page.texts("#notice") == [""] and page.texts("h1") == ["internlm3-8b-instruct"]
        server.answer("Hi")
        page.press("Enter")
        page.wait("messages.length === 2 && !running")
        assert len(server.asked) == 1


def test_a_server_that_is_gone(page, server):
    server.shutdown()
    server.socket.close()
    send(page)
    page.wait("!running && notice.textContent")
    assert error(page) == "The server does not answer." == page.texts("#notice")[0]
    assert page.run("document.querySelector('#send').disabled")


def test_a_key_is_asked_for_and_kept_in_this_tab_only(browser, server):
    server.key = "sesame"
    with browser.page() as page:
        page.open(server.url)
        page.wait("document.querySelector('#settings').open")
        assert page.texts("#key-error") == ["The API key is wrong or missing."]
        assert page.run("document.activeElement.id") == "key"
        page.type("wrong")
        page.click("Save")
        page.wait("document.querySelector('#settings').open")
        page.run("document.querySelector('#key').select()")
        page.type("sesame")
        page.click("Save")
        page.wait("model")
        server.answer("Hi")
        send(page)
        page.wait("messages.length === 2 && !running")
        assert page.texts(".assistant .body") == ["Hi"]
        assert "sesame" not in page.run("JSON.stringify({...localStorage})")
        page.open(server.url)
        page.wait("model")
        other = type(page)(page.browser, page.context)
        other.open(server.url)
        other.wait("document.querySelector('#settings').open")


def test_no_key_field_without_need(page):
    page.click("Settings")
    assert page.texts("#key-row") == []
