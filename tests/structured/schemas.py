"""Random JSON schemas of the kinds that people write; most of their answers are short."""

import random
from typing import Any

KEYS = ["name", "id", "items", "城市", "名字", "a key", "x-y", "Ünit", "$price", '"quoted"']
FORMATS = ["date-time", "time", "date", "email", "uuid", "ipv4", "hostname"]
PATTERNS = ["^[a-z]{1,4}$", r"^\d{3}-\d{4}$", "^(red|绿|blue)$", "^[A-Z][a-z]?$"]


def random_schema(seed: int) -> dict[str, Any]:
    """An object or an array at the top, most often; every tenth is recursive."""
    rng = random.Random(seed)
    if seed % 10 == 0:
        node = _object(rng, 1)
        node["properties"]["next"] = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
        return {"$defs": {"node": node}, "$ref": "#/$defs/node", "title": "a linked list"}
    return rng.choice([_object, _object, _object, _array, _union])(rng, 2)


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    nested = [_object, _array, _union] if depth else []
    return rng.choice([_string, _string, _number, _enum, _constant, *nested])(rng, depth)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    keys = rng.sample(KEYS, rng.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {key: _value(rng, depth - 1) for key in keys},
        "required": rng.sample(keys, rng.randint(0, len(keys))),
        "additionalProperties": False,
    }
    if rng.random() < 0.3:
        schema["description"] = "What this is"
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {
            "type": "array",
            "prefixItems": [_value(rng, depth - 1) for _ in range(2)],
            "items": False,
            "minItems": 2,
        }
    least = rng.randint(0, 2)
    return {"type": "array", "items": _value(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"type": rng.sample(["boolean", "null", "integer"], 2), "maximum": 99, "minimum": 0}
    return {"anyOf": [_value(rng, depth - 1) for _ in range(rng.randint(2, 3))]}


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"minLength": 1, "maxLength": 9},
        {"pattern": rng.choice(PATTERNS)},
        {"format": rng.choice(FORMATS)},
    ]
    return {"type": "string", **rng.choice(kinds)}


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)},
            {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 12, "multipleOf": 3},
            {"type": "number", "minimum": low, "maximum": low + 1},
            {"type": "boolean"},
        ]
    )


def _enum(rng: random.Random, _: int) -> dict[str, Any]:
    values = ["red", "绿", 1, 2.5, None, True, {"a": [1]}, ["x"], 'a "b"\n', ""]
    return {"enum": rng.sample(values, rng.randint(1, 4))}


def _constant(rng: random.Random, _: int) -> dict[str, Any]:
    return {"const": rng.choice(["fixed", "固定", 7, False, {"k": None}])}
