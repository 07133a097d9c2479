"""Integers with a scale and a zero point for each group of inputs: w = (q - zero) * scale."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....kernels.quantised import Kind, Layout, QuantisedWeight, Weight, joined, pack

_PACKED_AT_ONCE = 1 << 24  # numbers, which take several times their memory while they are packed


class Integers(NamedTuple):
    """A quantised weight [O, I]: w = (q - zero) * scale + minimum.

    Attributes:
        q: [O, I] uint8 or int8; or float8_e4m3fn in the place of integers.
        scale: [O, G], of any floating-point dtype.
        zero: [O, G] of the dtype of q, or one number for all groups.
        bits: of the integers, whose range has 2^bits values: from 0 in uint8, from -2^(bits - 1) in int8.
        minimum: [O, G] float32, or None; in the order of the inputs only.
        group_of: [I], the group of each input; None: I / G inputs in sequence are a group.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | int = 0
    bits: int = 8
    minimum: Tensor | None = None
    group_of: Tensor | None = None

    def weight(self) -> Tensor:
        """[O, I] float32, without any rounding but that of the product."""
        weight = multiplied(self.q, self.scale, self.zero, self.group_of)
        if self.minimum is None:
            return weight
        return weight.unflatten(1, (self.scale.shape[1], -1)).add_(self.minimum[:, :, None]).flatten(1)

    def as_weight(self, *, packed: bool) -> Weight:
        """What the ops take: a quantised weight, or [O, I] in float32. Raises ValueError for NaNs."""
        return self._packed() if packed else self.weight()

    def layout(self) -> Layout | None:
        """That of the quantised weight, or None if there is none. q may be on the meta device."""
        try:
            weight = self._packed()
        except ValueError:
            return None
        return Layout(weight.form, weight.order)

    def _packed(self) -> QuantisedWeight:
        """Raises ValueError if the ops do not take such a weight."""
        order = None
        if self.group_of is not None:
            order = torch.argsort(self.group_of, stable=True)
            sizes = torch.bincount(self.group_of, minlength=self.scale.shape[1])
            if (sizes != sizes[0]).any():
                raise ValueError("its groups have different sizes")
        step = max(_PACKED_AT_ONCE // self.q.shape[1], 1)
        return joined([self._packed_rows(slice(row, row + step), order) for row in range(0, len(self.q), step)])

    def _packed_rows(self, rows: slice, order: Tensor | None) -> QuantisedWeight:
        q, scale = self.q[rows], self.scale[rows]
        zero = self.zero[rows] if isinstance(self.zero, Tensor) else self.zero
        minimum = None if self.minimum is None else self.minimum[rows]
        if order is not None:
            q = q[:, order.to(q.device)]
        kind: Kind = "float8" if q.dtype == torch.float8_e4m3fn else "int4" if self.bits == 4 else "int8"
        # int4 begins at 0, and int8 at -128.
        shift = {torch.uint8: 0, torch.int8: 8}[q.dtype] if kind == "int4" else -128 * (q.dtype == torch.uint8)
        if shift:
            q = q.to(torch.int16) + shift
            zero = zero.to(torch.int16) + shift if isinstance(zero, Tensor) else zero + shift
        if kind != "int4" and isinstance(zero, int) and zero != 0:
            zero = torch.full_like(scale, zero, dtype=torch.int16)
        return pack(kind, q, scale, zero, minimum, order)


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
