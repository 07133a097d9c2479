"""A quantised weight as the ops take it, in the place of a tensor: 4 or 8 bits for each number.

    w[o, c] = (q[o, c] - zero[o, g]) * scale[o, g] + minimum[o, g]      g = c // group, in float32

    kind      q
    int4      0 to 15
    int8      -128 to 127
    float8    e4m3, whose zero is 0

Most weights have no minimum.

Numbers are packed so that a kernel gets all numbers of one field of its words from one group of columns, and turns two
at once into 16-bit floats without moving bits between them:

    words [O, N] int16: field f (of 4 bits or 8, the lowest first) of word b * L + j is column (b * F + f) * L + j
    L     the width of a slice: 16, 32, 64 or 128 columns
    F     the fields of a word: 4 or 2

The last F * L columns may be padding, which x does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["int4", "int8", "float8"]
BITS = {"int4": 4, "int8": 8, "float8": 8}
SLICES = (128, 64, 32, 16)
_ZERO_BITS = 13  # of a float32 scale that holds 16 bits' worth: those of its mantissa that float16 does not have


class Form(NamedTuple):
    """How the numbers of a weight are stored.

    Attributes:
        kind: what q is.
        columns: of the weight.
        group: columns with one scale; 0 for one scale of all columns, with `zero`.
        zero: the zero point of all groups; None where the scales hold one for each group.
        minimum: whether there is one.
    """

    kind: Kind
    columns: int
    group: int
    zero: int | None
    minimum: bool = False

    @property
    def fields(self) -> int:
        """The numbers in a word."""
        return 16 // BITS[self.kind]

    @property
    def width(self) -> int:
        """The columns of a slice. Raises ValueError if groups are no multiple of 16 columns."""
        fitting = [width for width in SLICES if self.group % width == 0]
        if not fitting:
            raise ValueError(f"groups of {self.group} columns cannot be packed: they must be multiples of {SLICES[-1]}")
        whole = [width for width in fitting if self.columns % (self.fields * width) == 0]
        return whole[0] if whole else fitting[-1]

    @property
    def words(self) -> int:
        """The words of a row."""
        block = self.fields * self.width
        return -(-self.columns // block) * self.width

    @property
    def groups(self) -> int:
        """The scales of a row."""
        return self.columns // self.group if self.group else 1


class Layout(NamedTuple):
    """Form and order of a QuantisedWeight."""

    form: Form
    order: Tensor | None

    def equals(self, other: Layout) -> bool:
        """Whether the rows of both can be the rows of one weight."""
        if self.order is None or other.order is None:
            return self.form == other.form and self.order is other.order
        return self.form == other.form and torch.equal(self.order, other.order)


class QuantisedWeight(NamedTuple):
    """A weight [O, C] in the layout above.

    Attributes:
        form: of all its rows.
        words: [O, N] int16.
        scales: [G, O] float32. Without form.zero the low 13 bits of each hold the zero point, in two's complement, and
            the scale is the number without them.
        minimum: [G, O] float32, or None.
        order: [C] int64. Column c of the weight multiplies column order[c] of x; None: they have the same order.
    """

    form: Form
    words: Tensor
    scales: Tensor
    minimum: Tensor | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.words.shape[0], self.form.columns))

    def rows(self, first: int, end: int) -> QuantisedWeight:
        """Rows `first` to `end` - 1 of the weight."""
        minimum = None if self.minimum is None else self.minimum[:, first:end]
        return self._replace(words=self.words[first:end], scales=self.scales[:, first:end], minimum=minimum)

    def dense(self) -> Tensor:
        """The weight in float32, in the order of x's columns."""
        q, scale, zero = self.unpacked()
        weight = (q.float().unflatten(1, (self.form.groups, -1)) - zero[:, :, None]) * scale[:, :, None]
        if self.minimum is not None:
            weight += self.minimum.T[:, :, None]
        weight = weight.flatten(1)
        return weight if self.order is None else torch.empty_like(weight).index_copy_(1, self.order, weight)

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `pack` packs: q [O, C]; scale and zero [O, G] in float32."""
        q = _unpacked(self.words, self.form)[:, : self.form.columns]
        scales = self.scales.T.contiguous()
        if self.form.zero is not None:
            return q, scales, torch.full_like(scales, self.form.zero)
        bits, unused = scales.view(torch.int32), 32 - _ZERO_BITS
        return q, ((bits >> _ZERO_BITS) << _ZERO_BITS).view(torch.float32), ((bits << unused) >> unused).float()


Weight = Tensor | QuantisedWeight  # what a linear op takes


def pack(
    kind: Kind,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | int,
    minimum: Tensor | None = None,
    order: Tensor | None = None,
) -> QuantisedWeight:
    """The weight (q - zero) * scale + minimum.

    Args:
        kind: of q.
        q: [O, C] integers in the range of the kind, or float8_e4m3fn.
        scale: [O, G] of any floating-point dtype; columns g * C / G to (g + 1) * C / G - 1 have scale g.
        zero: [O, G] integers of -4096 to 4095, where scales have at most 11 significant bits; or one integer for all.
        minimum: [O, G] of any floating-point dtype.
        order: see QuantisedWeight.

    Raises:
        ValueError: groups that are no multiple of 16 columns, scales that leave no room for zero points, or NaNs.
    """
    if kind == "float8" and not q.is_meta and q.float().isnan().any():
        raise ValueError("a number is NaN")
    columns, groups = q.shape[1], scale.shape[1]
    constant = zero if isinstance(zero, int) else None
    one_scale = groups == 1 and constant is not None and minimum is None
    form = Form(kind, columns, 0 if one_scale else columns // groups, constant, minimum is not None)
    scales = scale.float().T.contiguous()
    if isinstance(zero, Tensor):
        bits, mask = scales.view(torch.int32), (1 << _ZERO_BITS) - 1
        if (bits & mask).any():
            raise ValueError("the scales have more than 11 significant bits, which leaves no room for zero points")
        scales = (bits | (zero.T.int() & mask)).view(torch.float32)
    minima = None if minimum is None else minimum.float().T.contiguous()
    return QuantisedWeight(form, _packed(q, form), scales, minima, order)


def joined(parts: Sequence[QuantisedWeight]) -> QuantisedWeight:
    """The rows of all parts, which have one layout, in order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    minima = [part.minimum for part in parts if part.minimum is not None]
    return first._replace(
        words=torch.cat([part.words for part in parts]),
        scales=torch.cat([part.scales for part in parts], 1),
        minimum=torch.cat(minima, 1) if minima else None,
    )


def _packed(q: Tensor, form: Form) -> Tensor:
    """[O, C] -> words [O, N]."""
    numbers = q.view(torch.uint8) if form.kind == "float8" else q.to(torch.int16)
    bits, width = BITS[form.kind], form.width
    padded = torch.nn.functional.pad(numbers, (0, form.words * form.fields - form.columns))
    fields = padded.unflatten(1, (-1, form.fields, width)).to(torch.int16) & ((1 << bits) - 1)
    words = torch.zeros_like(fields[:, :, 0])
    for field in range(form.fields):
        words |= fields[:, :, field] << (bits * field)
    return words.flatten(1)


def _unpacked(words: Tensor, form: Form) -> Tensor:
    """Words [O, N] -> [O, N * fields]."""
    low, high = words.view(torch.uint8).unflatten(1, (-1, form.width, 2)).unbind(-1)  # the bytes of each word
    if form.kind == "int4":
        return torch.stack([low & 15, low >> 4, high & 15, high >> 4], 2).flatten(1)
    numbers = torch.stack([low, high], 2).flatten(1)
    return numbers.view(torch.int8 if form.kind == "int8" else torch.float8_e4m3fn)
