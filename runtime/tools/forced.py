"""The JSON schemas of calls: of one that must come, and of those that may come in place of JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .formats import ToolFormat

# Keywords with which a schema may name arguments elsewhere than in its `properties`.
_COMPOSED = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if"})


def call_schema(schemas: Sequence[Mapping[str, Any]], format: ToolFormat) -> dict[str, Any]:
    """The schema of what follows the mark that begins a call, where it must call one of these tools.

        >>> call_schema([{"type": "function", "function": {"name": "now"}}], INTERNLM)["properties"]["name"]
        {'const': 'now'}

    Args:
        schemas: one tool or several, as `tool_schemas` returns them. Where the parameters of one do not say whether
            there may be further arguments, there are none.
    """
    if len(schemas) == 1:
        return _call(schemas[0]["function"], format, "#")
    return {"anyOf": [_call(each["function"], format, f"#/anyOf/{index}") for index, each in enumerate(schemas)]}


def any_call_schema(schemas: Sequence[Mapping[str, Any]], format: ToolFormat) -> dict[str, Any]:
    """The schema of a call of one of these tools with any arguments, which the model may make or not."""
    return {
        "type": "object",
        "properties": {
            format.name: {"enum": [schema["function"]["name"] for schema in schemas]},
            format.arguments: {"type": "object"},
        },
        "required": [format.name, format.arguments],
        "additionalProperties": False,
    }


def _call(function: Mapping[str, Any], format: ToolFormat, place: str) -> dict[str, Any]:
    parameters = _moved(function.get("parameters") or {}, f"{place}/properties/{format.arguments}")
    closed = {} if parameters.keys() & _COMPOSED else {"additionalProperties": False}
    arguments = {"type": "object", **closed, **parameters}
    return {
        "type": "object",
        "properties": {format.name: {"const": function["name"]}, format.arguments: arguments},
        "required": [format.name, format.arguments],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """A schema that has become a part of another one, at `place`: its references to itself begin there.

    `nullable`, which schemas of Python functions have from OpenAPI, is written as JSON Schema writes it.
    """
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    if moved.get("nullable") is True:
        del moved["nullable"]
        return {"anyOf": [moved, {"type": "null"}]}
    return moved
