"""A server's life: loading, metrics, a full queue, time limits, the end by a signal, and connections that misbehave."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from bench import ROOT
from internlm3 import AsyncLLM
from internlm3.runtime.cli.main import main as command_line
from internlm3.runtime.server.settings import Settings
from internlm3.tests.server.conftest import NAME, App, idle, running
from internlm3.tests.support.engine import slow_steps

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Say something."}]
LONG = {"max_tokens": 200, "ignore_eos": True, "temperature": 0.9, "seed": 5}
KEYS = {"message", "type", "param", "code"}


def code(response):
    assert response.json()["error"].keys() == KEYS
    return response.status_code, response.json()["error"]["code"]


def test_while_it_loads_it_says_so(llm):
    loaded = threading.Event()

    def load():
        loaded.wait()
        return AsyncLLM(llm)

    async def main():
        app = App(load)
        async with app.app.router.lifespan_context(app.app):
            health, chat, metrics = [
                await app.get("/health"),
                await app.post(CHAT, messages=MESSAGES),
                await app.get("/metrics"),
            ]
            loaded.set()
            while (await app.get("/health")).status_code == 503:
                await asyncio.sleep(0.001)
            answer = await app.post(CHAT, messages=MESSAGES, max_tokens=2)
        return health, chat, metrics, answer

    health, chat, metrics, answer = asyncio.run(main())
    assert code(health) == code(chat) == (503, "loading") and "Loading model" in health.text
    assert (metrics.status_code, answer.status_code) == (200, 200)


def test_what_loading_raises_ends_the_server(capsys):
    assert command_line(["serve", "/no/such/model", "--port", "0", "--local-files-only"]) == 1
    assert "/no/such/model" in capsys.readouterr().err.splitlines()[-1]


def test_where_it_cannot_listen_nothing_is_loaded(url, capsys):
    port = url.rpartition(":")[2]
    for host, number, what in (
        ("127.0.0.1", port, f"port {port} (Address already in use): choose another by --port"),
        ("localhost", port, "(Address already in use)"),
        ("192.0.2.1", "0", "(Cannot assign requested address): --host takes"),
    ):
        assert command_line(["serve", "/no/such/model", "--host", host, "--port", number]) == 1
        printed = capsys.readouterr().err
        assert what in printed and "/no/such/model" not in printed
    with pytest.raises(SystemExit):
        command_line(["serve", "/no/such/model", "--port", "65536"])
    assert "expected a port" in capsys.readouterr().err


def test_settings_that_no_request_can_meet_are_errors(monkeypatch, capsys):
    monkeypatch.setenv("INTERNLM3_API_KEY", "secret")
    for given, what in (
        (("--api-key", ""), "the API key is empty"),
        (("--api-key", "\u043a\u043b\u044e\u0447"), "the API key has characters"),
        (("--api-key", "secret\n"), "the API key has characters"),
        (("--allow-origin", "chat.example"), "--allow-origin 'chat.example': browsers send https://chat.example"),
        (("--allow-origin", "https://chat.example/"), "without a path"),
        (("--allow-origin", "https://Chat.example"), "in lower case"),
        (("--allow-host", "https://gpu.example"), "without http://"),
        (("--allow-host", "gpu.example:8000"), "without a port"),
    ):
        assert command_line(["serve", "/no/such/model", "--port", "0", *given]) == 1
        printed = capsys.readouterr().err
        assert what in printed and "secret" not in printed
    Settings("m", api_key="sk-1", allow_host=("*", "GPU.example"), allow_origin=("*", "null", "http://localhost:3000"))


def test_a_name_of_the_server_may_have_capitals(ask):
    headers = {"host": "gpu.example:8000"}
    assert ask("/health", _method="GET", _headers=headers).status_code == 403
    assert ask("/health", {"allow_host": ("GPU.example",)}, _method="GET", _headers=headers).status_code == 200


@pytest.mark.parametrize("inherited", ["default_int_handler", "SIG_IGN"])  # as from a shell, and from one with &
def test_ctrl_c_while_it_loads_ends_it_quietly(inherited):
    """Though the thread that loads is in a library in C++, which must not see the end of Python."""
    code = f"""
import signal, sys, torch
signal.signal(signal.SIGINT, signal.{inherited})
from internlm3.runtime.server.serve import serve
from internlm3.runtime.server.settings import Settings
def load():
    print("loads", file=sys.stderr)
    while True:
        torch.ones(1000) + 1
serve(load, Settings("m"), 0)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        printed = iter(process.stderr.readline, "")
        assert any("loads" in line for line in printed)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert (process.returncode, "terminate" in rest, "Traceback" in rest) == (130, False, False)


def test_without_the_extra_the_command_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [name for name in sys.modules if name.startswith("internlm3.runtime.server.")]:
        monkeypatch.delitem(sys.modules, name)
    assert command_line(["serve", "/no/such/model"]) == 1
    assert "pip install 'internlm3[server]'" in capsys.readouterr().err


def test_help_imports_no_server():
    code = (
        "import sys; from internlm3.runtime.cli.parser import command_parser as p; p(); print('fastapi' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"


# --- figures


def test_metrics(llm):
    """Of two apps in one process, each with its own."""

    async def main():
        one, other = App(AsyncLLM(llm)), App(AsyncLLM(llm))
        for _ in range(2):
            await one.post(COMPLETIONS, prompt="The sea " * 50, max_tokens=4, temperature=0)
        await one.post(CHAT, messages=MESSAGES, max_tokens=-3)
        await one.post(CHAT, messages=MESSAGES, max_tokens=3, n=2, temperature=1, stream=True)
        return [(await app.get("/metrics")).text for app in (one, other)]

    text, empty = asyncio.run(main())

    def value(name, text=text, labels=f'model_name="{NAME}"'):
        return float(re.search(rf"^internlm3:{name}{{{labels}}} (\S+)$", text, re.MULTILINE)[1])

    assert 'finished_reason="abort"' not in text
    assert value("generation_tokens_total") == 14 and value("generation_tokens_total", empty) == 0
    assert value("prompt_tokens_total") > 100 and value("prefix_cache_hits_total") >= 64
    assert value("request_success_total", labels=rf'finished_reason="length",model_name="{NAME}"') == 4
    for name in (
        "time_to_first_token",
        "inter_token_latency",
        "e2e_request_latency",
        "request_prefill_time",
        "request_decode_time",
    ):
        assert value(f"{name}_seconds_count") == 3
    assert value("num_requests_running") == value("num_requests_waiting") == value("kv_cache_usage_perc") == 0


def test_a_probe_may_leave_out_the_body_of_health(ask):
    response = ask("/health", _method="HEAD")
    assert (response.status_code, response.content) == (200, b"")


def test_tokenize_and_detokenize(ask, llm):
    text = "今天天气很好 today"
    got = ask("/tokenize", prompt=text).json()
    assert got == {"count": len(got["tokens"]), "max_model_len": 1024, "tokens": llm.tokenizer.encode(text)}
    assert ask("/detokenize", tokens=got["tokens"]).json() == {"prompt": llm.tokenizer.decode(got["tokens"])}
    chat = ask("/tokenize", messages=MESSAGES).json()["tokens"]
    assert chat == llm.chat(MESSAGES, max_tokens=1).prompt_token_ids
    tool = {"type": "function", "function": {"name": "clock"}}
    call = {"id": "a", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    called = [
        {"role": "developer", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "12:00"},
    ]
    for more in ({}, {"tools": [tool]}, {"tools": [tool], "tool_choice": "none"}, {"thinking": True}):
        found = ask("/tokenize", messages=called, **more).json()["tokens"]
        assert found == llm.chat(called, max_tokens=1, temperature=0, **more).prompt_token_ids
        assert len(found) == ask(CHAT, messages=called, max_tokens=1, **more).json()["usage"]["prompt_tokens"]
    assert code(ask("/tokenize"))[0] == code(ask("/tokenize", prompt="a", messages=MESSAGES))[0] == 400
    assert code(ask("/detokenize", tokens=[10**6]))[0] == 400
    assert code(ask("/tokenize", prompt="word " * 50_000)) == (400, "context_length_exceeded")


def test_the_page(ask):
    """Without a key, and in no frame of another page."""
    response = ask("/", {"api_key": "k"}, _method="GET")
    assert "internlm3" in response.text and response.headers["content-type"].startswith("text/html")
    assert response.headers["content-security-policy"] == "frame-ancestors 'none'"


# --- limits


def test_a_full_queue_is_a_429(llm):
    model = AsyncLLM(llm, max_waiting=2)

    async def main():
        app = App(model)
        with llm.engine._lock:  # no step begins
            waiting = [asyncio.create_task(app.post(COMPLETIONS, prompt="a", max_tokens=2)) for _ in range(2)]
            while model.waiting < 2:
                await asyncio.sleep(0.001)
            refused = [await app.post(COMPLETIONS, prompt="a", stream=stream) for stream in (False, True)]
        return refused, await asyncio.gather(*waiting)

    refused, accepted = asyncio.run(main())
    assert [code(response) for response in refused] == [(429, "queue_full")] * 2
    assert refused[0].headers["retry-after"] == "1" and refused[0].json()["error"]["type"] == "rate_limit_error"
    assert [response.status_code for response in accepted] == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_limited_time(asynchronous, llm, stream):
    async def main():
        app = App(asynchronous, answer_seconds=0.2)
        with llm.engine._lock:  # no step begins
            return await app.post(CHAT, messages=MESSAGES, stream=stream)

    assert code(asyncio.run(main())) == (504, "timeout")
    while not idle(llm):
        pass


def test_a_stream_that_takes_too_long_ends_with_an_error(asynchronous, llm, monkeypatch):
    from internlm3.runtime.server import answers

    clock = iter([0.0, 0.0, 1.0, *[3000.0] * 9])

    class Time:
        monotonic = staticmethod(lambda: next(clock))

    monkeypatch.setattr(answers, "time", Time)

    async def main():
        return await App(asynchronous).post(CHAT, messages=MESSAGES, stream=True, **LONG)

    last = asyncio.run(main()).text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    while not idle(llm):
        pass


async def exchange(port, *parts, pause=0.0):
    """Sends parts of a request, and returns all that comes until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
    with contextlib.suppress(ConnectionError):
        return await reader.read()
    return b""


def head(length, path=CHAT):
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def last_json(raw):
    return json.loads(raw.rpartition(b"\r\n\r\n")[2])


def test_connections_that_misbehave(llm):
    """Slow heads and bodies, no HTTP at all, endless heads, and too many connections."""

    async def main():
        async with running(AsyncLLM(llm), head_seconds=1.0, body_seconds=0.3, max_connections=6) as (_, port):
            alone = llm.generate("The sea", **LONG).text
            async with httpx.AsyncClient(base_url=f"http://localhost:{port}", timeout=None) as client:
                fields = {"prompt": "The sea", **LONG}
                stream = asyncio.create_task(client.post(COMPLETIONS, json=fields))
                nothing, slow_head, slow_body, garbage, endless = await asyncio.gather(
                    exchange(port),
                    exchange(port, *[bytes([byte]) for byte in head(5)[:30]], pause=0.1),
                    exchange(port, head(100), b"{"),
                    exchange(port, b"\x16\x03\x01 what is this\r\n\r\n"),
                    exchange(port, b"GET / HTTP/1.1\r\nx: " + b"a" * 30_000),
                )
                assert nothing == slow_head == b""
                assert b" 408 " in slow_body and last_json(slow_body)["error"]["code"] == "body_timeout"
                for raw in (garbage, endless):
                    assert b" 400 " in raw.split(b"\r\n")[0] and last_json(raw)["error"].keys() == KEYS
                refused = await asyncio.gather(*(exchange(port) for _ in range(9)))
                codes = [last_json(raw)["error"]["code"] for raw in refused if raw]
                assert len(codes) >= 3 and {*codes} == {"too_many_connections"}
                assert (await stream).json()["choices"][0]["text"] == alone

    asyncio.run(main())


def test_a_client_that_stops_reading_is_cut(llm, monkeypatch):
    """Its row is free, and its connection closed."""

    async def main():
        async with running(AsyncLLM(llm), stall_seconds=0.3) as (server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
            reader._transport.pause_reading()
            fields = {"messages": MESSAGES, "stream": True, "logprobs": True, "top_logprobs": 20, **LONG}
            body = json.dumps(fields).encode()
            writer.write(head(len(body)) + body)
            while not server.server_state.connections:
                await asyncio.sleep(0.01)
            for connection in server.server_state.connections:  # buffers of a loopback hold megabytes
                connection.transport.set_write_buffer_limits(0)
                connection.transport.write(b"x" * (64 << 20))
            while server.server_state.connections or not idle(llm):
                await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(main())


# --- the end


def test_drain(llm):
    """A signal: what runs finishes, new requests get 503, and then the server ends."""

    async def main():
        async with running(AsyncLLM(llm)) as (server, port):
            async with httpx.AsyncClient(base_url=f"http://localhost:{port}", timeout=None) as client:
                fields = {"prompt": "The sea", **LONG}
                running_one = asyncio.create_task(client.post(COMPLETIONS, json=fields))
                while not llm.engine.busy:
                    await asyncio.sleep(0.001)
                with llm.engine._lock:  # no step begins
                    server.handle_exit(signal.SIGTERM, None)
                    refused = [await client.post(CHAT, json={"messages": MESSAGES}), await client.get("/health")]
                finished = await running_one
            while server.server_state.connections or not server.lifespan.shutdown_event.is_set():
                await asyncio.sleep(0.01)
        return refused, finished.json()["choices"][0]["text"]

    refused, text = asyncio.run(main())
    assert [code(response) for response in refused] == [(503, "draining")] * 2
    assert text == llm.generate("The sea", **LONG).text


def test_what_does_not_finish_in_time_is_cancelled(llm, monkeypatch):
    slow_steps(monkeypatch, 0.05)  # the answer takes 10 seconds

    async def main():
        async with (
            running(AsyncLLM(llm), drain_seconds=0.0) as (server, port),
            httpx.AsyncClient(base_url=f"http://localhost:{port}", timeout=None) as client,
        ):
            task = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "The sea", **LONG}))
            while not llm.engine.busy:
                await asyncio.sleep(0.001)
            server.handle_exit(signal.SIGTERM, None)
            with pytest.raises(httpx.HTTPError):
                (await task).raise_for_status()

    asyncio.run(main())
    assert idle(llm)


def test_the_command(make, tmp_path):
    """In a process of its own: it serves, and SIGTERM ends it."""
    folder = make(max_position_embeddings=256, num_hidden_layers=1)
    command = [sys.executable, "-m", "internlm3", "serve", str(folder), "--port", "0", "--max-seq-len", "128"]
    variables = {**os.environ, "INTERNLM3_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"the API is at (http://\S+)/v1", line):
                break
        else:
            raise AssertionError("".join(lines))
        with httpx.Client(base_url=found[1], headers={"authorization": "Bearer secret"}, timeout=None) as client:
            while client.get("/health").status_code == 503:
                pass
            (model,) = client.get("/v1/models").json()["data"]
            assert (model["id"], model["max_model_len"]) == (folder.name, 128)
            assert client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 3}).status_code == 200
            assert client.post(CHAT, json={}, headers={"authorization": "Bearer no"}).status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait() in (0, -signal.SIGTERM), process.stderr.read()
