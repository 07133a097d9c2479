"""Formats whose 4 bits are an index into sixteen values."""

from __future__ import annotations

import torch
from torch import Tensor

# E2M1: a sign, two bits of exponent and one of mantissa (OCP Microscaling Formats, v1.0).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_VALUES = (*_E2M1, *(-value for value in _E2M1))


def looked_up(values: Tensor, packed: Tensor, *, low_first: bool) -> Tensor:
    """values[field] of the two fields of each byte.

    Args:
        values: 16 numbers.
        packed: [..., N] uint8.
        low_first: whether the low field is the first.

    Returns:
        [..., 2 N] of the dtype of values.
    """
    low, high = packed & 15, packed >> 4
    fields = torch.stack([low, high] if low_first else [high, low], -1).flatten(-2)
    return values.to(packed.device)[fields.long()]
