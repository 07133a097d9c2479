"""What the official client of OpenAI's API gets."""

import json
import math
import time
from types import SimpleNamespace

import openai
import pytest

from internlm3 import InternLM3Tokenizer
from internlm3.runtime.api.prompt_logprobs import PromptLogprobs
from internlm3.runtime.engine.request import Request
from internlm3.runtime.server.logprobs import of_prompt
from internlm3.runtime.server.service import Service
from internlm3.tests.server.conftest import NAME, idle
from internlm3.tests.support.engine import slow_steps
from internlm3.tests.support.tokenizers import TRAINED, train, write_checkpoint

CHAT = [{"role": "user", "content": "Say something."}]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 12}
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(model=NAME, messages=CHAT, **options)


def joined(chunks):
    """The answers of a stream by index: text and finish reason."""
    answers = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text, reason = answers.get(choice.index, ("", None))
            answers[choice.index] = (text + (choice.delta.content or ""), choice.finish_reason or reason)
    return [answers[index] for index in sorted(answers)]


def test_chat_is_what_llm_says(client, llm):
    got, expected = chat(client, **SAMPLED), llm.chat(CHAT, **SAMPLED)
    assert got.choices[0].message.content == expected.text and got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == expected.outputs[0].finish_reason == "length"
    assert (got.model, got.object) == (NAME, "chat.completion") and abs(got.created - time.time()) < 3600
    assert got.usage.prompt_tokens == len(expected.prompt_token_ids) and got.usage.completion_tokens == 12
    assert got.usage.total_tokens == got.usage.prompt_tokens + 12


def test_cached_tokens_and_timings_are_in_the_usage(client):
    messages = [{"role": "user", "content": "A long question, which fills more than a page of the cache. " * 12}]
    first, second = (client.chat.completions.create(model=NAME, messages=messages, **GREEDY).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens < 64 <= second.prompt_tokens_details.cached_tokens
    assert second.timings["time_to_first_token_ms"] >= second.timings["prompt_ms"] > 0
    each = second.timings["predicted_ms"] / 11
    assert second.timings["predicted_per_second"] == pytest.approx(1000 / each, rel=0.01)


def test_a_stream_is_the_same_text(client, llm):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, n=3, **SAMPLED))
    expected = llm.chat(CHAT, n=3, **SAMPLED)
    assert joined(chunks) == [(answer.text, answer.finish_reason) for answer in expected.outputs]
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 36
    assert chunks[-1].usage.timings["time_to_first_token_ms"] > 0
    first = next(chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == 1)
    assert (first.delta.role, first.delta.content) == ("assistant", "")


def test_without_being_asked_a_stream_has_no_usage(client):
    assert all(chunk.usage is None and chunk.choices for chunk in chat(client, stream=True, **GREEDY))


def test_n_and_seeds(client, llm):
    texts = [choice.message.content for choice in chat(client, n=3, **SAMPLED).choices]
    assert texts == [answer.text for answer in llm.chat(CHAT, n=3, **SAMPLED).outputs] and len({*texts}) == 3
    assert chat(client, **{**SAMPLED, "seed": 8}).choices[0].message.content not in texts


def test_stop(client, llm):
    text = llm.chat(CHAT, **GREEDY).text
    stop = text[4:7]
    got = chat(client, stop=[stop, "never"], **GREEDY).choices[0]
    assert got.message.content == text[: text.index(stop)] and got.finish_reason == "stop"
    assert got.stop_reason == stop
    kept = chat(client, stop=stop, extra_body={"include_stop_str_in_output": True}, **GREEDY).choices[0]
    assert kept.message.content == text[: text.index(stop) + len(stop)]
    assert "".join(each[0] for each in joined(chat(client, stop=stop, stream=True, **GREEDY))) == got.message.content


def test_logprobs(client, llm):
    got = chat(client, logprobs=True, top_logprobs=3, **GREEDY).choices[0]
    expected = llm.chat(CHAT, logprobs=3, **GREEDY).outputs[0]
    content = got.logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(expected.logprobs, abs=1e-4)
    spelt = bytes(byte for entry in content for byte in entry.bytes).decode(errors="replace")
    assert spelt.strip() == got.message.content.strip()
    for entry, top in zip(content, expected.top_logprobs, strict=True):
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx([*top.values()], abs=1e-4)
        assert entry.token in [other.token for other in entry.top_logprobs]  # greedy
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, stream=True, **GREEDY)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert chat(client, **GREEDY).choices[0].logprobs is None


def test_the_end_of_text_is_no_token_of_the_answer(client, llm):
    end = llm.chat(CHAT, **GREEDY).outputs[0].token_ids[3]
    got = chat(client, logprobs=True, extra_body={"stop_token_ids": [end]}, **GREEDY).choices[0]
    assert (len(got.logprobs.content), got.finish_reason, got.stop_reason) == (3, "stop", end)


def test_thinking(client, llm):
    expected = llm.chat(CHAT, thinking=True, **GREEDY)
    for extra in ({"thinking": True}, {"chat_template_kwargs": {"enable_thinking": True}}):
        got = chat(client, extra_body=extra, **GREEDY)
        assert got.choices[0].message.content == expected.text
        assert got.usage.prompt_tokens == len(expected.prompt_token_ids)


def test_settings_of_vllm_by_their_names(client, llm):
    settings = {
        "top_k": 5,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "min_tokens": 6,
        "ignore_eos": True,
        "typical_p": 0.9,
    }
    got = chat(client, extra_body={**settings, "priority": 3, "skip_special_tokens": False}, **SAMPLED)
    assert got.choices[0].message.content == llm.chat(CHAT, skip_special_tokens=False, **settings, **SAMPLED).text


def test_penalties_biases_and_both_names_of_the_longest_answer(client, llm):
    settings = {"presence_penalty": 1.0, "frequency_penalty": 0.5, "temperature": 0.9, "seed": 3}
    got = chat(client, logit_bias={"17": 30, "18": -5}, max_completion_tokens=7, **settings)
    expected = llm.chat(CHAT, logit_bias={17: 30, 18: -5}, max_tokens=7, **settings)
    assert got.choices[0].message.content == expected.text and got.usage.completion_tokens == 7


def test_completions(client, llm):
    prompts = ["Once upon a time", "Water"]
    got = client.completions.create(model=NAME, prompt=prompts, n=2, **SAMPLED)
    expected = llm.generate(prompts, n=2, **SAMPLED)
    assert [choice.text for choice in got.choices] == [a.text for output in expected for a in output.outputs]
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3] and got.usage.completion_tokens == 48
    ids = [[5, 6, 7], [8, 9]]
    for prompt in (ids, ids[0]):
        got = client.completions.create(model=NAME, prompt=prompt, **GREEDY)
        expected = llm.generate(prompt, **GREEDY)
        listed = expected if isinstance(expected, list) else [expected]
        assert [choice.text for choice in got.choices] == [output.text for output in listed]
    assert client.completions.create(model=NAME, prompt="Water", temperature=0).usage.completion_tokens == 16


def test_completions_stream_echo_and_logprobs(client, llm):
    got = client.completions.create(model=NAME, prompt="Water", echo=True, **GREEDY).choices[0].text
    assert got == "Water" + llm.generate("Water", **GREEDY).text
    chunks = list(client.completions.create(model=NAME, prompt="Water", echo=True, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == got
    assert chunks[-1].choices[0].finish_reason == "length"
    logprobs = client.completions.create(model=NAME, prompt="Water", logprobs=2, **GREEDY).choices[0].logprobs
    expected = llm.generate("Water", logprobs=2, **GREEDY).outputs[0]
    assert logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert len(logprobs.top_logprobs[0]) == 2


def test_a_stream_of_completions_to_several_prompts(client, llm):
    prompts, options = ["Once upon a time", "Water", "The sea"], {"n": 2, **SAMPLED}
    whole = client.completions.create(model=NAME, prompt=prompts, echo=True, **options)
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(model=NAME, prompt=prompts, echo=True, **asked, **options))
    texts = [""] * 6
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices] and texts[2].startswith("Water")
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 72)


def test_offsets_leave_out_what_a_tokenizer_adds(tmp_path):
    """A token that begins every prompt, and the space before its first word."""
    tokenizer = InternLM3Tokenizer.from_pretrained(write_checkpoint(tmp_path / "checkpoint", train(TRAINED["dummy"])))
    service = SimpleNamespace(
        llm=SimpleNamespace(llm=SimpleNamespace(tokenizer=tokenizer)), token_bytes=tokenizer.token_bytes()
    )
    service.token = lambda id: Service.token(service, id)
    text = "Water 😀 wet"
    ids = tokenizer.encode(text)
    top = {ids[2]: -math.inf, ids[1]: -1.0}
    scores = PromptLogprobs(ids, [None, *[-math.inf] * (len(ids) - 1)], [None, *[top] * (len(ids) - 1)])
    found = of_prompt(service, scores, text)
    spelt = [spelling(name) for name in found["tokens"]]
    assert spelt[0] == b"<s>" and b"".join(spelt[1:]) == b" " + text.encode() and len({*spelt}) > 4
    assert found["text_offset"] == [0, 0, *(offset - 1 for offset in begins(spelt[1:])[1:])]
    assert found["token_logprobs"] == [None, *[-9999.0] * (len(ids) - 1)]
    assert found["top_logprobs"][1] == {found["tokens"][2]: -9999.0, found["tokens"][1]: -1.0}


def spelling(name):
    """The bytes of a token by its name in a completion."""
    return bytes.fromhex(name[6:].replace("\\x", "")) if name.startswith("bytes:") else name.encode()


def begins(spelt):
    """For each token the number of characters that are complete before it."""
    return [len(b"".join(spelt[:place]).decode(errors="ignore")) for place in range(len(spelt))]


@pytest.mark.parametrize("prompt", ["The sea 你😀 is 🎉", [504, 1234, 300]], ids=["text", "ids"])
@pytest.mark.parametrize("echo", [False, True])
def test_tokens_of_completions_spell_the_text_at_their_offsets(client, prompt, echo):
    """Of characters of several tokens, too; whole and streamed, with a stop string that holds back text."""
    answer = "👩🏽‍🚀 wrote 你好, 𝄞!"
    options = {"logprobs": 3, "max_tokens": 60, "echo": echo, "stop": ["!!"], "extra_body": {"choice": [answer]}}
    (choice,) = client.completions.create(model=NAME, prompt=prompt, **options).choices
    spelt = [spelling(name) for name in choice.logprobs.tokens]
    assert b"".join(spelt).decode() == choice.text and choice.text.endswith(answer)
    assert choice.logprobs.text_offset == begins(spelt)
    tops = [top for top in choice.logprobs.top_logprobs if top is not None]
    assert {*map(len, tops)} == {3} and all(sorted(top.values(), reverse=True) == [*top.values()] for top in tops)
    chunks = [*client.completions.create(model=NAME, prompt=prompt, stream=True, **options)]
    for name in ("tokens", "text_offset"):
        joined = [value for chunk in chunks for value in getattr(chunk.choices[0].logprobs, name)]
        assert joined == getattr(choice.logprobs, name)


@pytest.mark.parametrize("prompts", [["Water is \nwet, 今天", "The sea"], [[5, 6, 7, 9], [600, 2, 70, 8]]])
def test_echo_with_logprobs_scores_the_prompt(client, llm, prompts):
    """Whole, streamed, and with nothing after it, as evaluation harnesses ask."""
    asked = {"model": NAME, "echo": True, "logprobs": 2, "temperature": 0}
    choices = client.completions.create(prompt=prompts, max_tokens=3, **asked).choices
    for prompt, choice in zip(prompts, choices, strict=True):
        scores, answer = llm.prompt_logprobs(prompt, 2), llm.generate(prompt, temperature=0, max_tokens=3, logprobs=2)
        got = choice.logprobs
        text = prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)
        assert choice.text == text + answer.text
        assert got.token_logprobs[0] is got.top_logprobs[0] is None
        expected = scores.logprobs[1:] + answer.outputs[0].logprobs
        assert got.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
        assert {*map(len, got.top_logprobs[1:])} <= {1, 2} and len(got.tokens) == len(scores.token_ids) + 3
        assert got.text_offset[0] == 0 and got.text_offset[len(scores.token_ids)] == len(text)
        for place in (2, 3):  # in ASCII
            assert choice.text[got.text_offset[place] :].startswith(got.tokens[place])
    chunks = [
        chunk.choices[0] for chunk in client.completions.create(prompt=prompts, max_tokens=3, stream=True, **asked)
    ]
    for index, choice in enumerate(choices):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in own) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [value for chunk in own for value in getattr(chunk.logprobs, name)]
            assert joined == getattr(choice.logprobs, name)
    scored = client.completions.create(prompt=prompts, max_tokens=0, n=1, **asked)
    for choice, longer in zip(scored.choices, choices, strict=True):
        assert (choice.text, choice.finish_reason) == (longer.text[: len(choice.text)], "length")
        assert choice.logprobs.token_logprobs == longer.logprobs.token_logprobs[:-3]
    assert (scored.usage.completion_tokens, scored.usage.prompt_tokens) == (
        0,
        sum(len(c.logprobs.tokens) for c in scored.choices),
    )


def test_json_schema(client):
    schema = {
        "type": "object",
        "properties": {"名字": {"enum": ["李雷", "Ada"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["名字", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    got = chat(client, response_format=form, seed=1, max_tokens=200).choices[0]
    person = json.loads(got.message.content)
    assert got.finish_reason == "stop" and person.keys() == {"名字", "age"} and 0 <= person["age"] <= 99
    for extra in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]}):
        assert chat(client, extra_body=extra, max_tokens=20).choices[0].message.content in ("yes", "no")


def test_tools(client, llm):
    tool = {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "The time.",
            "parameters": {
                "type": "object",
                "properties": {"zone": {"enum": ["上海", "UTC"]}},
                "required": ["zone"],
                "additionalProperties": False,
            },
        },
    }
    options = {"tools": [tool], "tool_choice": "required", "max_tokens": 100, "seed": 1, "temperature": 1}
    got = chat(client, **options).choices[0]
    (call,) = got.message.tool_calls
    assert (got.finish_reason, call.function.name, call.type) == ("tool_calls", "clock", "function")
    assert json.loads(call.function.arguments)["zone"] in ("上海", "UTC")
    choices = [choice for chunk in chat(client, stream=True, **options) for choice in chunk.choices]
    calls = [delta for choice in choices for delta in choice.delta.tool_calls or ()]
    assert (calls[0].id is not None, calls[0].function.name, calls[0].index) == (True, "clock", 0)
    assert "".join(delta.function.arguments for delta in calls) == call.function.arguments
    answered = [*CHAT, got.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "12:00"}]
    next_ = client.chat.completions.create(model=NAME, messages=answered, tools=[tool], tool_choice="none", **GREEDY)
    assert next_.choices[0].message.tool_calls is None


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == (NAME, "internlm3", 1024)
    assert client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("gpt-4")
    assert raised.value.code == "model_not_found"


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="gpt-4", messages=CHAT)
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as raised:
        chat(client, temperature=-1)
    assert raised.value.param == "temperature" and "temperature" in raised.value.message
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model=NAME, prompt="word " * 3000)
    assert raised.value.code == "context_length_exceeded"


def test_a_stream_that_is_closed_is_cancelled(client, llm, monkeypatch):
    ended, finish = [], Request.finish

    def noted(request, reason, why=None):
        ended.append((reason, len(request.token_ids)))
        finish(request, reason, why)

    monkeypatch.setattr(Request, "finish", noted)
    slow_steps(monkeypatch)
    stream = chat(client, stream=True, max_tokens=900, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    while not (ended and idle(llm)):
        time.sleep(0.001)
    ((reason, tokens),) = ended
    assert reason == "abort" and tokens < 900
