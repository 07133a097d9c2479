"""Answers of LLM that have a given form: all that end by themselves have it, whatever the model would rather say."""

import asyncio
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
from jsonschema.validators import validator_for

from internlm3 import LLM, AsyncLLM, RequestOutput, SamplingParams
from internlm3.runtime.structured.grammars import TokenConstraint
from internlm3.tests.structured.schemas import random_schema
from internlm3.tests.support.capture import CapturedEngines
from internlm3.tests.support.llm import result, text_of

SCHEMA = {
    "type": "object",
    "properties": {
        "名字": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["名字", "age"],
    "additionalProperties": False,
}
REGEXES = [
    r"[0-9]{4}-[0-9]{2}",
    r"(yes|no|可能)( maybe)?",
    r"[a-f]{0,6}",
    r"[^a]{3}",
    r"(?i:abc)|x{2,5}",
    r" ?[a-z_]{2}\s",
]
EXPRESSION = """
start: term (("+" | "*") term)?
term: NUMBER | "(" start ")"
NUMBER: /[1-9][0-9]?/
"""


def validate(text: str, schema: Mapping[str, Any]) -> None:
    kind = validator_for(schema)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


def reasons(outputs: list[RequestOutput]) -> list[str | None]:
    return [completion.finish_reason for output in outputs for completion in output.outputs]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_two_hundred_schemas(llm: LLM, temperature: float) -> None:
    schemas = [random_schema(seed) for seed in range(200)]
    for schema in schemas:
        validator_for(schema).check_schema(schema)
    params = [
        SamplingParams(temperature=temperature, seed=i, json_schema=s, max_tokens=120) for i, s in enumerate(schemas)
    ]
    outputs = llm.generate([f"{seed} " for seed in range(200)], params)
    for output, schema in zip(outputs, schemas, strict=True):
        if output.outputs[0].finish_reason == "stop":
            validate(output.text, schema)
    assert {*reasons(outputs)} <= {"stop", "length"} and reasons(outputs).count("stop") > 150
    assert len({output.text for output in outputs}) > 100


@pytest.mark.parametrize("regex", REGEXES)
def test_regular_expressions(llm: LLM, regex: str) -> None:
    outputs = llm.generate(["a", "b c"], regex=regex, n=8, seed=1, temperature=1.0, max_tokens=60)
    texts = {completion.text for output in outputs for completion in output.outputs}
    assert reasons(outputs) == ["stop"] * 16 and all(re.fullmatch(regex, text) for text in texts) and len(texts) > 2


def test_choices_and_grammars(llm: LLM) -> None:
    texts = ["yes", "no", " yes", "ye", "是的", "a , b .", '\n\t"', "<|im_end|>", "</s>"]
    output = llm.generate("x", choice=texts, n=48, seed=2, temperature=2.0)
    assert {completion.text for completion in output.outputs} == {*texts} and {*reasons([output])} == {"stop"}
    output = llm.generate("x", grammar=EXPRESSION, n=16, seed=2, temperature=1.0, max_tokens=80)
    ended = [completion.text for completion in output.outputs if completion.finish_reason == "stop"]
    assert len(ended) > 7 and all(eval(text) > 0 and not re.search(r"[^0-9()+*]", text) for text in ended)


def test_objects_and_other_libraries_forms(llm: LLM) -> None:
    given: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 60}
    named = {"name": "person", "schema": SCHEMA, "strict": True}
    output = llm.generate("x", response_format={"type": "json_schema", "json_schema": named}, **given)
    validate(output.text, SCHEMA)
    assert output.text == llm.generate("x", json_schema=SCHEMA, **given).text
    output = llm.generate("x", response_format={"type": "json_object"}, n=6, **given)
    for completion in output.outputs:
        assert completion.text[0] == "{"
        if completion.finish_reason == "stop":
            assert isinstance(json.loads(completion.text), dict)
    free = llm.generate("x", response_format={"type": "text"}, **given)
    assert free.text == llm.generate("x", **given).text


def test_the_text_is_what_the_grammar_had(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a chat too, where a text of its own would lose its first space, and with a clean-up of spaces."""
    monkeypatch.setattr(llm.tokenizer, "clean_up_tokenization_spaces", True)
    for text in (" yes", "  two", "it 's a . b", "no"):
        assert llm.chat("x", choice=[text], temperature=0).text == text
        assert llm.generate([1], choice=[text], temperature=0).text == text
        assert text_of(list(llm.stream("x", choice=[text], temperature=0))) == text


def test_an_answer_that_is_cut_says_so(llm: LLM) -> None:
    [cut] = llm.generate("x", json_schema=SCHEMA, max_tokens=4, temperature=0).outputs
    assert cut.finish_reason == "length" and len(cut.token_ids) == 4
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut.text)
    [stopped] = llm.generate("x", regex="a{3}Xb{3}", stop="X", temperature=0).outputs
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("aaa", "stop", "X")


def test_min_tokens(llm: LLM) -> None:
    for completion in llm.generate(
        "x", regex="[ab]*", min_tokens=7, n=8, seed=1, temperature=1.0, max_tokens=200
    ).outputs:
        assert len(completion.token_ids) >= 7 and re.fullmatch("[ab]*", completion.text)
    [early] = llm.generate("x", choice=["a"], min_tokens=3, temperature=0).outputs
    assert early.finish_reason == "error" and "choice and min_tokens permit no token there" in str(early.stop_reason)


def test_streams(llm: LLM) -> None:
    given: dict[str, Any] = {"json_schema": SCHEMA, "temperature": 1.0, "seed": 5, "max_tokens": 200}
    chunks = list(llm.stream("x", **given))
    assert text_of(chunks) == llm.generate("x", **given).text and len(chunks) > 10
    stream = llm.stream("x", regex="[ab]{500}", temperature=0)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert llm.engine.pages.free == len(llm.engine.pages)


def test_async_llm(llm: LLM) -> None:
    async def ask() -> list[RequestOutput]:
        async with AsyncLLM(llm) as answers:
            calls = (answers.generate("x", json_schema=SCHEMA, seed=seed, temperature=1.0) for seed in range(6))
            return await asyncio.gather(*calls)

    for output in asyncio.run(ask()):
        validate(output.text, SCHEMA)


def ask_together(llm: LLM) -> list[RequestOutput]:
    """Constrained and free answers, greedy and sampled, with logprobs, in one batch; then each by itself."""
    given: list[dict[str, Any]] = [
        {},
        {"json_schema": SCHEMA},
        {"temperature": 0},
        {"json_schema": SCHEMA, "temperature": 0, "logit_bias": {9: 2.0}},
        {"regex": "[ab]{20}", "repetition_penalty": 1.3},
        {"top_k": 5, "presence_penalty": 1.0},
    ]
    params = [
        SamplingParams(**{"seed": i, "temperature": 1.0, "max_tokens": 40, **each}) for i, each in enumerate(given)
    ]
    prompts = [f"{index} words" for index in range(len(params))]
    outputs = llm.generate(prompts, params)
    alone = [llm.generate(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    for output, other in zip(outputs, alone, strict=True):
        assert result(output) == result(other) and output.outputs[0].logprobs == other.outputs[0].logprobs
    return outputs


def test_batches(llm: LLM) -> None:
    ask_together(llm)


def test_captured_steps_give_the_same(folder: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured, ahead of the host and with drafts; tokens only, since captured prompts are padded."""
    eager = ask_together(llm)
    CapturedEngines(monkeypatch, 3)
    captured = LLM(folder, dtype="bfloat16", progress=False, max_batch_size=4)
    assert [output.text for output in ask_together(captured)] == [output.text for output in eager]


def test_a_mask_that_comes_late_is_seen(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the masks of one token before."""
    allowed = TokenConstraint.allowed
    monkeypatch.setattr(TokenConstraint, "allowed", lambda self, tokens: allowed(self, tokens[:-1]))
    outputs = llm.generate(["a", "b"], json_schema=SCHEMA, n=4, seed=1, temperature=1.0, max_tokens=100)
    with pytest.raises((json.JSONDecodeError, jsonschema.ValidationError, AssertionError)):
        for output in outputs:
            for completion in output.outputs:
                assert completion.finish_reason != "error"
                validate(completion.text, SCHEMA)


def test_mistakes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="json_schema can't be compiled: Invalid type: wobble"):
        llm.generate(["a", "b"], json_schema={"type": "wobble"})
    with pytest.raises(ValueError, match="regex can't be compiled"):
        llm.stream("a", regex="(")
    assert not llm.engine.busy
    llm.__dict__.pop("_grammars", None)
    monkeypatch.setitem(sys.modules, "internlm3.runtime.structured.grammars", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'internlm3\[json\]'"):
        llm.generate("a", choice=["a"])
