"""Checks of sampling settings: each value becomes the one form that SamplingParams stores, or a ValueError."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ..common.checks import as_int, check_bool, check_float32, check_int, check_sequence, is_unicode
from ..common.shown import one_line, shown
from .settings import Setting

TokenIds = tuple[int, ...]


def check(setting: Setting, value: Any) -> Any:
    """`value` as SamplingParams stores it. Raises ValueError, naming the setting, for what it cannot be."""
    if value is None and setting.none:
        return () if setting.type == "strings" else None
    return _CHECKS[setting.type](setting, value)


def _integer(setting: Setting, value: Any) -> int:
    low, high = setting.range[1:-1].split(", ")
    return check_int(setting.name, value, int(low), None if high == "inf" else int(high))


def _strings(setting: Setting, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else check_sequence(setting.name, value)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{setting.name} must be a string or strings of at least one character; got {shown(text)}")
    return texts


def _token_ids(name: str, value: Any) -> TokenIds:
    return tuple(check_int(f"{name}: a token id", token, 0) for token in check_sequence(name, value))


def _token_ids_or_one(setting: Setting, value: Any) -> TokenIds:
    one = setting.name == "forced_eos_token_id" and as_int(value) is not None
    ids = _token_ids(setting.name, (value,) if one else value)
    if setting.name == "allowed_token_ids" and not ids:
        raise ValueError("allowed_token_ids must name at least one token, or be None for all; got none")
    return ids


def _token_biases(setting: Setting, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{setting.name} must be a mapping from token id to bias; got {shown(value)}")
    return {
        check_int(f"{setting.name}: a token id", token, 0): check_float32(
            f"{setting.name}[{token}]", bias, "(-inf, inf)"
        )
        for token, bias in value.items()
    }


def _sequence(name: str, value: Any) -> TokenIds:
    if not (ids := _token_ids(name, value)):
        raise ValueError(f"{name} must be sequences of at least one token id; got {shown(value)}")
    return ids


def _sequences(setting: Setting, value: Any) -> tuple[TokenIds, ...]:
    return tuple(_sequence(setting.name, sequence) for sequence in check_sequence(setting.name, value))


def _sequence_biases(setting: Setting, value: Any) -> dict[TokenIds, float]:
    """From a mapping, or from a list of [sequence, bias]: JSON has no sequences as keys."""
    name = setting.name
    pairs = [*value.items()] if isinstance(value, Mapping) else check_sequence(name, value)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{name} must be a mapping from sequences to biases, or a list of pairs; got {shown(value)}")
    for sequence, bias in pairs:
        if bias != -math.inf:  # which forbids the token
            check_float32(f"{name}[{sequence}]", bias, "[-inf, inf)")
    return {_sequence(name, sequence): float(bias) for sequence, bias in pairs}


def _start_and_factor(setting: Setting, value: Any) -> tuple[float, float]:
    name = setting.name
    pair = check_sequence(name, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be (start, factor); got {shown(value)}")
    start = check_float32(f"{name}: start", pair[0], "[0, inf)")
    return start, check_float32(f"{name}: factor", pair[1], "(0, inf)")


def _text(setting: Setting, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{setting.name} must be a string of at least one character; got {shown(value)}")
    return _unicode(setting.name, value)


def _texts(setting: Setting, value: Any) -> tuple[str, ...]:
    texts = check_sequence(setting.name, value)
    if not texts:
        raise ValueError(f"{setting.name} must name at least one string; got none")
    return tuple(_text(setting, text) for text in texts)


def _unicode(name: str, text: str) -> str:
    if not is_unicode(text):
        raise ValueError(f"{name} has a lone surrogate, which is no valid Unicode: {shown(text)}")
    return text


def _json_schema(setting: Setting, value: Any) -> str:
    """The JSON text of a schema, of a text of it, or of that which a Pydantic model has; keys stay in their order."""
    name = setting.name
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {one_line(str(error))}; got {shown(value)}") from None
    if not isinstance(schema, Mapping):
        raise ValueError(f"{name} must be a JSON object, as a dict or a string; got {shown(value)}")
    return _unicode(name, text)


_CHECKS: dict[str, Callable[[Setting, Any], Any]] = {
    "integer": _integer,
    "number": lambda setting, value: check_float32(setting.name, value, setting.range),
    "bool": lambda setting, value: check_bool(setting.name, value),
    "strings": _strings,
    "token ids": _token_ids_or_one,
    "token biases": _token_biases,
    "sequences": _sequences,
    "sequence biases": _sequence_biases,
    "start and factor": _start_and_factor,
    "text": _text,
    "texts": _texts,
    "JSON schema": _json_schema,
}
