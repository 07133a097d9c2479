"""The chat page, read as text: one file, nothing from outside, no text as code, two languages.

tests/serving uses it in a browser.
"""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from bench import ROOT
from internlm3.runtime.sampling.settings import SETTINGS

PAGE = (ROOT / "runtime" / "server" / "page.html").read_text(encoding="utf-8")


def content(opening):
    """What follows this opening tag, up to its closing one."""
    start = PAGE.index(opening) + len(opening)
    return PAGE[start : PAGE.index(f"</{re.findall(r'[a-z]+', opening)[0]}>", start)]


LANGUAGES = json.loads(content('<script type="application/json" id="text">'))
SCRIPT = content("<script>")
STYLE = content("<style>")


class Elements(HTMLParser):
    """All elements of the page, as (tag, attributes)."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.feed(PAGE)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


ELEMENTS = Elements().found
POLICY = next(each["content"] for _, each in ELEMENTS if each.get("http-equiv") == "Content-Security-Policy")


def values(*names):
    """The values of these attributes anywhere in the page."""
    return {found[name] for _, found in ELEMENTS for name in names if name in found}


def test_nothing_comes_from_outside():
    assert values("src", "href", "action", "srcset", "data") == {"data:,"}
    assert not re.search(r"url\(|@import|@font-face|src:", STYLE)
    code = re.sub(r"(^|\s)//\s.*$", "", SCRIPT, flags=re.MULTILINE)
    assert "//" not in code.replace(r":\/\/", ""), "an address"
    assert not re.search(r"\bimport\b\s*[({\"']|importScripts|WebSocket|EventSource|XMLHttpRequest|sendBeacon", code)
    assert set(re.findall(r'\brequest\("([^"]+)"', code)) == {"health", "v1/models", "v1/chat/completions"}
    assert code.count("fetch(") == 1


@pytest.mark.parametrize(("kind", "allowed"), [("script-src", SCRIPT), ("style-src", STYLE)])
def test_the_policy_allows_the_pages_own_script_and_style_only(kind, allowed):
    digest = base64.b64encode(hashlib.sha256(allowed.encode()).digest()).decode()
    assert f"{kind} 'sha256-{digest}';" in POLICY, f"write {kind} 'sha256-{digest}' into the page's policy"
    assert POLICY.startswith("default-src 'none';") and "unsafe" not in POLICY and "*" not in POLICY
    assert "require-trusted-types-for 'script'" in POLICY
    assert not any(name == "style" or name.startswith("on") for _, found in ELEMENTS for name in found)


def test_text_never_becomes_code_or_markup():
    """The policy forbids it too, where a browser knows trusted types."""
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|setTimeout\(['\"`]"
    assert not re.search(sinks, SCRIPT)


def test_every_text_is_there_in_both_languages():
    english, chinese = LANGUAGES["en"], LANGUAGES["zh"]
    assert english.keys() == chinese.keys()
    for key in english:
        assert english[key].strip() and chinese[key].strip(), key
        assert re.findall(r"\{\w+\}", english[key]) == re.findall(r"\{\w+\}", chinese[key]), key
    needed = values("data-text", "data-label", "data-hint") | set(re.findall(r'\b(?:t|button)\("(\w+)"', SCRIPT))
    assert needed <= english.keys()
    assert {key for key in english if f'"{key}"' in SCRIPT} | needed == english.keys(), "a text that nothing shows"


def test_no_text_of_an_element_is_in_one_language_only():
    """What a user reads comes from the table, except for the model's name and what is shown without JavaScript."""
    body = re.sub(r"<(script|style|noscript|title|h1)\b.*?</\1>|<!--.*?-->|<[^>]*>", "", PAGE, flags=re.DOTALL)
    assert not body.strip()
    assert not values("title", "placeholder", "aria-label", "alt")


def test_its_settings_are_sampling_parameters():
    known = {setting.name: setting for setting in SETTINGS}
    fields = [found for tag, found in ELEMENTS if tag == "input" and "name" in found]
    assert len(fields) > 4
    for field in fields:
        setting = known[field["name"]]
        assert field["step"] == {"integer": "1", "number": "any"}[setting.type], setting.name
