"""LLM.chat with tools, by a model that says what a test wants: calls, deltas, ends, and the way back of results."""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm3 import LLM, AsyncLLM, Chunk, CompletionOutput, ToolCall, run_tools
from internlm3.tests.support.llm import ids_of, text_of

PLUGIN = ["<|plugin|>", "<|action_start|>", "<|action_end|>"]
QUESTION = [{"role": "user", "content": "Is it raining in 上海?"}]


def weather(city: str, days: int = 1) -> Any:
    """Forecasts the weather.

    Args:
        city: the city
        days: how many
    """
    return {"city": city, "days": days, "rain": "没有"}


def clock() -> str:
    """The time."""
    return "12:00"


@pytest.fixture(scope="module")
def llm(make: Callable[..., Path], capture: Any) -> LLM:
    """A small model whose tokenizer has the special tokens of plugins, as InternLM's."""
    llm = LLM(make(max_position_embeddings=1024, num_hidden_layers=1), progress=False)
    llm.tokenizer.add_special_tokens({"additional_special_tokens": PLUGIN})
    return llm


@pytest.fixture
def say(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the model answer with a text, and end."""

    def say(text: str) -> None:
        ids = llm.tokenizer.encode(text, add_special_tokens=False) + llm.eos_token_ids[-1:]
        begun = iter(ids)

        def head(x: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(x), llm.config.vocab_size)
            logits[:, next(begun, ids[-1])] = 99
            return logits

        monkeypatch.setattr(llm.model, "head", head)
        if (speculation := llm.engine._runner.speculation) is not None:  # a step has one row
            monkeypatch.setattr(speculation, "prepare", lambda slots: False)

    return say


def call(name: str, arguments: Any) -> str:
    written = json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)
    return f"<|action_start|><|plugin|>\n{written}<|action_end|>"


TWO = "让我看看。" + call("weather", {"city": "上海", "days": 3}) + call("clock", {})


def calls_of(chunks: Sequence[Chunk]) -> list[ToolCall]:
    """The calls that a reader of a stream puts together, by OpenAI's rules."""
    calls: dict[int, ToolCall] = {}
    for chunk in chunks:
        for delta in chunk.tool_calls:
            if delta.id is not None:
                assert delta.index == len(calls) and delta.name is not None
                calls[delta.index] = ToolCall(delta.id, delta.name, "")
            known = calls[delta.index]
            calls[delta.index] = ToolCall(known.id, known.name, known.arguments + delta.arguments)
    return list(calls.values())


def named(answer: CompletionOutput) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in answer.tool_calls]


def test_calls_of_an_answer(llm, say):
    say(TWO)
    output = llm.chat(QUESTION, tools=[weather, clock], temperature=0)
    [answer] = output.outputs
    assert named(answer) == [("weather", '{"city": "上海", "days": 3}'), ("clock", "{}")]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("让我看看。", "tool_calls", None)
    assert output.tool_calls == answer.tool_calls
    ids = [call.id for call in answer.tool_calls]
    assert len(set(ids)) == 2 and all(id.startswith("call_") and len(id) > 20 for id in ids)
    assert '<|im_start|>system name=<|plugin|>\n[{"name": "weather", "description": "Forecasts' in output.prompt
    assert llm.tokenizer.added_tokens_encoder["<|plugin|>"] in output.prompt_token_ids


@pytest.mark.parametrize("stream", ["stream", "chat"])
def test_calls_of_a_stream(llm, say, stream):
    say(TWO)
    options = {"tools": [weather, clock], "temperature": 0}
    chunks = list(llm.stream(QUESTION, **options) if stream == "stream" else llm.chat(QUESTION, stream=True, **options))
    assert text_of(chunks) == "让我看看。"
    assert [(call.name, call.arguments) for call in calls_of(chunks)] == [
        ("weather", '{"city": "上海", "days": 3}'), ("clock", "{}"),
    ]  # fmt: skip
    # The arguments come in pieces, and before the answer ends.
    assert sum(bool(chunk.tool_calls) for chunk in chunks) > 5 and chunks[-1].tool_calls == []
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_calls_by_an_asynchronous_reader(llm, say):
    """Who reads a chunk and waits for the answer's end, so that the next one has what many tokens added, in order."""
    say(TWO)

    async def read() -> tuple[list[Chunk], CompletionOutput]:
        options: dict[str, Any] = {"tools": [weather, clock], "temperature": 0}
        chunks = []
        async with AsyncLLM(llm) as asynchronous:
            async for chunk in asynchronous.stream(QUESTION, **options):
                chunks.append(chunk)
                while llm.engine.busy:
                    await asyncio.sleep(0.001)
            say(TWO)
            return chunks, (await asynchronous.chat(QUESTION, **options)).outputs[0]

    chunks, answer = asyncio.run(read())
    assert any(len(chunk.token_ids) > 1 for chunk in chunks)
    assert [(call.name, call.arguments) for call in calls_of(chunks)] == named(answer)
    assert (text_of(chunks), chunks[-1].finish_reason) == (answer.text, "tool_calls")
    assert named(answer) == [("weather", '{"city": "上海", "days": 3}'), ("clock", "{}")]


def test_answers_without_calls_are_as_they_were(llm, say):
    """With tools and without: the text with its spaces, and special tokens skipped."""
    say("\n It is<|im_start|> dry. {}\n")
    expected = llm.chat(QUESTION, temperature=0)
    assert expected.text == "\n It is dry. {}\n"
    for tools, choice in (([weather], "auto"), ([weather], "none"), ([], "auto"), (None, "none")):
        say("\n It is<|im_start|> dry. {}\n")
        output = llm.chat(QUESTION, tools=tools, tool_choice=choice, temperature=0)
        assert output.outputs == [expected.outputs[0]], (tools, choice)
        assert (output.prompt == expected.prompt) is (not tools or choice == "none")
    # Without tools nothing is looked for.
    say(TWO)
    output = llm.chat(QUESTION, temperature=0)
    assert output.text == TWO.replace(PLUGIN[0], "").replace(PLUGIN[1], "").replace(PLUGIN[2], "")
    assert (output.tool_calls, output.outputs[0].finish_reason) == ([], "stop")


@pytest.mark.parametrize(
    ("settings", "reason", "calls"),
    [
        ({"stop": "<|action_end|>"}, "tool_calls", [("weather", '{"city": "上海", "days": 3}')]),
        ({"stop": '": 3'}, "tool_calls", [("weather", '{"city": "上海", "days')]),
        ({"stop": "上海"}, "tool_calls", [("weather", '{"city": "')]),
        ({"stop": "name"}, "stop", []),
        ({"max_tokens": TWO[: TWO.index("上海")]}, "length", [("weather", '{"city": "')]),
    ],
)
def test_ends_within_a_call(llm, say, settings, reason, calls):
    """Nothing is lost: what is no call yet is text, and a call that was cut has the arguments so far."""
    if "max_tokens" in settings:
        settings = {"max_tokens": len(ids_of(llm, settings["max_tokens"]))}
    say(TWO)
    answer = llm.chat(QUESTION, tools=[weather], temperature=0, **settings).outputs[0]
    say(TWO)
    chunks = list(llm.stream(QUESTION, tools=[weather], temperature=0, **settings))
    assert [(call.name, call.arguments) for call in calls_of(chunks)] == named(answer)
    assert text_of(chunks) == answer.text
    assert answer.finish_reason == chunks[-1].finish_reason == reason
    assert named(answer) == calls
    assert answer.text == ("让我看看。" if calls else '让我看看。<|action_start|><|plugin|>\n{"')


FORCED = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize("choice", ["required", FORCED], ids=["required", "named"])
def test_a_forced_call_comes_from_any_model(llm, choice):
    """This one has random weights. The mark that begins the call is in the prompt, and a grammar sees to the rest."""
    pytest.importorskip("llguidance")
    options = {"tools": [weather, clock] if choice == FORCED else [clock], "tool_choice": choice, "temperature": 1}
    output = llm.chat(QUESTION, seed=1, max_tokens=200, **options)
    [answer] = output.outputs
    assert output.prompt.endswith("<|im_start|>assistant\n<|action_start|><|plugin|>\n")
    assert (answer.text, answer.finish_reason) == ("", "tool_calls")
    [call] = answer.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("clock", {})
    chunks = list(llm.stream(QUESTION, seed=1, max_tokens=200, **options))
    assert [(call.name, call.arguments) for call in calls_of(chunks)] == named(answer)
    for form in ({"json_object": True}, {"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}):
        assert named(llm.chat(QUESTION, seed=1, max_tokens=200, **form, **options).outputs[0]) == named(answer)
    with pytest.raises(ValueError, match="regex and tool_choice each say what the answer may be"):
        llm.chat(QUESTION, regex="a", **options)


FORMS = [{"json_object": True}, {"json_schema": {"type": "object", "properties": {"rain": {"type": "boolean"}}}}]


@pytest.mark.parametrize("form", FORMS, ids=["object", "schema"])
def test_beside_a_form_of_json_a_model_may_call(llm, say, form):
    """As OpenAI's API has it: the answer is JSON of the form, or calls. What is neither does not come."""
    pytest.importorskip("llguidance")
    options = {"tools": [weather, clock], "temperature": 0, "max_tokens": 200, **form}
    calls = TWO[TWO.index("<") :]
    for written in (calls, calls.removesuffix(PLUGIN[2]), call("clock", {})):
        say(written)
        answer = llm.chat(QUESTION, **options).outputs[0]
        say(written)
        chunks = list(llm.stream(QUESTION, **options))
        assert named(answer) == [(each.name, each.arguments) for each in calls_of(chunks)] and answer.text == ""
        assert named(answer)[-1] == ("clock", "{}") and answer.finish_reason == chunks[-1].finish_reason == "tool_calls"
    say('{"rain": false}')
    answer = llm.chat(QUESTION, **options).outputs[0]
    assert (answer.text, answer.tool_calls, answer.finish_reason) == ('{"rain": false}', [], "stop")
    for wrong in ("It is dry.", call("sun", {}), '{"rain": false}' + calls):
        say(wrong)
        answer = llm.chat(QUESTION, **options).outputs[0]
        spelt = "".join(llm.tokenizer.convert_ids_to_tokens(answer.token_ids))
        assert spelt != wrong and not any(name == "sun" for name, _ in named(answer))
        assert not (answer.text and answer.tool_calls)


def test_other_forms_stay_what_they_are_beside_tools(llm, say):
    pytest.importorskip("llguidance")
    say(call("clock", {}))
    assert llm.chat(QUESTION, tools=[clock], choice=["yes"], temperature=0).text == "yes"


def test_a_schema_that_is_wrong_is_named_beside_tools(llm):
    pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match="json_schema can't be compiled"):
        llm.chat(QUESTION, tools=[clock], json_schema={"type": "object", "not": {}})


def test_several_conversations_and_answers(llm):
    """Each answer has a parser of its own; a name that is none of the tools is a call too."""
    outputs = llm.chat([QUESTION, QUESTION], tools=[clock], n=2, temperature=1, seed=1, max_tokens=3)
    assert [[answer.tool_calls for answer in output.outputs] for output in outputs] == [[[], []], [[], []]]


def test_a_name_that_is_no_tool_is_a_call(llm, say):
    say(call("sun", {}))
    assert named(llm.chat(QUESTION, tools=[clock], temperature=0).outputs[0]) == [("sun", "{}")]


def test_a_template_with_another_format(llm, say, monkeypatch):
    monkeypatch.setattr(
        llm.tokenizer,
        "chat_template",
        '{% for t in tools %}{{ t | tojson }}{% endfor %}<tool_call>{"name": "f", "arguments": {}}</tool_call>'
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    say('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>\n')
    output = llm.chat(QUESTION, tools=[clock], temperature=0)
    assert (output.text, named(output.outputs[0])) == ("", [("clock", "{}")])
    assert output.prompt.startswith('{"type": "function"')
    pytest.importorskip("llguidance")
    say('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>')
    formed = llm.chat(QUESTION, tools=[clock], temperature=0, json_object=True)
    assert (formed.text, named(formed.outputs[0])) == ("", [("clock", "{}")])


# -------------------------------------------------------------------- results


def test_results_go_back(llm, say):
    """The answer and its results, as messages, are what the prompt of the next answer ends with."""
    say(TWO)
    output = llm.chat(QUESTION, tools=[weather, clock], temperature=0)
    messages = run_tools(output, [weather, clock])
    first, second = output.tool_calls
    assert messages == [
        {
            "role": "assistant",
            "content": "让我看看。",
            "tool_calls": [
                {"id": first.id, "type": "function", "function": {"name": "weather", "arguments": first.arguments}},
                {"id": second.id, "type": "function", "function": {"name": "clock", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": first.id, "content": '{"city": "上海", "days": 3, "rain": "没有"}'},
        {"role": "tool", "tool_call_id": second.id, "content": "12:00"},
    ]
    say("没有雨。")
    after = llm.chat([*QUESTION, *messages], tools=[weather, clock], temperature=0)
    assert after.prompt == (
        output.prompt + TWO + "<|im_end|>\n<|im_start|>environment name=<|plugin|>\n" + messages[1]["content"]
        + "<|im_end|>\n<|im_start|>environment name=<|plugin|>\n12:00<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    # What the model wrote is rendered token by token as it wrote it, so it is not computed again.
    written = output.prompt_token_ids + output.outputs[0].token_ids
    assert after.prompt_token_ids[: len(written)] == written
    assert after.message == {"role": "assistant", "content": "没有雨。"}
    assert run_tools(after, [clock]) == [after.message]


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("sun", "{}", "there is no tool 'sun'; the tools are weather, clock"),
        ("weather", '{"city"', "the arguments are no JSON object"),
        ("weather", "{}", "weather: missing a required argument: 'city'"),
        ("clock", '{"zone": 1}', "clock: got an unexpected keyword argument 'zone'"),
    ],
)
def test_mistakes_of_the_model_are_results(name, arguments, says):
    answer = CompletionOutput(0, "", [], [], None, "tool_calls", None, [ToolCall("call_1", name, arguments)])
    message, result = run_tools(answer, [weather, clock])
    assert message["content"] is None
    assert says in json.loads(result["content"])["error"]


def test_a_conversation_goes_on_after_arguments_that_are_no_json(llm, say):
    say(TWO)
    cut = len(llm.tokenizer.encode(TWO[: TWO.index('"days"')], add_special_tokens=False))
    output = llm.chat(QUESTION, tools=[weather], temperature=0, max_tokens=cut)
    (broken,) = output.tool_calls
    with pytest.raises(ValueError):
        json.loads(broken.arguments)
    messages = [*QUESTION, *run_tools(output, [weather])]
    say("没有雨。")
    after = llm.chat(messages, tools=[weather], temperature=0)
    assert after.text == "没有雨。" and broken.arguments in after.prompt


def test_mistakes_of_the_caller_are_raised():
    def fails() -> None:
        raise KeyError("a fault in a tool")

    answer = CompletionOutput(0, "", [], [], None, "tool_calls", None, [ToolCall("call_1", "fails", "{}")])
    with pytest.raises(KeyError, match="a fault in a tool"):
        run_tools(answer, [fails])
    with pytest.raises(TypeError, match=r"'type': 'function'.* run such a tool yourself"):
        run_tools(answer, [{"type": "function"}])

    async def waits() -> str:
        return ""

    with pytest.raises(TypeError, match="'waits' is a coroutine function: run it yourself"):
        run_tools(answer, [waits])

    def odd() -> set[int]:
        return {1, 2}

    odd.__name__ = "fails"
    with pytest.raises(TypeError, match=r"result of the tool 'fails' cannot be written as JSON: .* set"):
        run_tools(answer, [odd])


# -------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tools": clock}, "tools must be a list"),
        ({"tools": [clock], "tool_choice": "clock"}, "tool_choice must be"),
        ({"tool_choice": "required"}, "needs tools, and there are none"),
    ],
)
def test_bad_tools_are_errors_at_once(llm, options, says):
    for ask in (llm.chat, llm.stream):
        with pytest.raises(ValueError, match=says):
            ask(QUESTION, **options)


def test_tools_need_messages(llm):
    assert list(llm.stream("A question", tools=[clock], temperature=0, max_tokens=1))
    with pytest.raises(ValueError, match=r"messages\[0\] must be a dict"):
        llm.stream([5, 6], tools=[clock])
    with pytest.raises(TypeError, match=r"did you mean 'tools of LLM.chat'"):
        llm.generate("A question", tools=[clock])
