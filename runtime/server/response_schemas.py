"""The body of a request for a response, and the conversation in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import model_validator

from ..common.neutral import Neutral
from ..common.shown import shown
from .errors import ApiError
from .schemas import IGNORED, Sampling, with_length

# Fields that need what this server does not keep: responses.
_KEPT: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (None,),
    "conversation": (None,),
    "prompt": (None,),
    "background": (None, False),
    "store": (None, False),
}
_STATELESS = "this server keeps no responses: send the whole conversation as input, and store: false"
# Further fields of OpenAI's Responses API that this server has not, with the values at which they mean nothing.
RESPONSE_UNSUPPORTED: Neutral = {
    **{name: tuple(value for value in values if value is not None) for name, values in _KEPT.items()},
    "include": ([], ["reasoning.encrypted_content"]),
    "max_tool_calls": (),
    "reasoning": ({},),
    "stream_options": ({}, {"include_obfuscation": False}, {"include_obfuscation": True}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text")


class ResponseRequest(Sampling):
    ignored: ClassVar = tuple(name for name in IGNORED if name != "store")
    unsupported: ClassVar = RESPONSE_UNSUPPORTED
    counterparts: ClassVar = {
        "messages": "input",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text",
        "reasoning": "thinking",
    }

    model: str | None = None
    input: Any
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    stream: bool | None = None
    thinking: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_kept(cls, given: Any) -> Any:
        for name, neutral in _KEPT.items():
            if isinstance(given, Mapping) and not any(given.get(name) is value for value in neutral):
                raise ApiError(400, f"{name}: {_STATELESS}", param=name, code="unsupported_value")
        return given

    def settings(self) -> dict[str, Any]:
        return with_length(super().settings(), "max_output_tokens", self.max_output_tokens) | self._form()

    def _form(self) -> dict[str, Any]:
        """The form of the answer, as a setting of sampling."""
        text = self.text or {}
        if text.keys() - {"format", "verbosity"} or text.get("verbosity") not in (None, "medium"):
            raise ApiError(400, f"text may have a format, and nothing else here; got {shown(text)}", param="text")
        form = {"type": "text"} if text.get("format") is None else text["format"]
        kind = form.get("type") if isinstance(form, Mapping) else None
        if kind == "json_schema" and isinstance(form.get("schema"), (dict, bool)):
            return {"json_schema": form["schema"]}
        if kind not in ("text", "json_object"):
            what = "{'type': 'text'}, {'type': 'json_object'} or {'type': 'json_schema', 'schema': ...}"
            raise ApiError(400, f"text.format must be {what}; got {shown(form)}", param="text")
        return {"json_object": True} if kind == "json_object" else {}

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, as messages of a chat."""
        own = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if not isinstance(self.input, (str, list)) or not self.input:
            raise _wrong(f"input must be a text or a list of items, and not empty; got {shown(self.input)}")
        if isinstance(self.input, str):
            return [*own, {"role": "user", "content": self.input}]
        for place, item in enumerate(self.input):
            _add(own, item, f"input[{place}]")
        return own

    @property
    def chat_tools(self) -> list[dict[str, Any]] | None:
        """The tools in the form of a chat."""
        tools = []
        for place, tool in enumerate(self.tools or ()):
            if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
                what = "must be {'type': 'function', 'name': ..., 'parameters': ...}: this server has no other tools"
                raise ApiError(400, f"tools[{place}] {what}; got {shown(tool)}", param="tools")
            tools.append({"type": "function", "function": {key: tool[key] for key in tool.keys() - {"type"}}})
        return tools or None

    @property
    def chat_tool_choice(self) -> str | dict[str, Any]:
        choice = self.tool_choice or "auto"
        if isinstance(choice, dict) and "name" in choice:
            return {"type": choice.get("type"), "function": {"name": choice["name"]}}
        return choice


def _add(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    """Adds an item of an input. Calls of functions belong to the assistant's message before them, if there is one."""
    if not isinstance(item, Mapping):
        raise _wrong(f"{where} must be an object, not {shown(item)}")
    kind = item.get("type", "message")
    if kind == "message":
        if item.get("role") not in _ROLES:
            raise _wrong(f"{where}.role must be one of {', '.join(_ROLES)}, not {shown(item.get('role'))}")
        messages.append({"role": item["role"], "content": _text(item.get("content"), f"{where}.content")})
    elif kind == "function_call":
        call = {name: _string(item, name, where) for name in ("call_id", "name", "arguments")}
        function = {"name": call["name"], "arguments": call["arguments"]}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(
            {"id": call["call_id"], "type": "function", "function": function}
        )
    elif kind == "function_call_output":
        text = _text(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", where), "content": text})
    else:
        known = "message, function_call or function_call_output"
        raise _wrong(f"{where}: this server reads items of type {known}, not {shown(kind)}")


def _text(content: Any, where: str) -> str | list[dict[str, Any]]:
    """A content as a chat has it: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(f"{where} must be a string or a list of parts, not {shown(content)}")
    parts = []
    for place, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") not in _TEXTS or not isinstance(part.get("text"), str):
            what = "this server reads text only, as {'type': 'input_text', 'text': ...}"
            raise _wrong(f"{where}[{place}]: {what}; got {shown(part)}")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(item.get(name), str):
        raise _wrong(f"{where}.{name} must be a string, not {shown(item.get(name))}")
    return str(item[name])


def _wrong(what: str) -> ApiError:
    return ApiError(400, what, param="input")
