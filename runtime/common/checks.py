"""Checks of arguments: integers, numbers, switches, token ids. NumPy's and torch's scalars count as Python's own.

A `check_` function returns the value as plain Python, so that stored values compare, print and pickle the same whatever
library they came from. It raises one ValueError that names the argument and shows the value.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .shown import shown

if TYPE_CHECKING:
    from torch import Tensor


def as_int(value: Any) -> int | None:
    """`value` as an int; None if it is no integer. A bool is none, nor is a float that happens to be whole."""
    if type(value) is int:  # a long prompt is thousands of them
        return value
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_ints(values: Iterable[Any]) -> list[int] | None:
    """`values` as ints; None if any of them is no integer."""
    numbers: list[int] = []
    for value in values:
        if (number := as_int(value)) is None:
            return None
        numbers.append(number)
    return numbers


def as_number(value: Any) -> int | float | None:
    """`value` as an int or float; None if it is no finite number. A bool is none; a Decimal or Fraction is a float."""
    plain = _plain(value)
    try:
        plain = float(plain) if isinstance(plain, (Decimal, Fraction)) else plain
        return plain if is_number(plain) and math.isfinite(plain) else None
    except (OverflowError, ValueError):  # beyond any float; a signalling NaN
        return None


def _plain(value: Any) -> Any:
    """A scalar of NumPy or torch, or an array or tensor [], as Python's own; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def is_int(value: object) -> bool:
    """Whether `value` is Python's own int, as a JSON file gives it, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether `value` is Python's own int or float, as a JSON file gives it, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_unicode(text: str) -> bool:
    """Whether a text has an encoding: a lone surrogate, which JSON can write as "\\ud800", has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high], both included; high None: the largest of 64 bits."""
    number = as_int(value)
    most = 2**63 - 1 if high is None else high
    if number is None or not low <= number <= most:
        both = high is not None or (number or 0) > most
        wanted = f"an integer in [{low}, {most}]" if both else f"an integer >= {low}"
        raise ValueError(f"{name} must be {wanted}; got {shown(value)}")
    return number


def check_number(name: str, value: object, interval: str) -> int | float:
    """`value` as an int or float in `interval`, such as "(0, 1]", which excludes 0 and includes 1."""
    number = as_number(value)
    low, high = map(float, interval[1:-1].split(","))
    inside = number is not None and (
        low < number < high or (number == low and interval[0] == "[") or (number == high and interval[-1] == "]")
    )
    if number is None or not inside:
        raise ValueError(f"{name} must be a number in {interval}; got {shown(value)}")
    return number


def check_float32(name: str, value: object, interval: str) -> float:
    """`value` as a float in `interval` that float32, the dtype of the device's tensors, does not make infinite or 0."""
    number = float(check_number(name, value, interval))
    try:
        (stored,) = struct.unpack("f", struct.pack("f", number))
    except OverflowError:
        stored = math.inf
    if math.isinf(stored) or (stored == 0) != (number == 0):
        raise ValueError(f"{name} must be a number that float32 can hold; got {shown(value)}")
    return number


def check_bool(name: str, value: object, wanted: str = "True or False") -> bool:
    """`value` as a bool; a number is none."""
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise ValueError(f"{name} must be {wanted}; got {shown(value)}")
    return plain


def check_sequence(name: str, values: object) -> tuple[Any, ...]:
    """The elements of a list, an array, a set, ...; a string is no sequence here."""
    scalar = getattr(values, "ndim", 1) == 0  # a tensor [] counts as Iterable
    if scalar or isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence; got {shown(values)}")
    return tuple(values.tolist() if hasattr(values, "tolist") else values)


def as_list(value: Any) -> list[Any]:
    """A list of plain Python values: from one value, a list, tuple, array or tensor of them, or None for none."""
    value = value.tolist() if hasattr(value, "tolist") else value
    values = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    return [each.item() if hasattr(each, "item") else each for each in values]


def check_ids(name: str, ids: Iterable[object], vocab_size: int) -> None:
    """Raises ValueError for the first of `ids` that is no int in [0, vocab_size)."""
    for token in ids:
        if not is_int(token) or not 0 <= token < vocab_size:  # type: ignore[operator]
            raise ValueError(f"{name} holds {shown(token)}, which is outside the vocabulary of {vocab_size}")


def check_batch(name: str, ids: Tensor) -> None:
    """Raises ValueError unless `ids` is an integer tensor [B, T] that is not empty."""
    if ids.dim() != 2 or ids.is_floating_point() or "bool" in str(ids.dtype) or ids.numel() == 0:
        raise ValueError(f"{name} must be integers [B, T] and not empty; it is {list(ids.shape)} of {ids.dtype}")


def check_batch_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError unless `ids` is an integer tensor [B, T], not empty, of ids in [0, vocab_size)."""
    check_batch(name, ids)
    check_ids(name, [int(bound) for bound in ids.aminmax()], vocab_size)
