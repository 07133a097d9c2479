"""The chat page: languages, colours, keyboard, phone, scrolling, copying, and what assistive technology is told."""

import pytest

USAGE = {"prompt_tokens": 1234, "completion_tokens": 56, "prompt_tokens_details": {"cached_tokens": 1024}}
LONG = "\n\n".join(
    [
        "A paragraph with a long word: " + "x" * 300 + " and https://a.example/" + "y" * 300,
        "```\n" + "a line of code that is wider than any phone " * 10 + "\n```",
        "| " + " | ".join(f"column {n}" for n in range(20)) + " |\n" + "|---" * 20 + "|",
        "- " + "`" + "z" * 300 + "`",
        *(f"Line {n}" for n in range(60)),
    ]
)
# How far the conversation is from its end, in points.
REST = "(({scrollTop, scrollHeight, clientHeight}) => scrollHeight - scrollTop - clientHeight)(scroller)"


# --- language


@pytest.mark.parametrize(
    ("preferred", "send"), [("zh-CN", "发送"), ("zh-TW", "发送"), ("en-GB", "Send"), ("fr", "Send")]
)
def test_the_language_is_the_browsers(visit, preferred, send):
    assert visit(language=preferred).texts("#send") == [send]


def test_the_language_can_be_switched_at_any_time_and_is_remembered(page, server, ask):
    ask(page, "Hello", "```\nx\n```", **USAGE)
    page.type("More")
    page.press("Enter")
    server.say("1,")
    page.wait("document.querySelectorAll('.assistant .body')[1]?.textContent === '1,'")
    page.click("中文")
    server.answer(" 2", **USAGE)
    page.wait("!running")
    assert page.texts(".assistant .body")[1] == "1, 2"
    figures = page.texts(".assistant .figures")
    assert all("56 个 token" in each and "提示 1,234 个 token，其中 1,024 个来自缓存" in each for each in figures)
    assert page.texts(".code button") == ["复制"] and page.texts("#stop, #send") == ["发送"]
    page.open(server.url)
    page.wait("model")
    assert page.texts("#new") == ["新对话"] and page.run("document.documentElement.lang") == "zh-CN"
    page.click("English")
    assert page.texts("#new") == ["New chat"] and page.run("document.documentElement.lang") == "en"


# --- keyboard


def test_shift_enter_is_a_new_line_and_enter_sends(page, server):
    page.type("One")
    page.press("Enter", shift=True)
    page.type("Two")
    server.answer("Yes.")
    page.press("Enter")
    page.wait("messages.length === 2 && !running")
    assert server.asked[0]["messages"][0]["content"] == "One\nTwo"
    assert page.run("document.activeElement.id") == "input"


def test_the_enter_of_an_input_method_does_not_send(page, server, ask):
    """While it composes, and where a browser reports its Enter after the composition has ended."""
    page.call("Input.imeSetComposition", text="ni hao", selectionStart=6, selectionEnd=6)
    page.press("Enter", composing=True)
    page.call("Input.insertText", text="你好")
    page.press("Enter", composing=True)
    assert page.run("messages.length") == 0 and page.run("input.value") == "你好"
    server.answer("Yes.")
    page.press("Enter")
    page.wait("messages.length === 2 && !running")
    assert server.asked[0]["messages"][0]["content"] == "你好"


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_message_is_not_sent(page, server, text):
    page.type(text)
    page.press("Enter")
    page.click("Send")
    assert page.run("messages.length") == 0 and page.run("document.activeElement.id") == "input"


def test_everything_is_reached_by_tab_and_shows_its_focus(page, ask):
    ask(page, "Hello", "[x](https://a.example)\n\n```\ny\n```", **USAGE)
    page.run("document.activeElement.blur()")
    reached = []
    for _ in range(14):
        page.press("Tab")
        reached.append(
            page.run(
                "(node => [node.id || node.ariaLabel || node.textContent,"
                " getComputedStyle(node).outlineStyle !== 'none' || node.id === 'input'])(document.activeElement)"
            )
        )
    reached = [each for each in reached if len(each[0]) < 20]  # after the last control the page itself has the focus
    names = [name for name, _ in reached]
    for name in ("new", "open-settings", "language", "Edit", "x", "Copy", "y", "Retry", "input", "thinking", "send"):
        assert name in names, names
    assert all(shown for _, shown in reached), reached
    # The box around the input shows its focus.
    page.run("input.focus()")
    focused = page.run("getComputedStyle(box).borderColor")
    page.run("input.blur()")
    assert page.run("getComputedStyle(box).borderColor") != focused


# --- assistive technology


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_every_control_has_a_name(visit, ask, language):
    page = visit(language=language)
    ask(page, "Hello", "```\ny\n```", **USAGE)
    page.run("openSettings()")
    page.run("document.querySelector('#key-row').hidden = false")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    page.run("document.querySelector('#settings').close()")
    nodes += page.call("Accessibility.getFullAXTree")["nodes"]
    controls = [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node["ignored"]
        and node["role"]["value"] in ("button", "textbox", "spinbutton", "switch", "dialog", "log")
    ]
    assert {role for role, _ in controls} == {"button", "textbox", "spinbutton", "switch", "dialog", "log"}
    assert all(name for _, name in controls), controls


# --- light, dark, large and small


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_are_the_systems_and_have_contrast(visit, ask, server, dark):
    page = visit(dark=dark)
    ask(page, "Hello", "Text and [x](https://a.example), `code`\n\n> quoted\n\n```py\ny\n```", **USAGE)
    server.refusal = (400, "refused")
    page.type("More")
    page.press("Enter")
    page.wait("!running")
    contrasts = page.run("""(() => {
      const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => (c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4))
        .reduce((sum, c, n) => sum + c * [.2126, .7152, .0722][n], 0);
      const parse = colour => colour.match(/[\\d.]+/g).map(Number);
      const ground = node => {
        for (; node; node = node.parentElement) {
          const colour = parse(getComputedStyle(node).backgroundColor);
          if (colour[3] !== 0) return colour;
        }
      };
      const found = {};
      for (const node of document.querySelectorAll("h1, button, .body *, .user .body, .figures, .error, label span")) {
        if (!node.checkVisibility() || !node.textContent) continue;
        const [a, b] = [parse(getComputedStyle(node).color), ground(node)].map(luminance).sort((a, b) => b - a);
        found[node.id || node.className || node.tagName] = (a + .05) / (b + .05);
      }
      return found;
    })()""")
    assert len(contrasts) > 10 and min(contrasts.values()) >= 4.5, contrasts
    light = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] > 128")
    assert light != dark


def test_a_phone_scrolls_down_only(visit, ask):
    page = visit(phone=True)
    ask(page, LONG + "x" * 500, LONG, **USAGE)
    wide = """[...document.querySelectorAll("html, body, main, #conversation, article, .body, #composer, header")]
      .filter(node => node.scrollWidth > node.clientWidth || node.getBoundingClientRect().right > innerWidth)
      .map(node => node.className || node.tagName)"""
    assert page.run(wide) == []
    assert page.run("document.querySelector('#send').getBoundingClientRect().bottom <= innerHeight")
    page.click("Settings")
    assert page.run("document.querySelector('#settings').getBoundingClientRect().right <= innerWidth")
    fields = "[...document.querySelectorAll('input:not([type=checkbox]), textarea')]"
    assert (
        min(page.run(f"{fields}.map(each => parseFloat(getComputedStyle(each).fontSize))")) >= 16
    )  # else iOS zooms in
    assert "width=device-width" in page.run("document.querySelector('[name=viewport]').content")


# --- scrolling, drawing


def test_it_follows_the_answer_unless_the_user_scrolled_up(page, server):
    page.type("Hello")
    page.press("Enter")
    server.say(LONG)
    page.wait(f"scroller.scrollHeight > 2000 && {REST} < 2")
    page.call("Input.dispatchMouseEvent", type="mouseWheel", x=500, y=300, deltaX=0, deltaY=-600)
    page.wait(f"{REST} > 300 && !bottom.hidden")
    top = page.run("scroller.scrollTop")
    server.say("\n\nmore" * 20)
    page.wait("messages[1].content.endsWith('more') && document.body.innerText.split('more').length > 20")
    assert page.run("scroller.scrollTop") == top
    page.click("↓ Newest")
    page.wait(f"{REST} < 2 && bottom.hidden")
    server.answer("\n\nend" * 20)
    page.wait(f"!running && {REST} < 2")


def test_an_answer_is_drawn_at_most_once_a_frame(page, server):
    """2000 parts of an answer, and far fewer renderings than parts."""
    page.run("""(() => {
      window.frames_ = window.drawn = 0;
      const count = () => { frames_++; requestAnimationFrame(count); };
      requestAnimationFrame(count);
      const markdown_ = markdown;
      markdown = root => { const show = markdown_(root); return text => { drawn++; show(text); }; };
    })()""")
    server.answer(*(f"{n} " for n in range(2000)))
    page.type("Count")
    page.press("Enter")
    page.wait("messages.length === 2 && !running")
    drawn, frames = page.run("[drawn, frames_]")
    assert 0 < drawn <= frames + 2  # the empty answer, and the whole one


# --- copying


@pytest.mark.parametrize("clipboard", [True, False], ids=["clipboard", "without"])
def test_code_and_answers_are_copied(page, ask, clipboard):
    """Also without a clipboard object, as in a page that came by plain HTTP from another machine."""
    page.browser.call("Browser.grantPermissions", browserContextId=page.context, permissions=["clipboardReadWrite"])
    answer = "Two lines:\n\n```py\na <b>\n\tc\n```"
    ask(page, "Hello", answer)
    if not clipboard:
        page.run("navigator.clipboard.writeText = () => Promise.reject(new Error('no'))")
    page.click("Copy", within=".code")
    page.wait("document.querySelector('.code button').textContent === 'Copied'")
    assert page.run("navigator.clipboard.readText()") == "a <b>\n\tc"
    page.click("Copy", within=".assistant footer")
    page.wait("document.querySelector('.assistant footer button').textContent === 'Copied'")
    assert page.run("navigator.clipboard.readText()") == answer
