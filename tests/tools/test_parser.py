"""Calls of tools in an answer: however the text is cut into pieces, the same calls come, and nothing is lost."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm3.runtime.tools.formats import FORMATS, HERMES, INTERNLM
from internlm3.runtime.tools.json_object import JsonObject
from internlm3.runtime.tools.parser import ToolCallParser

B, E = INTERNLM.begin, INTERNLM.end


def parse(pieces, format=INTERNLM, begun=False):
    """The text, and the calls as (name, arguments). Deltas and calls agree."""
    parser = ToolCallParser(format, begun)
    text, deltas = "", []
    for piece in pieces:
        text += parser.push(piece)
        deltas += parser.new_deltas()
    text += parser.finish()
    deltas += parser.new_deltas()
    streamed = []
    for delta in deltas:
        assert (delta.id is None) == (delta.name is None) == (delta.index == len(streamed) - 1)
        if delta.id is not None:
            assert delta.index == len(streamed)
            streamed.append([delta.id, delta.name, ""])
        streamed[-1][2] += delta.arguments
    assert [[call.id, call.name, call.arguments] for call in parser.calls] == streamed
    assert len({id for id, _, _ in streamed}) == len(streamed)
    return text, [(call.name, call.arguments) for call in parser.calls]


def call(name, arguments, format=INTERNLM):
    written = json.dumps({format.name: name, format.arguments: arguments}, ensure_ascii=False)
    return f"{format.begin}\n{written}{format.end}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(
    st.text(max_size=5) | st.just("name"), JSON | st.sampled_from([B, E, "<tool_call>"]), max_size=3
)
NAMES = st.text(min_size=1, max_size=8)


@st.composite
def cut(draw, text):
    """A text in random pieces."""
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


@given(st.data())
@pytest.mark.parametrize("format", FORMATS, ids=["internlm", "hermes"])
def test_calls_come_out_as_they_were_written(format, data):
    """Arguments of any JSON, also with the marks in strings, written in any way that JSON permits, in either order."""
    written, calls, texts = "", [], []
    for _ in range(data.draw(st.integers(0, 3))):
        texts.append(data.draw(st.sampled_from(["", "Sure.", "好的，<|action", " a <tool_cal"])))
        name, arguments = data.draw(NAMES), data.draw(ARGUMENTS)
        body = {format.name: name, data.draw(st.sampled_from(["parameters", "arguments"])): arguments}
        members = data.draw(st.permutations([*body.items(), ("id", data.draw(JSON))]))
        indent, ascii = data.draw(st.sampled_from([None, 1])), data.draw(st.booleans())
        spaces = data.draw(st.sampled_from(["", "\n", " \t"]))
        text = json.dumps(dict(members), indent=indent, ensure_ascii=ascii)
        written += texts[-1] + format.begin + spaces + text + spaces + format.end
        calls.append((name, arguments))
    text, found = parse(data.draw(cut(written)), format)
    assert text == "".join(texts)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


# Joined, they are calls of every degree of truth. XYZ is no JSON anywhere but in strings.
FRAGMENTS = st.lists(
    st.sampled_from([
        B, E, B[:9], E[:9], "{", "}", "[", "]", '"', ",", ":", '"name"', '"parameters"', '"f"', '{"a": 1}', "\\",
        "\\u00", "12", "tru", "e", "null", " ", "\n", "XYZ", "好", B + '{"name": "f", "parameters": {',
        B + '{"name": "f", ',
        '"parameters": ', call("f", {"a": [1, {"b": "c"}]}), call("g", '{"a": 1}'),
    ]),
    max_size=8,
).map("".join)  # fmt: skip


@given(st.data())
def test_any_pieces_give_the_same(data):
    """Of any text, malformed calls included, and nothing of it is lost."""
    written = data.draw(FRAGMENTS)
    text, calls = parse([written])
    assert parse(data.draw(cut(written))) == parse(written) == (text, calls)
    assert calls or text == written
    assert (text + "".join(name + arguments for name, arguments in calls)).count("XYZ") == written.count("XYZ")


@pytest.mark.parametrize(
    ("written", "text", "calls"),
    [
        (" plain \n", " plain \n", []),
        ("\n" + call("f", {}) + "\n" + call("g", {"a": 1}) + "\n", "", [("f", "{}"), ("g", '{"a": 1}')]),
        ("One. \n" + call("f", {}) + "\n Two.", "One. \n\n Two.", [("f", "{}")]),
        ("One." + call("f", {}) + "\n" + call("g", {}) + "\n", "One.", [("f", "{}"), ("g", "{}")]),
        (B + '{"name": "f"}' + E, "", [("f", "{}")]),
        # Of a key that comes twice, the first counts.
        (B + '{"name": "f", "name": "g", "parameters": {}}' + E, "", [("f", "{}")]),
        (B + '{"name": "f", "parameters": {}, "arguments": {"a": 1}}' + E, "", [("f", "{}")]),
        (B + '{"name": "f", "parameters": null}' + E, "", [("f", "{}")]),
        (B + '{"name": "f", "parameters": ""}' + E, "", [("f", "{}")]),
        (call("f", '{"a": "\\n"}'), "", [("f", '{"a": "\\n"}')]),
        # The end mark is missing: the model, or a stop token, ended the answer.
        (B + '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        (B + '{"name": "f", "parameters": {"a": 1}}\n</', "\n</", [("f", '{"a": 1}')]),
        (B + '{"name": "f", "parameters": {"a": 1}}<|act', "", [("f", '{"a": 1}')]),
        # Cut by length, before and after it is a call.
        (B[:20], B[:20], []),
        (B + '{"name": "f", "param', B + '{"name": "f", "param', []),
        (B + '{"name": "f", "parameters": {"a": "b', "", [("f", '{"a": "b')]),
        (B + '{"parameters": {"a": 1}', B + '{"parameters": {"a": 1}', []),
        # Malformed, before it is a call.
        (B + "f()" + E + "x", B + "f()" + E + "x", []),
        (B + '[{"name": "f"}]' + E, B + '[{"name": "f"}]' + E, []),
        (B + "{'name': 'f'}" + E, B + "{'name': 'f'}" + E, []),
        (B + '{"name": 1, "parameters": {}}' + E, B + '{"name": 1, "parameters": {}}' + E, []),
        (B + '{"name": "", "parameters": {}}' + E, B + '{"name": "", "parameters": {}}' + E, []),
        (B + '{"parameters": {}}' + E, B + '{"parameters": {}}' + E, []),
        (call("f", [1]), call("f", [1]), []),
        (call("f", "[1]"), call("f", "[1]"), []),
        (call("f", "no"), call("f", "no"), []),
        (B + '{"name": "f", "parameters": nul}' + E, B + '{"name": "f", "parameters": nul}' + E, []),
        (B + call("f", {}), B, [("f", "{}")]),
        (B + '{"name": ' + call("f", {}), B + '{"name": ', [("f", "{}")]),
        ("<|action_start|><|interpreter|>\n1" + E, "<|action_start|><|interpreter|>\n1" + E, []),
        # Malformed in the arguments: they go on to the end mark.
        (B + '{"name": "f", "parameters": {"a": 1,}}' + E + "x", "x", [("f", '{"a": 1,}}')]),
        (B + '{"name": "f", "parameters": {"a": "x"y"}}' + E, "", [("f", '{"a": "x"y"}}')]),
        (B + '{"name": "f", "parameters": {"a": 1]}}' + E + call("g", {}), "", [("f", '{"a": 1]}}'), ("g", "{}")]),
        (B + '{"name": "f", "parameters": {"a": "\n' + E + "x", "x", [("f", '{"a": "\n')]),
        (B + '{"name": "f", "parameters": {"a": "\\u123"}}' + E, "", [("f", '{"a": "\\u123"}}')]),
        (B + '{"name": "f", "parameters": {"a": 01}}' + E, "", [("f", '{"a": 01}}')]),
        (B + '{"name": "f", "parameters": {"a": NaN}} <|action', "", [("f", '{"a": NaN}} <|action')]),
        # Malformed after them: the rest is text.
        (B + '{"name": "f", "parameters": {"a": 1}, x}' + E, "x}" + E, [("f", '{"a": 1}')]),
        (B + '{"name": "f", "parameters": {"a": 1}} {}' + E, " {}" + E, [("f", '{"a": 1}')]),
    ],
)  # fmt: skip
def test_what_is_text_and_what_is_a_call(written, text, calls):
    assert parse([written]) == (text, calls)
    assert parse(written) == (text, calls)


@pytest.mark.parametrize(
    "written", [B + '{"name": ' + "1" * 5000 + "}", call("f", "[" * 10**5)], ids=["number", "nested"]
)
def test_what_pythons_json_refuses_is_text(written):
    """Integers of more than 4300 digits, and lists in lists."""
    assert parse([written]) == (written, [])


def test_arguments_come_as_they_are_written():
    """The name first, and then every piece at once: a long argument is not held back."""
    parser = ToolCallParser(HERMES)
    seen = []
    body = '{"name": "wri', 'te", "arguments": ', '{"te', 'xt": "a\\', "nb", '"}', "}"
    for piece in ("Now: <tool", "_call>\n", *body, "\n</tool_call>"):
        text = parser.push(piece)
        seen.append((text, [(delta.name, delta.arguments) for delta in parser.new_deltas()]))
    assert seen == [
        ("Now: ", []), ("", []), ("", []), ("", []), ("", [("write", '{"te')]), ("", [(None, 'xt": "a\\')]),
        ("", [(None, "nb")]), ("", [(None, '"}')]), ("", []), ("", []),
    ]  # fmt: skip


def test_a_call_that_the_prompt_began():
    assert parse(['{"name": "f", "parameters": {"a": 1}}'], begun=True) == ("", [("f", '{"a": 1}')])
    assert parse(['{"name": "f", "parameters": {}}' + E + call("g", {})], begun=True) == (
        "",
        [("f", "{}"), ("g", "{}")],
    )
    assert parse(["no call"], begun=True) == ("no call", [])


def test_a_long_answer_is_read_once(monkeypatch):
    """Its characters one by one: what is read again is never longer than a mark, or than a word's end."""
    written = "text <| " * 1000 + call("f", {"text": 'a "b"\n' * 1000, "list": [1.5] * 500}) + " " * 1000
    read, count = JsonObject.read, 0

    def counted(self, text, at):
        nonlocal count
        count += 1
        return read(self, text, at)

    monkeypatch.setattr(JsonObject, "read", counted)
    parser = ToolCallParser(INTERNLM)
    for character in written:
        parser.push(character)
        assert len(parser._held) < len(B)
    parser.finish()
    assert len(parser.calls) == 1 and count <= len(written)
