"""Runs the tools that an answer calls, where they are Python functions."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

from ..tools.calls import ToolCall
from .outputs import CompletionOutput, RequestOutput


def run_tools(
    output: RequestOutput | CompletionOutput, functions: Sequence[Callable[..., Any]]
) -> list[dict[str, Any]]:
    """The messages that go on with a conversation after an answer: the answer, and the results of its calls.

    Example:
        output = llm.chat(messages, tools=[weather])
        while output.tool_calls:
            messages += run_tools(output, [weather])
            output = llm.chat(messages, tools=[weather])

    Args:
        functions: the tools. They get arguments as JSON has them: an Enum as its value. A result that is no string is
            written as JSON.

    Mistakes of the model (a name that is none of the functions, arguments that do not fit) are results for it to read:
    {"error": ...}. An exception of a function is raised here.

    Raises TypeError for what is no function or a coroutine function, and for a result that JSON cannot express.
    """
    known = {}
    for function in functions:
        if not callable(function):
            raise TypeError(f"run_tools runs Python functions, and {function!r:.80} is none: run such a tool yourself")
        if inspect.iscoroutinefunction(function):
            raise TypeError(
                f"run_tools awaits nothing, and {function.__name__!r} is a coroutine function: run it yourself"
            )
        known[function.__name__] = function
    results = [{"role": "tool", "tool_call_id": call.id, "content": _result(call, known)} for call in output.tool_calls]
    return [output.message, *results]


def _result(call: ToolCall, known: dict[str, Callable[..., Any]]) -> str:
    if call.name not in known:
        return _error(f"there is no tool {call.name!r}; the tools are {', '.join(known)}")
    function = known[call.name]
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError) as error:
        return _error(f"the arguments are no JSON object: {error}")
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        return _error(f"{call.name}: {error}")
    result = function(**arguments)
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the result of the tool {call.name!r} cannot be written as JSON: {error}") from None


def _error(text: str) -> str:
    return json.dumps({"error": text}, ensure_ascii=False)
