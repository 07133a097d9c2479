"""What a caller gives as tools and as tool_choice, and the schema of a forced call."""

from enum import Enum
from typing import Literal

import pytest

from internlm3.runtime.tools.forced import call_schema
from internlm3.runtime.tools.formats import HERMES, INTERNLM
from internlm3.runtime.tools.schemas import allowed_tools, tool_schemas
from internlm3.tests.support.functions import BAD


class Unit(Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


def weather(city: str, days: int = 1, unit: Unit | None = None, detail: Literal["low", "high"] = "low") -> str:
    """Forecasts the weather.

    Args:
        city: the city
        days: how many
        unit: of the temperature
        detail: how much
    """
    return city


def clock() -> str:
    """The time."""
    return "12:00"


NAMED = {"type": "function", "function": {"name": "clock"}}


def test_functions_and_schemas():
    assert tool_schemas(None) == tool_schemas([]) == []
    assert tool_schemas([weather, {"type": "function", "function": {"name": "f", "parameters": {}}}]) == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Forecasts the weather.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string", "description": "the city"},
                        "days": {"type": "integer", "description": "how many"},
                        "unit": {
                            "type": "string", "enum": ["celsius", "kelvin"], "nullable": True,
                            "description": "of the temperature",
                        },
                        "detail": {"type": "string", "enum": ["low", "high"], "description": "how much"},
                    },
                    "required": ["city"],
                },
                "return": {"type": "string"},
            },
        },
        {"type": "function", "function": {"name": "f", "parameters": {}}},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        (weather, "tools must be a list"),
        ({"type": "function"}, "tools must be a list"),
        (["weather"], r"tools\[0\] must be a Python function, or .* got 'weather'"),
        ([clock, {"name": "f", "parameters": {}}], r"tools\[1\] must be"),
        ([{"type": "function", "function": {"name": ""}}], r"tools\[0\] must be"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": [1]}}],
            "parameters of 'f' must be a JSON schema",
        ),
        (
            [{"type": "function", "function": {"name": "f", "x": object()}}],
            r"tools\[0\]: a chat template is given JSON",
        ),
        ([clock, NAMED], "there are 2 with the name 'clock'"),
        ([BAD[0]], "needs a docstring"),
    ],
)
def test_bad_tools_are_named(tools, says):
    with pytest.raises(ValueError, match=says):
        tool_schemas(tools)


def _several(*city: str) -> str:
    """Forecasts.

    Args:
        city: the city
    """
    return ""


def _any(**city: str) -> str:
    """Forecasts.

    Args:
        city: the city
    """
    return ""


def _unnamed(city: str, /) -> str:
    """Forecasts.

    Args:
        city: the city
    """
    return ""


@pytest.mark.parametrize("tool", [_several, _any, _unnamed])
def test_a_function_must_take_its_arguments_by_name(tool):
    with pytest.raises(ValueError, match=rf"tools\[1\] '{tool.__name__}': a call names its arguments, and 'city' is "):
        tool_schemas([clock, tool])


def test_which_tools_must_be_called():
    schemas = tool_schemas([weather, clock])
    for choice in ("auto", "none", None):
        assert allowed_tools(schemas, choice) is allowed_tools([], choice) is None
    assert allowed_tools(schemas, "required") == schemas
    assert allowed_tools(schemas, NAMED) == schemas[1:]
    for choice in (
        "any",
        "clock",
        1,
        {"name": "clock"},
        {"type": "function"},
        {"type": "function", "function": "clock"},
    ):
        with pytest.raises(ValueError, match="tool_choice must be"):
            allowed_tools(schemas, choice)
    for choice in ("required", NAMED):
        with pytest.raises(ValueError, match="needs tools, and there are none"):
            allowed_tools([], choice)
    with pytest.raises(ValueError, match="names 'clock', which is none of the tools: weather"):
        allowed_tools(schemas[:1], NAMED)


NODE = {"$ref": "#/$defs/Node"}
TREE = {
    "type": "object",
    "$defs": {"Node": {"type": "object", "properties": {"next": NODE}, "additionalProperties": False}},
    "properties": {"root": NODE, "whole": {"$ref": "#"}, "$ref": {"type": "integer"}},
    "required": ["root"],
}
GO = {
    "type": "function",
    "function": {
        "name": "go",
        "parameters": {
            "anyOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}]
        },
    },
}
GROW = {"type": "function", "function": {"name": "grow", "parameters": TREE}}


@pytest.mark.parametrize("format", [INTERNLM, HERMES], ids=["internlm", "hermes"])
def test_the_schema_of_a_forced_call(format):
    """By jsonschema: it has the right calls and no others, and references to a tool's own definitions lead there."""
    jsonschema = pytest.importorskip("jsonschema")
    schemas = tool_schemas([weather, clock, GROW, GO])
    good = [
        ("weather", {"city": "上海", "days": 2, "unit": None}),
        ("weather", {"city": "上海", "unit": "kelvin"}),
        ("clock", {}),
        ("go", {"a": 1}),
        ("go", {"b": 1}),
        ("grow", {"root": {"next": {"next": {}}}, "whole": {"root": {}}, "$ref": 1}),
    ]
    bad = [
        ("weather", {}), ("weather", {"city": 1}), ("weather", {"city": "", "unit": "x"}), ("sun", {"city": ""}),
        ("clock", []), ("clock", {"zone": 1}), ("weather", {"city": "", "country": ""}),
        ("grow", {"root": {"next": {"other": {}}}}), ("grow", {"root": {}, "whole": {}}),
        ("grow", {"root": {}, "$ref": "x"}), ("go", {}),
    ]  # fmt: skip
    validator = jsonschema.Draft202012Validator(call_schema(schemas, format))

    def written(name, arguments):
        return {format.name: name, format.arguments: arguments}

    for name, arguments in good:
        assert validator.is_valid(written(name, arguments)), (name, arguments)
        [own] = [schema for schema in schemas if schema["function"]["name"] == name]
        alone = jsonschema.Draft202012Validator(call_schema([own], format))
        assert alone.is_valid(written(name, arguments))
        assert not alone.is_valid(written("other", arguments))
    for name, arguments in bad:
        assert not validator.is_valid(written(name, arguments)), (name, arguments)
    assert not validator.is_valid({**written("clock", {}), "more": 1})
    assert not validator.is_valid({format.name: "clock"})
