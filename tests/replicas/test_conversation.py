"""Requests of one conversation have one name, and those of different ones different names."""

import json

import pytest

from internlm3.runtime.replicas.conversation import BEGINNING, conversation

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": "Hello"}
SAID = {"role": "assistant", "content": "Hello! How can I help?"}
NEXT = {"role": "user", "content": "你好吗"}


def named(**fields):
    return conversation(json.dumps(fields).encode())


@pytest.mark.parametrize("before", [[], [SYSTEM]])
def test_all_turns_of_a_chat_have_one_name(before):
    names = {
        named(model="x", messages=[*before, FIRST], stream=True),
        named(model="x", messages=[*before, FIRST, SAID, NEXT], temperature=0.5),
        named(messages=[*before, FIRST, SAID, NEXT, SAID, NEXT]),
    }
    assert len(names) == 1 and names != {""}


def test_all_turns_of_responses_have_one_name():
    names = {
        named(instructions="Be brief.", input="Hello"),
        named(instructions="Be brief.", input="Hello", stream=True),
    }
    typed = [{"type": "message", **FIRST}, {"type": "message", **SAID}, NEXT]
    names |= {named(instructions="Be brief.", input=typed), named(instructions="Be brief.", input=[FIRST])}
    assert len(names) == 1
    assert named(input=[FIRST]) == named(input=[FIRST, SAID, NEXT])


def test_different_beginnings_have_different_names():
    beginnings = [
        {"messages": [FIRST]},
        {"messages": [NEXT]},
        {"messages": [SYSTEM, FIRST]},
        {"messages": [{**SYSTEM, "content": "Be long."}, FIRST]},
        {"prompt": "Hello"},
        {"prompt": "Goodbye"},
        {"prompt": [1, 2, 3]},
        {"prompt": [1, 2, 4]},
        {"instructions": "Be brief.", "input": "Hello"},
        {"instructions": "Be long.", "input": "Hello"},
    ]
    assert len({named(**fields) for fields in beginnings}) == len(beginnings)


def test_texts_and_tokens_are_compared_by_their_beginning():
    assert named(prompt="a" * BEGINNING + "b") == named(prompt="a" * BEGINNING + "c")
    assert named(prompt="a" * (BEGINNING - 1) + "b") != named(prompt="a" * (BEGINNING - 1) + "c")
    assert named(prompt=[1] * BEGINNING + [2]) == named(prompt=[1] * BEGINNING + [3])


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"null", b"{}", b"\xff", b'{"messages": 3}', b'{"prompt": null}', b"[" * 100_000]
)
def test_what_is_no_request_has_no_name(body):
    assert conversation(body) == ""


@pytest.mark.parametrize("depth", [100, 900, 970, 990, 1000, 2000, 100_000])
def test_any_depth_has_a_name_or_none(depth):
    nested = b"[" * depth + b"]" * depth
    assert isinstance(conversation(b'{"messages": [{"role": "user", "content": ' + nested + b"}]}"), str)


@pytest.mark.parametrize("body", [b'{"messages": []}', b'{"messages": [3]}', b'{"messages": [{"role": []}]}'])
def test_what_a_replica_refuses_has_any_name(body):
    assert isinstance(conversation(body), str)
