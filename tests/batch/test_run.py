"""What a batch answers, and what it refuses."""

import asyncio
import json
import re
import sys

import pytest
from filelock import FileLock

from internlm3 import AsyncLLM
from internlm3.runtime.batch.answer import answer, app_for
from internlm3.runtime.batch.on_this_machine import answer_on_this_machine
from internlm3.runtime.batch.request import BatchRequest
from internlm3.runtime.batch.run import run_batch
from internlm3.runtime.cli.main import main as command_line
from internlm3.tests.batch.conftest import NAME, chat, read, text_of, write
from internlm3.tests.server.conftest import idle

WORDS = ("Water", "今天天气很好", "Once upon a time", "def fibonacci(n):", "")
COMPLETION = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "One, two,", "temperature": 0}}

RESPONSE = {
    "method": "POST",
    "url": "/v1/responses",
    "body": {"input": "One, two,", "temperature": 0, "max_output_tokens": 8},
}


def never(requests, write):
    raise AssertionError("nothing should be computed")


def test_answers_are_what_llm_says(run, llm, tmp_path, capsys):
    asked = {f"{n}": f"{WORDS[n % len(WORDS)]} {n}" for n in range(20)}
    requests = [chat(name, text) for name, text in asked.items()]
    requests += [chat("many", "Water", n=2, temperature=0.9, seed=3), {"custom_id": "completion", **COMPLETION}]
    requests += [{"custom_id": "response", **RESPONSE}]
    assert run(write(tmp_path / "in", requests), tmp_path / "out")
    lines = read(tmp_path / "out")
    assert {name: text_of(lines[name]) for name in asked} == {
        name: llm.chat(text, temperature=0, max_tokens=8).text for name, text in asked.items()
    }
    choices = lines["many"]["response"]["body"]["choices"]
    expected = llm.chat("Water", n=2, temperature=0.9, seed=3, max_tokens=8).outputs
    assert [choice["message"]["content"] for choice in choices] == [answer.text for answer in expected]
    body = lines["completion"]["response"]["body"]
    assert body["choices"][0]["text"] == llm.generate("One, two,", temperature=0, max_tokens=16).text
    (item,) = lines["response"]["response"]["body"]["output"]
    assert item["content"][0]["text"] == llm.chat("One, two,", temperature=0, max_tokens=8).text
    for line in lines.values():
        assert line.keys() == {"id", "custom_id", "response", "error"} and line["error"] is None
        assert line["response"].keys() == {"status_code", "request_id", "body"}
    for names in zip(*((line["id"], line["response"]["request_id"]) for line in lines.values()), strict=True):
        assert len({*names}) == len(lines)
    usages = [line["response"]["body"]["usage"] for line in lines.values()]
    tokens = sum(usage.get("completion_tokens", usage.get("output_tokens")) for usage in usages)
    report = capsys.readouterr().err
    assert "23 of 23 requests are answered" in report and f"{tokens} tokens" in report and "error" not in report
    assert idle(llm)


@pytest.mark.parametrize(
    ("request_", "status", "param", "says"),
    [
        (chat("x", "Water", temperature=-1), 400, "temperature", "-1"),
        (chat("x", "Water", tempertaure=1), 400, "tempertaure", "temperature"),
        (chat("x", "Water", stream=True), 400, "stream", "no streams"),
        (chat("x", "Water", model="gpt-4o-mini"), 404, "model", "'tiny' does"),
        (chat("x", "Water " * 2000), 400, None, "1024"),
        ({**chat("x", "Water"), "url": "/v1/embeddings"}, 404, None, "/v1/embeddings"),
        ({**chat("x", "Water"), "url": ""}, 405, None, "POST"),
        ({**chat("\ud800", "Water"), "url": "/nowhere"}, 404, None, "/nowhere"),
    ],
    ids=range(8),
)
def test_a_request_that_is_refused_has_its_error(run, tmp_path, capsys, request_, status, param, says):
    name = request_["custom_id"]
    source = write(tmp_path / "in", [chat("before", "Water"), request_, chat("after", "Water")])
    assert run(source, tmp_path / "out")
    lines = read(tmp_path / "out")
    response = lines[name]["response"]
    error = response["body"]["error"]
    assert response["status_code"] == status and lines[name]["error"] is None
    assert error["param"] == param and says in error["message"]
    assert text_of(lines["before"]) == text_of(lines["after"])
    for _ in range(2):  # the second run finds all of it in the output
        report = capsys.readouterr().err
        assert f"1 of the answers are errors; the first is that of {name!r}: {status}, " in report
        assert run_batch(source, tmp_path / "out", NAME, never)


def test_a_url_with_half_a_character(llm):
    request = BatchRequest("x", "/v1/\ud800", {})
    found = asyncio.run(answer(app_for(AsyncLLM(llm), NAME), request))
    assert found.status == 404 and "\ud800" in found.body["error"]["message"]


def test_urls_with_a_slash_too_many(run, tmp_path):
    """The app would redirect them."""
    request = {**chat("x", "Water"), "url": "/v1/chat/completions/"}
    assert run(write(tmp_path / "in", [request]), tmp_path / "out")
    assert text_of(read(tmp_path / "out")["x"])


GOOD = json.dumps(chat("good", "Water")).encode()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "must be a JSON object; got [1]"),
        (b"\xff", "not UTF-8"),
        (GOOD, "its custom_id 'good' is that of line 1"),
        (GOOD.replace(b'"custom_id": "good", ', b""), "it has no custom_id"),
        (GOOD.replace(b'"good"', b"7"), "custom_id must be a string; got 7"),
        (GOOD.replace(b'"good"', b'"other"').replace(b"POST", b"GET"), 'method must be "POST"'),
        (b'{"custom_id": "a", "method": "POST", "url": "/v1/completions"}', "it has no body"),
        (b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": []}', "body must be an object"),
        (GOOD.replace(b'"good"', b'"other", "priority": 3'), "unknown field 'priority'"),
    ],
    ids=range(11),
)
def test_a_wrong_line_is_an_error_before_anything_is_computed(tmp_path, line, says):
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"\n".join([b"\xef\xbb\xbf" + GOOD, b"", line, b""]))
    with pytest.raises(ValueError) as raised:
        run_batch(source, out, NAME, never)
    assert f"{source}, line 3: " in str(raised.value) and says in str(raised.value)
    assert not out.exists()


def test_files_that_are_none(tmp_path):
    source, out = write(tmp_path / "in", [chat("a", "Water")]), tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        run_batch(tmp_path / "nothing", out, NAME, never)
    with pytest.raises(OSError, match="folder"):
        run_batch(tmp_path, out, NAME, never)
    with pytest.raises(OSError, match="folder"):
        run_batch(source, tmp_path, NAME, never)
    with pytest.raises(ValueError, match="has no requests"):
        run_batch(write(tmp_path / "empty", []), out, NAME, never)
    with pytest.raises(ValueError, match="is the input"):
        run_batch(source, source, NAME, never)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "empty"}


@pytest.mark.parametrize("names", [("-", "out"), ("in", "-")])
def test_standard_streams_are_no_files(names, capsys):
    assert command_line(["batch", "/no/such/model", *names]) == 1
    assert "name files, not -" in capsys.readouterr().err


def test_a_request_that_fails_is_asked_again(run, tmp_path, capsys, monkeypatch):
    source, out = write(tmp_path / "in", [chat(name, name) for name in ("a", "b", "c", "d")]), tmp_path / "out"
    asked = AsyncLLM.chat

    async def fails(self, messages, **options):
        if messages[0]["content"] in "bc":
            raise RuntimeError("out of memory") if messages[0]["content"] == "b" else KeyError("a fault")
        return await asked(self, messages, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AsyncLLM, "chat", fails)
        assert not run(source, out)
    assert read(out).keys() == {"a", "d"}
    report = capsys.readouterr().err
    assert "2 of 4 requests are answered" in report and "the same command goes on" in report
    assert re.search("2 requests failed; the first was ('b': 500, out of memory|'c': 500, )", report)
    assert "KeyError: 'a fault'" in report  # with its traceback
    assert run(source, out)
    assert read(out).keys() == {"a", "b", "c", "d"} and len({text_of(line) for line in read(out).values()}) > 1


def test_few_requests_are_in_memory_and_the_engine_is_full(llm, monkeypatch):
    """At most twice as many as are decoded together, of any number; blocks of a file are read as they are needed."""
    unanswered, most, calls, chat_of_llm, eight_calls = 0, 0, 0, AsyncLLM.chat, asyncio.Event()

    def requests():
        nonlocal unanswered, most
        for n in range(60):
            unanswered += 1
            most = max(most, unanswered)
            yield BatchRequest(f"{n}", "/v1/chat/completions", chat("", f"Number {n}")["body"])

    def write(answer):
        nonlocal unanswered
        assert answer.status == 200
        unanswered -= 1

    async def together(self, messages, **options):
        nonlocal calls
        calls += 1
        if calls == 8:
            eight_calls.set()
        await asyncio.wait_for(eight_calls.wait(), timeout=60)
        return await chat_of_llm(self, messages, **options)

    monkeypatch.setattr(AsyncLLM, "chat", together)
    answer_on_this_machine(lambda: AsyncLLM(llm), NAME, requests(), write)
    assert (unanswered, most) == (0, 8)


@pytest.mark.parametrize(
    ("module", "switches", "extra"), [("fastapi", [], "server"), ("ray", ["--replicas", "2"], "ray")]
)
def test_a_missing_extra_is_named(monkeypatch, capsys, module, switches, extra):
    monkeypatch.setitem(sys.modules, module, None)
    rooms = ("internlm3.runtime.server.", "internlm3.runtime.batch.", "internlm3.runtime.replicas.")
    for name in [name for name in sys.modules if name.startswith(rooms)]:
        monkeypatch.delitem(sys.modules, name)
    assert command_line(["batch", "in", "out", *switches]) == 1
    assert f"pip install 'internlm3[{extra}]'" in capsys.readouterr().err


def test_two_runs_at_once(tmp_path):
    source, out = write(tmp_path / "in", [chat("a", "Water")]), tmp_path / "out"
    with FileLock(f"{out}.lock"), pytest.raises(OSError, match="another process is writing"):
        run_batch(source, out, NAME, never)
    assert not out.exists()
