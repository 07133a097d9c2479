"""The prompt of a conversation with tools: by the chat template where it knows tools, else in InternLM's own format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ..chat_template.messages import joined_text
from ..common.shown import shown
from ..tokenization.tokenizer import InternLM3Tokenizer
from .formats import INTERNLM, renders_tools

_PLUGIN = "name=<|plugin|>"


def chat_prompt(
    tokenizer: InternLM3Tokenizer, messages: Sequence[dict[str, Any]], schemas: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The prompt for an assistant's next message.

    A template that reads `tools` gets them, and messages with calls and results as they are, except that arguments are
    objects, by transformers' convention, where their text is one. For any other template they become turns of
    InternLM's format, whose roles a template prints like every role.

    Args:
        messages: checked messages, with calls and results in OpenAI's form. Results of one turn may be in any order.
        schemas: tools, as `tool_schemas` returns them.

    Raises ValueError for a call without a name, arguments that are neither an object nor a text, a result of no call,
    or a template that leaves out the turn with the tools.
    """
    tools = list(schemas) or None
    messages = _linked(messages)
    if renders_tools(tokenizer.get_chat_template(tools=tools)):
        return _render(tokenizer, messages, tools=tools)
    turns = [_turn(message) for message in messages]
    if tools is None:
        return _render(tokenizer, turns)
    listed = _json([_plugin(schema["function"]) for schema in tools])
    place = int(turns[0]["role"] in ("system", "developer"))
    turns.insert(place, {"role": f"system {_PLUGIN}", "content": listed})
    prompt = _render(tokenizer, turns)
    if listed not in prompt:
        raise ValueError(
            f"the checkpoint's chat template neither reads `tools` nor prints turns of the role 'system {_PLUGIN}', so "
            "the model would not see the tools: set tokenizer.chat_template to one that does"
        )
    return prompt


def _render(tokenizer: InternLM3Tokenizer, messages: Sequence[dict[str, Any]], **tools: Any) -> str:
    prompt: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **tools)
    return prompt


def _linked(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with checked calls, and each turn's results in the order of its calls: the prompt has no ids."""
    linked: list[dict[str, Any]] = []
    places: dict[Any, int] = {}  # of the ids of the last calls
    for are_results, run in groupby(enumerate(messages), lambda each: each[1]["role"] == "tool"):
        if are_results:
            linked += [message for _, message in sorted(run, key=lambda each: _place(each[0], each[1], places))]
            continue
        for index, message in run:
            if message.get("tool_calls"):
                calls = _calls(message["tool_calls"], f"messages[{index}]")
                places = {call["id"]: place for place, call in enumerate(calls) if "id" in call}
                message = {**message, "tool_calls": calls}
            linked.append(message)
    return linked


def _place(index: int, message: Mapping[str, Any], places: Mapping[Any, int]) -> int:
    id = message.get("tool_call_id")
    if id is not None and id not in places:
        raise ValueError(f"messages[{index}]: tool_call_id {shown(id)} is none of the calls before it: "
                         f"{', '.join(map(shown, places)) or 'there are none'}")  # fmt: skip
    return places.get(id, -1)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls whose arguments are objects; OpenAI's are their text."""
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls must be a list, not {shown(calls)}")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f"{where}: tool_calls[{index}] must be {{'id', 'type': 'function', 'function': "
                             f"{{'name', 'arguments'}}}}, not {shown(call)}")  # fmt: skip
        arguments = _arguments(function.get("arguments"))
        if not isinstance(arguments, (dict, str)):
            raise ValueError(f"{where}: the arguments of tool_calls[{index}] ({function['name']!r}) must be a JSON "
                             f"object or its text, not {shown(arguments)}")  # fmt: skip
        own = {"id": call["id"]} if call.get("id") is not None else {}
        checked.append({**own, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return checked


def _arguments(given: Any) -> Any:
    """A call's arguments: the object that their text is, {} for none.

    A text that is no object is returned as it is: a model wrote it, and reads in the call's result what is wrong.
    """
    if not isinstance(given, str):
        return {} if given is None else given
    try:
        read = json.loads(given or "null")
    except (ValueError, RecursionError):
        return given
    return {} if read is None else read if isinstance(read, dict) else given


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    """A message as a turn of InternLM's format."""
    if message["role"] == "tool":
        return {"role": f"environment {_PLUGIN}", "content": message["content"]}
    if not message.get("tool_calls"):
        return message
    calls = [_written(call["function"]) for call in message["tool_calls"]]
    text = joined_text(message["content"]) + "".join(f"{INTERNLM.begin}\n{call}{INTERNLM.end}" for call in calls)
    return {"role": message["role"], "content": text}


def _written(function: Mapping[str, Any]) -> str:
    """A call as the model writes it. Arguments that are no object stand there as they were written."""
    name, arguments = function["name"], function["arguments"]
    if isinstance(arguments, str):
        return f"{{{json.dumps(INTERNLM.name)}: {_json(name)}, {json.dumps(INTERNLM.arguments)}: {arguments}}}"
    return _json({INTERNLM.name: name, INTERNLM.arguments: arguments})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plugin(function: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as InternLM was shown plugins."""
    described = {"description": function["description"]} if function.get("description") else {}
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return {"name": function["name"], **described, "parameters": parameters}
