"""The chat page: what is sent, what is shown, and what becomes of the conversation."""

import json

import pytest

USAGE = {
    "prompt_tokens": 1234,
    "completion_tokens": 56,
    "prompt_tokens_details": {"cached_tokens": 1024},
    "timings": {"time_to_first_token_ms": 212.6, "prompt_ms": 200, "predicted_ms": 1222, "predicted_per_second": 45.04},
}


def turns(page):
    """The conversation on the screen: (who, text of the body), ..."""
    shown = (
        "[...document.querySelectorAll('article')].map(each => [each.className, each.querySelector('.body').innerText])"
    )
    return [tuple(each) for each in page.run(shown)]


def spoken(body):
    return [(each["role"], each["content"]) for each in body["messages"]]


def test_an_answer_is_shown_as_it_comes(page, server):
    page.type("Good day")
    page.click("Send")
    server.say("Good ", "morn")
    page.wait("document.querySelector('.assistant .body').textContent === 'Good morn'")
    assert page.run("document.querySelector('.assistant').ariaBusy") == "true"
    assert page.texts("#composer button") == ["Stop"]
    server.answer("ing 你好")
    page.wait("!running")
    assert turns(page) == [("user", "Good day"), ("assistant", "Good morning 你好")]
    assert page.run("document.querySelector('.assistant').ariaBusy") == "false"
    assert page.texts("#composer button") == ["Send"]
    assert server.asked == [
        {
            "model": "internlm3-8b-instruct",
            "messages": [{"role": "user", "content": "Good day"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "thinking": False,
        }
    ]


def test_the_whole_conversation_is_sent(page, server, ask):
    ask(page, "One", "1")
    ask(page, "Two\n  lines", "2")
    assert spoken(server.asked[-1]) == [("user", "One"), ("assistant", "1"), ("user", "Two\n  lines")]


def test_a_stream_may_be_cut_anywhere(page):
    """Every byte comes by itself: those of a character, of a line's end, of a word."""
    stream = 'data: {"a": "书生😀"}\r\n\r\n: a comment\n\ndata:2\n\ndata: [DONE]\n\n'
    events = """(async text => {
      const body = new ReadableStream({start(to) {
        for (const byte of new TextEncoder().encode(text)) to.enqueue(new Uint8Array([byte]));
        to.close();
      }});
      const found = [];
      for await (const data of eventsOf({body})) found.push(data);
      return found;
    })"""
    assert page.run(f"{events}({json.dumps(stream)})") == ['{"a": "书生😀"}', "2", "[DONE]"]


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stopping_keeps_what_came(page, server, ask, how):
    page.type("Count")
    page.press("Enter")
    server.say("1, 2")
    page.wait("document.querySelector('.assistant .body').textContent === '1, 2'")
    if how == "button":
        page.click("Stop")
    else:
        page.press("Escape")
    page.wait("!running")
    while not server.gone.is_set():  # the server sees it when it writes
        server.say("3")
        server.gone.wait(0.01)
    while not server.parts.empty():
        server.parts.get()
    assert turns(page)[-1] == ("assistant", "1, 2")
    assert page.texts(".assistant .figures")[-1] == "stopped"
    ask(page, "Go on")
    assert spoken(server.asked[-1]) == [("user", "Count"), ("assistant", "1, 2"), ("user", "Go on")]


def test_nothing_is_sent_while_an_answer_comes(page, server):
    page.type("One")
    page.press("Enter")
    page.wait("running")
    page.type("Two")
    page.press("Enter")
    server.answer("1")
    page.wait("!running")
    assert page.run("input.value") == "Two" and len(server.asked) == 1


def test_an_edited_message_replaces_all_after_it(page, server, ask):
    for n in ("1", "2", "3"):
        ask(page, f"Say {n}", n)
    page.click("Edit", within="article:nth-of-type(3)")
    assert page.run("document.activeElement.value") == "Say 2"
    page.press("Escape")
    assert turns(page)[2] == ("user", "Say 2")
    page.click("Edit", within="article:nth-of-type(3)")
    page.type(" or 4")
    server.answer("4")
    page.press("Enter")
    page.wait("running === null && messages.length === 4")
    said = [("user", "Say 1"), ("assistant", "1"), ("user", "Say 2 or 4")]
    assert spoken(server.asked[-1]) == said
    assert turns(page) == [*said, ("assistant", "4")]


def test_an_answer_is_retried_without_all_after_it(page, server, ask):
    ask(page, "Say 1", "1")
    ask(page, "Say 2", "2")
    page.click("Retry", within="article:nth-of-type(2)")
    assert page.run("document.activeElement.id") == "stop"
    server.answer("one")
    page.wait("running === null && messages.length === 2")
    assert page.run("document.activeElement.id") == "send"
    assert spoken(server.asked[-1]) == [("user", "Say 1")]
    assert turns(page) == [("user", "Say 1"), ("assistant", "one")]


def test_a_new_conversation_can_be_undone(page, server, ask):
    ask(page, "Remember me", "I do")
    page.click("New chat")
    assert turns(page) == [] and page.texts("#welcome") == ["What would you like to know?"]
    page.click("Undo")
    assert turns(page) == [("user", "Remember me"), ("assistant", "I do")] and page.texts("#welcome") == []
    page.click("New chat")
    ask(page, "Hello")
    assert spoken(server.asked[-1]) == [("user", "Hello")]
    assert page.texts("#notice button") == []


def test_a_new_conversation_stops_the_answer(page, server):
    page.type("Count")
    page.press("Enter")
    server.say("1, 2")
    page.wait("document.querySelector('.assistant .body').textContent === '1, 2'")
    page.click("New chat")
    page.wait("!running")
    server.cut()
    assert turns(page) == [] and page.run("JSON.parse(localStorage['internlm3.conversation'])") == []


def test_settings_are_sent_and_kept(page, server, ask):
    page.click("Settings")
    page.click('[name="system"]', within="#settings")
    page.type("Be brief.")
    for name, value in {"temperature": "0.7", "top_k": "40", "max_tokens": "100"}.items():
        page.click(f'[name="{name}"]', within="#settings")
        page.type(value)
    page.click("Save")
    page.click("#thinking")
    page.open(server.url)
    page.wait("model")
    ask(page, "Hello")
    asked = server.asked[-1]
    assert {key: asked.get(key) for key in ("temperature", "top_k", "max_tokens", "thinking", "top_p", "system")} == {
        "temperature": 0.7, "top_k": 40, "max_tokens": 100, "thinking": True, "top_p": None, "system": None,
    }  # fmt: skip
    assert spoken(asked) == [("system", "Be brief."), ("user", "Hello")]
    page.click("Settings")
    assert page.run("document.querySelector('[name=temperature]').value") == "0.7"


def test_settings_that_are_out_of_range_or_cancelled_are_not_kept(page, server, ask):
    page.click("Settings")
    page.click('[name="top_p"]', within="#settings")
    page.type("1.5")
    page.click("Save")
    assert page.run("document.querySelector('#settings').open")
    page.press("Escape")
    assert not page.run("document.querySelector('#settings').open")
    ask(page, "Hello")
    assert "top_p" not in server.asked[-1]
    page.click("Settings")
    assert page.run("document.querySelector('[name=top_p]').value") == ""


def test_figures_are_the_servers(page, ask):
    ask(page, "Hello", **USAGE)
    assert page.texts(".assistant .figures") == [
        "56 tokens · 45 tokens/s · first after 0.21 s · prompt 1,234 tokens, 1,024 cached"
    ]


def test_figures_are_measured_where_the_server_reports_none(page, server):
    page.type("Hello")
    page.press("Enter")
    server.say("1")
    page.wait("document.querySelector('.assistant .body').textContent === '1'")
    server.say("2")
    page.wait("document.querySelector('.assistant .body').textContent === '12'")
    server.finish(prompt_tokens=7, completion_tokens=2)
    page.wait("!running")
    first, rate = page.run("[messages[1].figures.first, messages[1].figures.rate]")
    assert first > 0 and rate > 0
    tokens, _, _, prompt = page.texts(".assistant .figures")[0].split(" · ")
    assert (tokens, prompt) == ("2 tokens", "prompt 7 tokens")


def test_an_answer_of_full_length_says_so(page, server):
    page.type("Count")
    page.press("Enter")
    server.say("1, 2")
    server.finish("length", prompt_tokens=5, completion_tokens=4)
    page.wait("!running")
    assert page.texts(".assistant .figures")[0].startswith("cut off: longest answer reached · 4 tokens")


def test_the_conversation_outlives_the_page(page, server, ask):
    ask(page, "Remember me", "I **do**", **USAGE)
    figures = page.texts(".assistant .figures")
    page.type("And me?")
    page.press("Enter")
    server.say("Half")
    page.wait("document.querySelectorAll('.assistant .body')[1]?.textContent === 'Half'")
    page.open(server.url)
    server.cut()
    page.wait("model")
    assert turns(page)[1:] == [("assistant", "I do"), ("user", "And me?"), ("assistant", "Half")]
    assert page.texts(".assistant .figures") == [*figures, "stopped"]


def test_two_tabs_show_the_same_conversation(page, server, ask):
    other = type(page)(page.browser, page.context)
    other.open(server.url)
    other.wait("model")
    ask(page, "Hello", "Hi")
    other.wait("messages.length === 2")
    assert turns(other) == turns(page)


def test_a_conversation_that_cannot_be_stored_goes_on(page, ask):
    page.run("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }")
    ask(page, "Hello", "Hi")
    assert turns(page)[-1] == ("assistant", "Hi")
    assert "cannot store the conversation" in page.texts("#notice")[0]


@pytest.mark.parametrize("garbage", ["{", "7", '[{"role": "system"}, null]', '{"a": 1}'])
def test_broken_storage_is_no_end(page, server, ask, garbage):
    for name in ("conversation", "language", "settings"):
        page.run(f"localStorage['internlm3.{name}'] = {json.dumps(garbage if name != 'settings' else '{')}")
    page.open(server.url)
    page.wait("model")
    ask(page, "Hello", "Hi")
    assert turns(page) == [("user", "Hello"), ("assistant", "Hi")]
