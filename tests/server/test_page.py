"""The chat page without a browser: one file, nothing from outside, no text as code, two languages. tests/serving has it in
a browser."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from bench import ROOT
from internlm3.runtime.sampling.settings import SETTINGS

PAGE = (ROOT / "runtime" / "server" / "page.html").read_text(encoding="utf-8")
LANGUAGES = json.loads(re.search(r'<script type="application/json" id="text">(.*?)</script>', PAGE, re.DOTALL)[1])
SCRIPT = re.search(r"<script>(.*?)</script>", PAGE, re.DOTALL)[1]
STYLE = re.search(r"<style>(.*?)</style>", PAGE, re.DOTALL)[1]
POLICY = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', PAGE)[1]


class Elements(HTMLParser):
    """All elements of the page, as (tag, attributes)."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.feed(PAGE)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


ELEMENTS = Elements().found


def test_nothing_comes_from_outside():
    addresses = {
        attributes[name] for _, attributes in ELEMENTS for name in ("src", "href", "action") if name in attributes
    }
    assert addresses == {"data:,"}
    assert not re.search(r"url\(|@import|@font-face", STYLE)
    assert "//" not in re.sub(r"^\s*//.*$|\s// .*$", "", SCRIPT, flags=re.MULTILINE).replace(r":\/\/", "")
    assert not re.search(r"\bimport\b\s*\(|importScripts|WebSocket|XMLHttpRequest|sendBeacon", SCRIPT)
    assert set(re.findall(r'request\("([^"]+)"', SCRIPT)) == {"health", "v1/models", "v1/chat/completions"}


@pytest.mark.parametrize("kind, content", [("script-src", SCRIPT), ("style-src", STYLE)])
def test_the_policy_allows_the_pages_own_script_and_style_only(kind, content):
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    assert f"{kind} 'sha256-{digest}';" in POLICY, f"write {kind} 'sha256-{digest}' into the page's policy"
    assert POLICY.startswith("default-src 'none';") and "unsafe" not in POLICY and "*" not in POLICY
    assert "require-trusted-types-for 'script'" in POLICY
    assert not any(name == "style" or name.startswith("on") for _, attributes in ELEMENTS for name in attributes)


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
    marked = {
        value
        for _, found in ELEMENTS
        for name, value in found.items()
        if name in ("data-text", "data-label", "data-hint")
    }
    keys = (
        marked | set(re.findall(r'\b(?:t|button)\("(\w+)"', SCRIPT)) | set(re.findall(r't\([^()"]*\? "(\w+)"', SCRIPT))
    )
    keys |= set(re.findall(r't\([^()"]*\? "\w+" : "(\w+)"', SCRIPT)) | set(re.findall(r'notify\(.*?, "(\w+)"', SCRIPT))
    keys |= set(re.findall(r't\(error instanceof \w+ \? "(\w+)" : "(\w+)"', SCRIPT)[0])
    assert keys == english.keys()


def test_no_text_of_an_element_is_in_one_language_only():
    """What a user reads comes from the table, except for the name of the model and what is shown without scripts."""
    body = re.sub(r"<(script|style|noscript|title|h1)\b.*?</\1>", "", PAGE, flags=re.DOTALL)
    assert not re.sub(r"<!--.*?-->|<.*?>", "", body, flags=re.DOTALL).strip()
    assert not any({"title", "placeholder", "aria-label", "alt"} & attributes.keys() for _, attributes in ELEMENTS)


def test_its_settings_are_sampling_parameters_with_their_bounds():
    names = {setting.name: setting for setting in SETTINGS}
    fields = [attributes for tag, attributes in ELEMENTS if tag == "input" and "name" in attributes]
    assert len(fields) > 4
    for field in fields:
        setting = names[field["name"]]
        assert field["step"] == ("1" if setting.type == "integer" else "any"), setting.name
