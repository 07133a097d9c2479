"""The tools that a caller gives, as JSON schemas in OpenAI's form or as Python functions; and what must be called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..chat_template.messages import plain_json
from ..chat_template.tools import function_schema
from ..common.shown import shown

Tool = Mapping[str, Any] | Callable[..., Any]
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def tool_schemas(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Tools as {"type": "function", "function": {"name", "description", "parameters"}}; [] for None.

    Args:
        tools: such dicts, or Python functions, whose type hints and docstring make one: see chat_template.tools.

    Raises ValueError for what is neither, for parameters that are no JSON schema of an object, for arguments that a
    function does not take by name, and for two tools of one name. The message names it.
    """
    if tools is None:
        return []
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"tools must be a list of functions or of JSON schemas, not {shown(tools)}")
    schemas = [_schema(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    names = [schema["function"]["name"] for schema in schemas]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"tools: there are {names.count(name)} with the name {name!r}; a call could mean either")
    return schemas


def allowed_tools(schemas: Sequence[Mapping[str, Any]], choice: Any) -> list[Mapping[str, Any]] | None:
    """The tools of which one must be called, by `tool_choice`; None where none must.

    Args:
        choice: "auto", "none", "required", or {"type": "function", "function": {"name": ...}}; None is "auto".

    Raises ValueError for anything else, and for a choice that needs tools where there are none, or no such one.
    """
    if choice in (None, "auto", "none"):
        return None
    name = None
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
    if choice != "required" and not isinstance(name, str):
        raise ValueError(
            'tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}; '
            f"got {shown(choice)}"
        )
    if not schemas:
        raise ValueError(f"tool_choice={shown(choice)} needs tools, and there are none")
    if name is None:
        return list(schemas)
    allowed = [schema for schema in schemas if schema["function"]["name"] == name]
    if not allowed:
        known = ", ".join(schema["function"]["name"] for schema in schemas)
        raise ValueError(f"tool_choice names {name!r}, which is none of the tools: {known}")
    return allowed


def _schema(tool: Any, where: str) -> dict[str, Any]:
    if callable(tool):
        schema = function_schema(tool)
        function = schema["function"]
        for name, parameter in inspect.signature(tool).parameters.items():
            if name in function["parameters"]["properties"] and parameter.kind not in _BY_NAME:
                kind = f"a call names its arguments, and {name!r} is {parameter.kind.description}"
                raise ValueError(f"{where} {function['name']!r}: {kind}")
        return schema
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(
            f"{where} must be a Python function, or "
            f'{{"type": "function", "function": {{"name": ..., "parameters": ...}}}}; got {shown(tool)}'
        )
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ValueError(
            f"{where}: the parameters of {function['name']!r} must be a JSON schema, not {shown(parameters)}"
        )
    plain: dict[str, Any] = plain_json(tool, where)
    return plain
