"""The JSON schema of a tool that is given as a Python function, by transformers' rules."""

import inspect
import json
import re
import types
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_TYPES: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SCALARS = (int, float, str, bool, type(None))
_SECTION = re.compile(r"\s*(Args|Returns|Raises):")
_ARGUMENT = re.compile(r"([ \t]*)(\w+):(.*)")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema that a chat template gets for a function: {"type": "function", "function": {"name", ...}}.

    Types come from the type hints: int, float, str, bool, None, Any, list, tuple, dict, Literal, an Enum, and unions of
    these. Descriptions come from a docstring in Google's style, whose section "Args:" describes every argument; one
    that ends in (choices: ["a", "b"]) becomes an enum. `self` and `cls` without a hint are left out.

        >>> def weather(city: str, days: int = 1) -> str:
        ...     '''Forecasts the weather.
        ...
        ...     Args:
        ...         city: The name of the city.
        ...         days: How many days.
        ...     '''

    Raises ValueError for a function without a docstring, and for an argument without a description or a type hint, or
    with one that JSON has no schema for. The message names them.
    """
    name = getattr(function, "__name__", type(function).__name__)
    description, arguments, returned = _parse_docstring(inspect.getdoc(function) or "")
    if not description and not arguments:
        raise ValueError(f"tool {name!r} needs a docstring that says what it does, and describes its arguments")
    try:
        hints = get_type_hints(function)
    except Exception as error:  # a hint in quotes is an expression, which can raise anything
        raise ValueError(f"tool {name!r}: its type hints cannot be read ({error})") from error
    properties, required = {}, []
    for index, (argument, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if argument not in hints:
            if index == 0 and argument in ("self", "cls"):
                continue
            raise ValueError(f"tool {name!r}: argument {argument!r} has no type hint")
        if argument not in arguments:
            raise ValueError(f'tool {name!r}: the section "Args:" of its docstring does not describe {argument!r}')
        if parameter.default is parameter.empty:
            required.append(argument)
        schema = _type_schema(hints[argument], f"tool {name!r}: argument {argument!r}")
        properties[argument] = _described(schema, arguments[argument], f"tool {name!r}: argument {argument!r}")
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    schema = {"name": name, "description": description, "parameters": parameters}
    try:
        result = _type_schema(hints["return"], "")
    except (KeyError, ValueError):  # the model never writes it
        result = None
    if result is not None:
        schema["return"] = result if returned is None else {**result, "description": returned}
    return {"type": "function", "function": schema}


def _described(schema: dict[str, Any], description: str, where: str) -> dict[str, Any]:
    """A schema with its description, whose choices become an enum."""
    choices = _CHOICES.search(description)
    if choices is None:
        return {**schema, "description": description}
    try:
        values = json.loads(choices[1])
        schema = {**schema, "enum": [value.strip() if isinstance(value, str) else value for value in values]}
    except (TypeError, ValueError):
        raise ValueError(f"{where}: its choices are no JSON list: {choices[1]!r:.80}") from None
    return {**schema, "description": description[: choices.start()].strip()}


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    """The schema of a type hint. Raises ValueError, which begins with `where`, if it has none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum([member.value for member in hint], hint, where)
    if origin is None and hint in _TYPES:
        return dict(_TYPES[hint])
    if origin is Literal:
        return _enum(arguments, hint, where)
    if origin in (Union, types.UnionType):
        return _union(arguments, where)
    if origin is list:
        return {"type": "array", **({"items": _type_schema(arguments[0], where)} if arguments else {})}
    if origin is tuple and len(arguments) != 1 and ... not in arguments:
        items = [_type_schema(argument, where) for argument in arguments]
        return {"type": "array", **({"prefixItems": items} if items else {})}
    if origin is dict:
        values = {"additionalProperties": _type_schema(arguments[1], where)} if arguments else {}
        return {"type": "object", **values}
    raise ValueError(
        f"{where} has the type hint {hint!r}, which has no JSON schema here: take int, float, str, bool, list, dict, "
        "tuple, Literal, an Enum or a union of these, or give the tool as a JSON schema"
    )


def _union(members: Iterable[Any], where: str) -> dict[str, Any]:
    schemas = [_type_schema(member, where) for member in members if member is not type(None)]
    nullable = {"nullable": True} if type(None) in members else {}
    if len(schemas) == 1:
        return {**schemas[0], **nullable}
    if all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        names = sorted({schema["type"] for schema in schemas})
        return {"type": names[0] if len(names) == 1 else names, **nullable}
    return {"anyOf": schemas, **nullable}


def _enum(values: Iterable[Any], hint: Any, where: str) -> dict[str, Any]:
    values = list(values)
    if not values or any(type(value) not in _SCALARS for value in values):
        raise ValueError(f"{where} has the type hint {hint!r}, and JSON has no such values")
    names = [*dict.fromkeys(_TYPES[type(value)]["type"] for value in values)]
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _parse_docstring(doc: str) -> tuple[str, dict[str, str], str | None]:
    """Description, descriptions of the arguments, and that of the returned value, if there is a section for it."""
    sections: dict[str, list[str]] = {}
    description: list[str] = []
    lines = description
    for line in doc.splitlines():
        if header := _SECTION.match(line):
            lines = []
            if not line[header.end() :].strip():  # else it is no section that transformers reads
                sections[header[1]] = lines
        else:
            lines.append(line)
    returned = "\n".join(sections["Returns"]).strip() if "Returns" in sections else None
    return "\n".join(description).strip(), _parse_arguments(sections.get("Args", [])), returned


def _parse_arguments(lines: Iterable[str]) -> dict[str, str]:
    """Name -> description of each "name: description", which goes on in lines that are indented deeper."""
    parts: dict[str, list[str]] = {}
    indent, name = "", ""
    for line in filter(str.strip, lines):
        begins = _ARGUMENT.match(line)
        if begins and (not name or not re.match(re.escape(indent) + r"[ \t]", line)):
            indent, name = begins[1], begins[2]
            parts[name] = [begins[3]]
        elif name:
            parts[name].append(line)
    return {name: " ".join(filter(None, map(str.strip, texts))) for name, texts in parts.items()}
