"""Each bad request gets the right status with OpenAI's error object, names the culprit, and disturbs nobody."""

import asyncio
import json

import pytest

from internlm3.runtime.engine.runner import Runner
from internlm3.runtime.server.settings import Settings
from internlm3.tests.server.conftest import NAME, App, idle

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Say something."}]
JSON = {"content-type": "application/json"}
KEYS = {"message", "type", "param", "code"}


def error(response, status):
    """The error object of a response with this status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    found = response.json()
    assert found.keys() == {"error"} and found["error"].keys() == KEYS
    assert isinstance(found["error"]["message"], str) and found["error"]["message"]
    return found["error"]


WRONG = [
    # fields, param, a part of the message
    ({"temperature": "hot"}, "temperature", "number"),
    ({"temperature": True}, "temperature", "number"),
    ({"temperature": -1}, "temperature", "temperature must be"),
    ({"max_tokens": -5}, "max_tokens", "max_tokens must be"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"max_tokens": "7"}, "max_tokens", "integer"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
    ({"n": 10**9}, "n", "less than or equal to 128"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 2, "temperature": 0}, "n", "n must be 1 at temperature 0"),
    ({"seed": 2**70}, "seed", "seed must be"),
    ({"stop": 5}, "stop", "string"),
    ({"stop": [""]}, "stop", "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is no token id"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias", "99999999"),
    ({"stop_token_ids": [-3]}, "stop_token_ids", "-3"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options", "stream_options.usage"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
    ({"flavour": 1}, "flavour", "unknown field 'flavour'"),
    ({"\ud800": 1}, "\ud800", "unknown field"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "thinking"),
    ({"functions": [{"name": "f"}]}, "functions", "tools"),
    ({"modalities": ["audio"]}, "modalities", "modalities"),
    ({"chat_template_kwargs": {"style": "x"}}, "chat_template_kwargs", "style"),
    ({"thinking": True, "chat_template_kwargs": {"thinking": False}}, "thinking", "true and false"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "hello"}, "messages", "list"),
    ({"messages": ["hello"]}, "messages", "messages.0"),
    ({"messages": [{"role": "poet", "content": "x"}]}, "messages", "unknown role 'poet'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "reads text only"),
    ({"messages": [{"role": "user"}]}, "messages", "content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "surrogate"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "no schema"),
    ({"json_schema": {"type": "nonsense"}}, "json_schema", "nonsense"),
    ({"json_schema": {"type": "object", "uniqueItems": True, "not": {}}}, "json_schema", "not"),
    ({"regex": "("}, "regex", "regex"),
    ({"regex": "(a{1000}){1000}"}, None, "regex failed: it is too complex"),
    ({"regex": "a" * 200_000}, "regex", "regex is too long"),
    ({"grammar": "start: nowhere"}, "grammar", "nowhere"),
    ({"regex": "a", "choice": ["b"]}, None, "give one of them"),
    ({"guided_regex": "a", "regex": "b"}, "guided_regex", "are the same"),
    ({"tools": [{"type": "function"}]}, None, "function"),
    ({"tool_choice": "required"}, None, "tool"),
    ({"priority": "high"}, "priority", "integer"),
    ({"priority": 2**40}, "priority", "priority must be"),
]


@pytest.mark.parametrize(("fields", "param", "part"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named(ask, fields, param, part):
    found = error(ask(CHAT, **{"messages": MESSAGES, "max_tokens": 3, **fields}), 400)
    assert (found["param"], found["type"]) == (param, "invalid_request_error") if param else True
    assert part in found["message"], found["message"]


BODIES = [
    (b'{"messages": [', "not valid JSON"),
    (b'{"messages": "\xff\xfe"}', "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b"1" * 5000, "not valid JSON"),
    (b"", "a JSON object"),
    (b"[]", "a JSON object"),
    (b"null", "a JSON object"),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature"),
    (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e999}', "max_tokens"),
    (b"{}", "messages: Field required"),
]


@pytest.mark.parametrize(("content", "part"), BODIES, ids=lambda value: str(value)[:40])
def test_a_body_that_is_no_request(ask, content, part):
    assert part in error(ask(CHAT, _content=content), 400)["message"]


def test_a_form_of_a_web_page_is_no_request(ask):
    body = json.dumps({"messages": MESSAGES}).encode()
    found = error(ask(CHAT, _content=body, _headers={"content-type": "text/plain"}), 400)
    assert "content-type: application/json" in found["message"]


def test_completions(ask):
    assert "empty" in error(ask(COMPLETIONS, prompt=[]), 400)["message"]
    assert error(ask(COMPLETIONS, prompt="\ud800", echo=True), 400)
    assert "empty" in error(ask(COMPLETIONS, prompt=""), 400)["message"]
    assert error(ask(COMPLETIONS, prompt=[1, "a"]), 400)["param"] == "prompt"
    assert "4999999" in error(ask(COMPLETIONS, prompt=[4999999]), 400)["message"]
    for fields in ({}, {"echo": True}, {"logprobs": 1}, {"echo": True, "logprobs": 1, "stream": True}):
        assert error(ask(COMPLETIONS, prompt="a", max_tokens=0, **fields), 400)["param"] == "max_tokens"
    scored = {"echo": True, "logprobs": 1, "max_tokens": 0}
    assert error(ask(COMPLETIONS, prompt="a", temperature=-1, **scored), 400)["param"] == "temperature"
    assert "max_seq_len is 1024" in error(ask(COMPLETIONS, prompt=[5] * 1025, **scored), 400)["message"]
    assert "empty" in error(ask(COMPLETIONS, prompt="", **scored), 400)["message"]
    assert "prompt 1 is empty" in error(ask(COMPLETIONS, prompt=["a", ""], stream=True), 400)["message"]
    assert "at most 256" in error(ask(COMPLETIONS, prompt=["a"] * 100, n=3, temperature=1), 400)["message"]
    assert "'n'" in error(ask(COMPLETIONS, prompt="a", best_of=4), 400)["message"]
    assert "suffix" in error(ask(COMPLETIONS, prompt="a", suffix="b"), 400)["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("words", [1100, 50_000])
def test_a_prompt_over_the_window(ask, path, words):
    text = "word " * words
    fields = {"prompt": text} if path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    for stream in (False, True):
        found = error(ask(path, stream=stream, **fields), 400)
        assert found["code"] == "context_length_exceeded" and "max_seq_len is 1024" in found["message"]


def test_a_body_that_is_too_large(ask):
    found = error(ask(CHAT, {"max_body": 1000}, messages=[{"role": "user", "content": "x" * 1000}]), 413)
    assert "1,000 bytes" in found["message"]


def test_what_is_not_here(ask):
    assert error(ask("/v1/embeddings", input="x"), 404)["code"] == "unknown_url"
    assert error(ask(CHAT, _method="GET"), 405)["code"] == "method_not_allowed"
    assert error(ask(CHAT, model="gpt-4", messages=MESSAGES), 404)["code"] == "model_not_found"
    assert error(ask("/v1/models/gpt-4", _method="GET"), 404)["code"] == "model_not_found"


def test_ignored_and_neutral_fields_change_nothing(ask):
    plain = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0}
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": True, "parallel_tool_calls": True, "service_tier": "auto"}
    neutral = {"best_of": 1, "suffix": None, "modalities": ["text"], "reasoning_effort": None, "n": None, "stop": None}
    got = [ask(CHAT, **plain, **extra).json()["choices"] for extra in ({}, ignored, neutral)]
    assert got[0] == got[1] == got[2]


# --- who may ask


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer ", "Basic secret", "Bearer secretx", "Bearer sécret"])
def test_a_wrong_key(ask, given):
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    response = ask(CHAT, {"api_key": "secret"}, headers, messages=MESSAGES, max_tokens=2)
    assert error(response, 401)["code"] == "invalid_api_key" and response.headers["www-authenticate"] == "Bearer"


def test_the_right_key(ask):
    with_key = {"authorization": "Bearer secret"}
    assert ask(CHAT, {"api_key": "secret"}, with_key, messages=MESSAGES, max_tokens=2).status_code == 200
    assert error(ask("/metrics", {"api_key": "secret"}, _method="GET"), 401)
    assert ask("/health", {"api_key": "secret"}, _method="GET").status_code == 200


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.0.7", True),
        ("evil.example", False),
        ("localhost.evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example@localhost", True),  # no browser sends it
        ("", False),
        ("[", False),
    ],
)
def test_the_name_that_a_client_calls(ask, host, served):
    response = ask("/v1/models", _headers={"host": host}, _method="GET")
    assert response.status_code == 200 if served else error(response, 403)["code"] == "host_not_allowed"
    assert ask("/v1/models", {"allow_host": ("*",)}, {"host": host}, _method="GET").status_code == 200


def test_a_name_that_is_allowed(ask):
    settings = {"allow_host": ("chat.example",)}
    assert ask("/health", settings, {"host": "chat.example"}, _method="GET").status_code == 200
    assert error(ask("/health", settings, {"host": "other.example"}, _method="GET"), 403)


def test_the_page_that_a_browser_shows(ask):
    here = {"host": "localhost:8000"}
    for origin in ("https://evil.example", "http://localhost:9999", "null", "http://["):
        found = error(ask(CHAT, _headers={**here, "origin": origin}, messages=MESSAGES), 403)
        assert found["code"] == "origin_not_allowed"
    own = {**here, "origin": "http://localhost:8000"}
    assert ask(CHAT, _headers=own, messages=MESSAGES, max_tokens=2).status_code == 200
    allowed = {"allow_origin": ("https://chat.example",)}
    response = ask(CHAT, allowed, {**here, "origin": "https://chat.example"}, messages=MESSAGES, max_tokens=2)
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "https://chat.example"
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    preflight = {**here, "origin": "https://chat.example", **asked}
    assert ask(CHAT, {**allowed, "api_key": "k"}, preflight, _method="OPTIONS").status_code == 200
    assert error(ask(CHAT, allowed, {**here, "origin": "https://evil.example"}, messages=MESSAGES), 403)


# --- nobody else is disturbed


def test_other_streams_go_on(asynchronous, llm, monkeypatch):
    """A stream, and beside it bad requests of every kind, gets the text it gets alone, at one token a step."""
    settings = {"max_tokens": 100, "ignore_eos": True, "temperature": 0.9, "seed": 5}
    expected = llm.generate("The sea", **settings).text
    slots = []
    step = Runner.step
    monkeypatch.setattr(Runner, "step", lambda self: (slots.append(len(self.scheduler.active)), step(self))[1])

    async def main():
        app = App(asynchronous)
        stream = asyncio.create_task(app.post(COMPLETIONS, prompt="The sea", **settings))
        bad = [app.post(CHAT, **{"messages": MESSAGES, **fields}) for fields, _, _ in WRONG]
        bodies = [app.client.post(CHAT, content=content, headers=JSON) for content, _ in BODIES]
        refused = await asyncio.gather(*bad, *bodies)
        assert {response.status_code for response in refused} == {400}
        return (await stream).json()["choices"][0]["text"]

    assert asyncio.run(main()) == expected and max(slots) == 1
    assert idle(llm)


def test_an_error_in_a_step_is_a_500_and_in_a_stream_its_last_event(asynchronous, llm, monkeypatch):
    broken = Runner.step
    steps = []

    def step(self):
        steps.append(1)
        if len(steps) > 5:
            raise OSError("the device is lost")
        return broken(self)

    async def main(stream):
        steps.clear()
        app = App(asynchronous)
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "step", step)
            return await app.post(CHAT, messages=MESSAGES, stream=stream, max_tokens=50, ignore_eos=True)

    assert "broken off" in error(asyncio.run(main(False)), 500)["message"]
    streamed = asyncio.run(main(True))
    events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert streamed.status_code == 200 and "choices" in json.loads(events[0]) and "[DONE]" not in events
    last = json.loads(events[-1])
    assert last["error"].keys() == KEYS and last["error"]["type"] == "server_error"
    assert idle(llm)


def test_an_answer_that_no_token_may_continue_is_an_error(ask, llm):
    """Here a form whose longest answer is shorter than min_tokens."""
    fields = {"messages": MESSAGES, "choice": ["ab"], "min_tokens": 9, "max_tokens": 20}
    assert "min_tokens" in error(ask(CHAT, **fields), 400)["message"]
    assert idle(llm)


def test_a_fault_of_the_server_is_told_without_its_traceback(asynchronous, monkeypatch):
    async def main():
        app = App(asynchronous)
        monkeypatch.setattr(app.service, "check_model", lambda name: 1 / 0)
        return await app.post(CHAT, messages=MESSAGES)

    assert "division" not in error(asyncio.run(main()), 500)["message"]


def test_settings_have_bounds_that_fit_a_desktop():
    assert Settings(NAME).host == "127.0.0.1" and Settings(NAME).max_connections < 1024
