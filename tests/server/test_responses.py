"""What the official client gets from /v1/responses."""

import asyncio
import json
import time

import openai
import pytest
from pydantic import BaseModel

from internlm3.runtime.api.outputs import Chunk, CompletionOutput, Timings
from internlm3.runtime.engine.runner import Runner
from internlm3.runtime.server.response import Response
from internlm3.runtime.server.response_events import events_of
from internlm3.runtime.server.response_schemas import ResponseRequest
from internlm3.runtime.server.usage import Usage
from internlm3.runtime.tools.calls import ToolCall, ToolCallDelta
from internlm3.tests.server.conftest import NAME, App, idle
from internlm3.tests.server.test_bad_input import error

PATH = "/v1/responses"
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "max_output_tokens": 12, "extra_body": {"seed": 7}}
SETTINGS = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 12, "seed": 7}
MESSAGES = [{"role": "user", "content": "Say something."}]
CLOCK = {
    "type": "function",
    "name": "clock",
    "description": "The time.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"zone": {"enum": ["上海", "UTC"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
}
FORCED = {"tools": [CLOCK], "temperature": 1, "max_output_tokens": 100, "extra_body": {"seed": 1}}
SCHEMA = {"type": "object", "properties": {"年": {"enum": [1, 2]}}, "required": ["年"], "additionalProperties": False}


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def create(client, **options):
    return client.responses.create(**{"model": NAME, "input": "Say something.", **options})


def test_a_text_is_what_llm_says(client, llm):
    got, expected = create(client, **SAMPLED), llm.chat(MESSAGES, **SETTINGS)
    assert got.output_text == expected.text
    (item,) = got.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "incomplete")
    assert (got.status, got.incomplete_details.reason, got.error) == ("incomplete", "max_output_tokens", None)
    assert (got.model, got.object, got.store, got.previous_response_id) == (NAME, "response", False, None)
    assert (got.temperature, got.max_output_tokens, got.truncation) == (0.9, 12, "disabled")
    assert abs(got.created_at - time.time()) < 3600
    tokens = len(expected.prompt_token_ids)
    usage = got.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (tokens, 12, tokens + 12)
    assert usage.input_tokens_details.cached_tokens + usage.input_tokens_details.cache_write_tokens == tokens
    assert usage.timings["time_to_first_token_ms"] > 0


def test_cached_tokens(client):
    long = {"input": "A long question, which fills more than a page of the cache. " * 13, "max_output_tokens": 2}
    create(client, **long)
    assert create(client, **long).usage.input_tokens_details.cached_tokens >= 64


CONVERSATIONS = [
    (
        {"instructions": "Be brief.", "input": [{"role": "user", "content": "One"}]},
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"}],
    ),
    (
        {
            "input": [
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Rhyme."}]},
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": "今天"}, {"type": "input_text", "text": "b"}],
                },
                {
                    "id": "msg_1",
                    "type": "message",
                    "status": "completed",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Fine.", "annotations": []}],
                },
                {"role": "user", "content": "Two"},
            ]
        },
        [
            {"role": "system", "content": "Rhyme."},
            {"role": "user", "content": "今天\nb"},
            {"role": "assistant", "content": "Fine."},
            {"role": "user", "content": "Two"},
        ],
    ),
]


@pytest.mark.parametrize(("given", "messages"), CONVERSATIONS)
def test_conversations(client, llm, given, messages):
    got = create(client, **given, **SAMPLED)
    expected = llm.chat(messages, **SETTINGS)
    assert (got.output_text, got.usage.input_tokens) == (expected.text, len(expected.prompt_token_ids))


def test_settings_by_their_names(client, llm):
    extra = {"seed": 7, "top_k": 5, "repetition_penalty": 1.3, "thinking": True, "stop": ["zz"]}
    got = create(client, **{**SAMPLED, "extra_body": extra})
    expected = llm.chat(MESSAGES, top_k=5, repetition_penalty=1.3, thinking=True, stop=["zz"], **SETTINGS)
    assert got.output_text == expected.text and got.usage.input_tokens == len(expected.prompt_token_ids)


def test_the_events_of_a_text(client, llm):
    events = list(create(client, stream=True, **SAMPLED))
    expected = llm.chat(MESSAGES, **SETTINGS).text
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert [event.sequence_number for event in events] == [*range(len(events))] and deltas > 1
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert events[-4].text == events[-3].part.text == events[-2].item.content[0].text == expected
    assert events[0].response.output == [] and events[0].response.status == "in_progress"
    last = events[-1].response
    assert last.output == [events[-2].item] and last.output_text == expected
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1
    assert (last.status, last.usage.output_tokens, last.incomplete_details.reason) == (
        "incomplete",
        12,
        "max_output_tokens",
    )


def test_a_stream_is_the_response_that_is_not_streamed(client, llm):
    """One that ends by itself: by the client's own stream, which puts it together."""
    stop = llm.chat(MESSAGES, **SETTINGS).text[5:8]
    options = {**SAMPLED, "extra_body": {"seed": 7, "stop": stop}}
    whole = create(client, **options)
    with client.responses.stream(model=NAME, input="Say something.", **options) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.status == whole.status == "completed" and final.output_text == whole.output_text == snapshots[-1]
    assert final.usage.output_tokens == whole.usage.output_tokens and stop not in final.output_text


def test_half_of_a_surrogate_pair_is_repeated_as_it_came(ask):
    form = {"format": {"type": "json_schema", "name": "\ud800年", "schema": {"type": "object"}}}
    for stream in (False, True):
        got = ask(PATH, input="x", text=form, max_output_tokens=2, stream=stream)
        data = got.text if not stream else got.text.rstrip().rpartition("data: ")[2]
        response = json.loads(data).get("response") if stream else json.loads(data)
        assert got.status_code == 200 and response["text"] == form


def test_an_answer_without_text_is_a_message(client, llm):
    end = llm.chat(MESSAGES, **SETTINGS).outputs[0].token_ids[0]
    options = {**SAMPLED, "extra_body": {"seed": 7, "stop_token_ids": [end]}}
    with client.responses.stream(model=NAME, input="Say something.", **options) as stream:
        streamed = stream.get_final_response()
    for got in (create(client, **options), streamed):
        assert (got.status, got.output_text, [item.type for item in got.output]) == ("completed", "", ["message"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "clock"}])
def test_a_call_there_and_back(client, llm, choice):
    got = create(client, tool_choice=choice, **FORCED)
    (call,) = got.output
    assert (got.status, call.type, call.status, call.name) == ("completed", "function_call", "completed", "clock")
    assert json.loads(call.arguments)["zone"] in ("上海", "UTC") and got.tool_choice is not None
    with client.responses.stream(model=NAME, input="Say something.", tool_choice=choice, **FORCED) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.type.removeprefix("response.") for event in events if "delta" not in event.type] == [
        *("created", "in_progress", "output_item.added"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 1 and deltas[-1].snapshot == call.arguments
    assert final.output[0].arguments == call.arguments and final.output[0].parsed_arguments is not None
    history = [*MESSAGES, call, {"type": "function_call_output", "call_id": call.call_id, "output": "12:00"}]
    back = create(client, **{**FORCED, "max_output_tokens": 8}, tool_choice="none", input=history)
    function = {"name": call.name, "arguments": call.arguments}
    calls = [{"id": call.call_id, "type": "function", "function": function}]
    result = {"role": "tool", "tool_call_id": call.call_id, "content": "12:00"}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": calls}, result]
    expected = llm.chat(messages, temperature=1, max_tokens=8, seed=1)
    assert (back.output_text, back.usage.input_tokens) == (expected.text, len(expected.prompt_token_ids))


def test_json(client):
    form = {"format": {"type": "json_schema", "name": "year", "schema": SCHEMA, "strict": True}}
    options = {"max_output_tokens": 60, "temperature": 1}
    got = create(client, text=form, **options)
    assert json.loads(got.output_text)["年"] in (1, 2) and got.status == "completed"
    anything = create(client, text={"format": {"type": "json_object"}}, **options)
    assert anything.output_text.startswith("{")

    class Year(BaseModel):
        year: bool

    parsed = client.responses.parse(model=NAME, input="Say something.", text_format=Year, **options)
    assert parsed.output_parsed.year in (True, False)


def chunk(text="", *calls, reason=None):
    timings = Timings(0.1, 0.1, 0.1) if reason else None
    return Chunk(text, [1], [0.0], None, reason, None, 5, 4, 0.0, 0.0, 0.0, 0, tool_calls=[*calls], timings=timings)


def test_text_and_calls_are_items_of_their_own():
    """What a model may say: a text, calls, a text again."""

    async def chunks():
        yield chunk("On")
        yield chunk("e.", ToolCallDelta(0, "call_a", "f", ""), ToolCallDelta(0, None, None, '{"a"'))
        yield chunk("", ToolCallDelta(0, None, None, ": 1}"), ToolCallDelta(1, "call_b", "g", "{}"))
        yield chunk("Two.", reason="tool_calls")

    async def main():
        return [event async for event in events_of(Response(ResponseRequest(input="x"), NAME), chunks())]

    events = asyncio.run(main())
    kinds = [event["type"].removeprefix("response.") for event in events]
    text = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done", "output_item.done"]
    first = [*text[:2], *text[1:]]
    call = ["function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds == [
        *("created", "in_progress"),
        *("output_item.added", *first),
        *("output_item.added", call[0], *call),
        *("output_item.added", *call),
        *("output_item.added", *text, "completed"),
    ]
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call", "message"]
    assert [(item["call_id"], item["name"], item["arguments"]) for item in output[1:3]] == [
        ("call_a", "f", '{"a": 1}'),
        ("call_b", "g", "{}"),
    ]
    assert [output[place]["content"][0]["text"] for place in (0, 3)] == ["One.", "Two."]
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.done"] == [0, 1, 2, 3]


def test_a_chunk_that_ends_a_call_and_has_text_after_it():
    """As a slow reader gets them, or one of a step that verified drafts."""

    async def chunks():
        yield chunk("", ToolCallDelta(0, "call_a", "f", ""), ToolCallDelta(0, None, None, '{"a"'))
        yield chunk("One.", ToolCallDelta(0, None, None, ": 1}"), ToolCallDelta(1, "call_b", "g", "{}"))
        yield chunk("Two.", reason="tool_calls")

    async def main():
        return [event async for event in events_of(Response(ResponseRequest(input="x"), NAME), chunks())]

    output = asyncio.run(main())[-1]["response"]["output"]
    assert [item.get("arguments") or item["content"][0]["text"] for item in output] == [
        '{"a": 1}',
        "One.",
        "{}",
        "Two.",
    ]
    assert [item.get("call_id") for item in output] == ["call_a", None, "call_b", None]


def test_of_an_answer_that_is_cut_the_last_item_is_incomplete():
    calls = [ToolCall("call_a", "f", "{}"), ToolCall("call_b", "g", '{"a')]
    usage = Usage(5, 4, 0, 0, 0, Timings(0.1, 0.1, 0.1))
    for reason, status in (("length", "incomplete"), ("tool_calls", "completed")):
        answer = CompletionOutput(0, "One.", [1], [0.0], None, reason, None, calls)
        whole = Response(ResponseRequest(input="x"), NAME).whole(answer, usage)
        assert [item["status"] for item in whole["output"]] == ["completed", "completed", status]
        assert whole["status"] == status


def test_an_error_in_a_stream_is_its_last_event(asynchronous, llm, monkeypatch):
    step, steps = Runner.step, []

    def broken(self):
        steps.append(1)
        if len(steps) > 5:
            raise OSError("the device is lost")
        return step(self)

    async def main():
        app = App(asynchronous)
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "step", broken)
            return await app.post(PATH, input="x", stream=True, max_output_tokens=50, ignore_eos=True)

    events = asyncio.run(main()).text.rstrip().split("\n\n")
    name, data = events[-1].split("\n")
    response = json.loads(data.removeprefix("data: "))["response"]
    assert (name, response["status"]) == ("event: response.failed", "failed")
    assert response["error"]["code"] == "server_error" and "broken off" in response["error"]["message"]
    assert response["output"][0]["status"] == "in_progress" and idle(llm)


def parts(*content):
    return {"input": [{"role": "user", "content": [*content]}]}


WRONG = [
    ({"input": 5}, "input", "not empty; got 5"),
    ({"input": []}, "input", "not empty; got []"),
    ({"input": ""}, "input", "not empty"),
    ({"input": ["x"]}, "input", "input[0] must be an object"),
    ({}, "input", "input: Field required"),
    ({"input": [{"role": "poet", "content": "x"}]}, "input", "input[0].role must be one of user, assistant"),
    ({"input": [{"role": "user"}]}, "input", "input[0].content must be a string"),
    (parts({"type": "input_image", "image_url": "x"}), "input", "input[0].content[0]: this server reads text only"),
    (parts({"type": "input_text"}), "input", "reads text only"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "'item_reference'"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input", "'reasoning'"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input", "input[0].arguments must be"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input", "input[0].call_id must be"),
    ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, None, "a"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
    ({"conversation": "conv_1"}, "conversation", "keeps no responses"),
    ({"store": True}, "store", "keeps no responses"),
    ({"background": True}, "background", "keeps no responses"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "keeps no responses"),
    ({"messages": MESSAGES}, "messages", "did you mean 'input'?"),
    ({"response_format": {"type": "json_object"}}, "response_format", "did you mean 'text'?"),
    ({"reasoning": {"effort": "high"}}, "reasoning", "thinking"),
    ({"truncation": "auto"}, "truncation", "'disabled'"),
    ({"include": ["web_search_call.results"]}, "include", "include"),
    ({"top_logprobs": 3}, "top_logprobs", "top_logprobs"),
    ({"max_output_tokens": 0}, "max_tokens", "max_tokens must be"),
    ({"max_output_tokens": 3, "max_tokens": 4}, "max_tokens", "differ"),
    ({"n": 2}, "n", "unknown field 'n'"),
    ({"temperature": -1}, "temperature", "temperature must be"),
    ({"tools": [{"type": "web_search"}]}, "tools", "no other tools"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "'name': ..."),
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "name": "g"}}, None, "'g'"),
    ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools"}}, None, "tool_choice must be"),
    ({"tool_choice": "required"}, None, "needs tools"),
    ({"text": {"format": {"type": "xml"}}}, "text", "text.format must be"),
    ({"text": {"format": {"type": "json_schema"}}}, "text", "text.format must be"),
    ({"text": {"format": "json"}}, "text", "text.format must be"),
    ({"text": {"verbosity": "low"}}, "text", "text may have a format"),
    ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "json_schema", "can't be compiled"),
]


@pytest.mark.parametrize(("fields", "param", "part"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named(ask, fields, param, part):
    for stream in (False, True):
        found = error(
            ask(PATH, **{**({"input": "x"} if fields else {}), "max_output_tokens": 3, "stream": stream, **fields}), 400
        )
        assert part in found["message"], found["message"]
        assert param is None or found["param"] == param


def test_ignored_and_neutral_fields_change_nothing(ask):
    plain = {"input": "x", "max_output_tokens": 5, "temperature": 0}
    ignored = {"user": "me", "metadata": {"a": "b"}, "parallel_tool_calls": True, "service_tier": "auto"}
    neutral = {"store": False, "truncation": "disabled", "include": [], "text": {"format": {"type": "text"}}}
    got = [ask(PATH, **plain, **extra).json()["output"][0]["content"] for extra in ({}, ignored, neutral)]
    assert got[0] == got[1] == got[2]
