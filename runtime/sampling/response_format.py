"""Other libraries' forms of a constraint, as settings: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..common.shown import shown
from .settings import CONSTRAINTS

RESPONSE_FORMAT, STRUCTURED_OUTPUTS = "response_format", "structured_outputs"
FORMS = (RESPONSE_FORMAT, STRUCTURED_OUTPUTS)
# The attributes of vLLM's StructuredOutputsParams, and the settings that they are here.
_VLLM: dict[str, str] = {"json": "json_schema", **{name: name for name in CONSTRAINTS if name != "json_schema"}}


def constraint_of(form: str, value: Any) -> dict[str, Any]:
    """The settings of a constraint that is given in another library's form, "response_format" or "structured_outputs".

    Raises ValueError, naming the form, for a value that is none.
    """
    return _of_response_format(value) if form == RESPONSE_FORMAT else _of_structured_outputs(value)


def _of_response_format(value: Any) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise ValueError(
            f"{RESPONSE_FORMAT} must be {{'type': 'text'}}, {{'type': 'json_object'}} or {{'type': 'json_schema', "
            f"'json_schema': {{'schema': ...}}}}; got {shown(value)}"
        )
    inner = value.get("json_schema")
    if not isinstance(inner, Mapping) or inner.get("schema") is None:
        raise ValueError(f"{RESPONSE_FORMAT} has no schema at ['json_schema']['schema']: {shown(value)}")
    return {"json_schema": inner["schema"]}


def _of_structured_outputs(value: Any) -> dict[str, Any]:
    """From vLLM's StructuredOutputsParams, or a mapping with its fields."""
    fields: Mapping[str, Any] = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    used = {name: each for name, each in fields.items() if each is not None and each is not False}
    given = {_VLLM.get(name, name): each for name, each in used.items()}
    if len(given) != 1 or not given.keys() <= {*CONSTRAINTS}:
        raise ValueError(
            f"{STRUCTURED_OUTPUTS} must have one of {', '.join(_VLLM)}, and nothing else; got {shown(value)}"
        )
    return given
