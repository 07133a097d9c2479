"""Integers with a scale and a zero point for each group of inputs: w = (q - zero) * scale."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Integers(NamedTuple):
    """A quantised weight [O, I]: w = (q - zero) * scale. G groups of I / G inputs in sequence.

    Attributes:
        q: [O, I] uint8 or int8, or float8_e4m3fn in the place of integers.
        scale: [O, G], of any floating-point dtype.
        zero: [O, G] of the dtype of q; None for 0.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def weight(self) -> Tensor:
        """[O, I] float32, without any rounding but that of the product."""
        return multiplied(self.q, self.scale, 0 if self.zero is None else self.zero)


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """The unsigned fields of `bits` bits in int32 words, the lowest first.

    Args:
        words: int32.
        dim: the dimension that gets 32 / bits times as long.

    Returns:
        uint8.
    """
    dim %= words.dim()
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    shifts = shifts.view(-1, *[1] * (words.dim() - dim - 1))
    fields = (words.unsqueeze(dim + 1) >> shifts) & (2**bits - 1)
    return fields.to(torch.uint8).flatten(dim, dim + 1)


def multiplied(q: Tensor, scale: Tensor, zero: Tensor | int = 0, group_of: Tensor | None = None) -> Tensor:
    """(q - zero) * scale, rounded once, to float32.

    Args:
        q: [O, I] integers of at most 8 bits, or floating-point numbers of at most 8.
        scale, zero: [O, G], or an int for all zeros; scales of any floating-point dtype.
        group_of: [I], the group of each input; None: I / G inputs in sequence are a group.

    Returns:
        [O, I] float32.
    """
    difference, scale = q.float(), scale.float()
    zeros = zero.float() if isinstance(zero, Tensor) else torch.full_like(scale, zero)
    if group_of is not None:
        index = group_of.long()
        return (difference - zeros[:, index]) * scale[:, index]
    grouped = difference.unflatten(1, (scale.shape[1], -1))
    return ((grouped - zeros[:, :, None]) * scale[:, :, None]).flatten(1)


def check_groups(name: str, group_of: Tensor, count: int, in_sequence: bool) -> None:
    """Raises ValueError unless `group_of` [I] names groups below `count`, and, if in_sequence, one after the other."""
    low, high = (int(bound) for bound in group_of.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name} holds {low if low < 0 else high}; the layer has groups 0 to {count - 1}")
    expected = torch.arange(len(group_of), dtype=torch.int64, device=group_of.device) // (len(group_of) // count)
    if in_sequence and not torch.equal(group_of.long(), expected):
        raise ValueError(f"{name} reorders the inputs, and the configuration says that they are in order (desc_act)")
