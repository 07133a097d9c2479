"""Headless Chromium, driven by the DevTools protocol over two pipes: a page that is clicked, typed in and looked at.

with Browser(chromium()) as browser, browser.page() as page:
    page.open("http://127.0.0.1:8000/")
    page.click("Send")
    page.wait("document.querySelectorAll('article').length === 2")
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)  # fmt: skip
# Chromium reads the protocol from descriptor 3 and writes it to 4. Ours may have these numbers, hence the copies.
START = """
import fcntl, os, sys
given = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(given[0], 3), os.dup2(given[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
SILENCE = 60  # seconds without a word from the browser, after which it has hung
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}
SHIFT = 8
# A promise that is kept when the expression is true, which the page looks at every few milliseconds.
WAIT = "new Promise(done => {{ const look = () => ({0}) ? done(true) : setTimeout(look, 5); look(); }})"
# The middle of the first button to be seen with this text or label inside `within`, or of the element of a selector.
FIND = """(() => {{
  const root = document.querySelector({within});
  const seen = each => each.checkVisibility({{visibilityProperty: true}});
  const named = each => (each.textContent.trim() || each.ariaLabel) === {name};
  const buttons = [...root.querySelectorAll("button, a, input, textarea")];
  const node = buttons.find(each => seen(each) && named(each)) ?? root.querySelector({selector});
  node.scrollIntoView({{block: "nearest"}});
  const {{x, y, width, height}} = node.getBoundingClientRect();
  return [x + width / 2, y + height / 2];
}})()"""


def chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine; None without one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """A Chromium with an empty profile of its own."""

    def __init__(self, path: str) -> None:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        reads, self.writes = os.pipe()
        self.reads, writes = os.pipe()
        start = [sys.executable, "-c", START, str(reads), str(writes), path, *FLAGS]
        self.process = subprocess.Popen(
            [*start, f"--user-data-dir={self.profile.name}", "about:blank"],
            pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(reads)
        os.close(writes)
        self.received = b""
        self.calls = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.call("Browser.close")
        self.process.wait()
        os.close(self.reads)
        os.close(self.writes)
        self.profile.cleanup()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a method of the protocol. Events that come in the meantime go to `events`."""
        self.calls += 1
        command = {"id": self.calls, "method": method, "params": params}
        os.write(self.writes, json.dumps(command | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self.calls:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            assert select.select([self.reads], [], [], SILENCE)[0], f"Chromium said nothing for {SILENCE} s"
            part = os.read(self.reads, 1 << 16)
            assert part, "Chromium ended"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    @contextmanager
    def page(self, **options: Any) -> Iterator["Page"]:
        """A page with storage of its own, which fails at the end if an error was reported in it."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        page = Page(self, context, **options)
        yield page
        errors = page.errors()
        self.call("Target.disposeBrowserContext", browserContextId=context)
        assert not errors, errors


class Page:
    """A tab of the browser. Those of one context share their storage.

    Args:
        language: what the browser says it prefers, such as "zh-CN".
        dark: whether the browser prefers dark colours.
        phone: a touch screen of 360 x 640 points instead of a window of 1000 x 720.
    """

    def __init__(
        self, browser: Browser, context: str, *, language: str = "en-US", dark: bool = False, phone: bool = False
    ) -> None:
        self.browser, self.context = browser, context
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        size = {"width": 360, "height": 640} if phone else {"width": 1000, "height": 720}
        self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=2 if phone else 1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        agent = browser.call("Browser.getVersion")["userAgent"]
        self.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def errors(self) -> list[str]:
        """What went wrong in the page: exceptions, and what the browser blocked or failed to load."""
        found = []
        for event in self.browser.events:
            if event.get("sessionId") == self.session:
                if event["method"] == "Runtime.exceptionThrown":
                    details = event["params"]["exceptionDetails"]
                    found.append(details.get("exception", {}).get("description", details["text"]))
                elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                    found.append(event["params"]["entry"]["text"])
        # A test makes the server refuse; that a browser reports this is no error of the page.
        return [text for text in found if not text.startswith("Failed to load resource")]

    def open(self, url: str) -> None:
        """Loads a page; the one that is open is loaded anew."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; of a promise, what it is kept with."""
        options = {"awaitPromise": True, "returnByValue": True, "allowUnsafeEvalBlockedByCSP": False}
        done = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in done, (script, done["exceptionDetails"]["exception"].get("description"))
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true in the page."""
        self.run(WAIT.format(condition))

    def click(self, name: str, within: str = "body") -> None:
        """Clicks a button by its text or label, or any element by a selector."""
        within, name = json.dumps(within), json.dumps(name)
        selector = name if name.startswith(('"#', '"[', '".')) else '"none"'
        x, y = self.run(FIND.format(within=within, name=name, selector=selector))
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Puts text where the cursor is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False, composing: bool = False) -> None:
        """Presses a key. `composing`: an input method takes it, as browsers report by the code 229."""
        code = 229 if composing else KEYS[key]
        text = {"text": "\r"} if key == "Enter" and not composing else {}
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": SHIFT if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def texts(self, selector: str) -> list[str]:
        """The text of each element that a selector finds and that is to be seen, as it is shown."""
        return self.run(
            f"[...document.querySelectorAll({json.dumps(selector)})].filter(each => each.checkVisibility())"
            ".map(each => each.innerText)"
        )

    def screenshot(self) -> bytes:
        """A picture of what is to be seen, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
