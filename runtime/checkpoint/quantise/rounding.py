"""Rounding a weight to integers of 4 or 8 bits, or to fp8, with scales in the weight's own dtype.

    form                q                         scale                          zero
    int4                round(w / scale) + zero   (max - min) / 15, in groups    round(-min / scale)
    int4, symmetric     round(w / scale) + zero   max |w| / 7.5, in groups       8
    int8                round(w / scale)          max |w| / 127, per output
    fp8                 float8_e4m3fn(w / scale)  max |w| / 448, per output

The range of a group includes 0. The scale is rounded to its dtype first and q comes from the rounded scale, so that the
errors of both do not add up.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...common.shown import shown
from ..quantised.integers import Integers

Form = Literal["int4", "int8", "fp8"]
FORMS: tuple[Form, ...] = ("int4", "int8", "fp8")
GROUPS = (128, 64, 32)  # sizes of a group, those that kernels read
HEAD = "lm_head"
_PROJECTION = "_proj"
_FP8_MAX = 448.0
_CHUNK = 2**24  # elements that are in float32 at a time


def form_of(name: str, form: Form) -> Form | None:
    """The form of a layer in a model that is quantised to `form`; None for one that stays as it is.

    The head is int8 in every model: fp8 costs it 30 times as much accuracy as int8, and 4 bits 100 times.

    Args:
        name: of the layer, or of its weight.
    """
    layer = name.removesuffix(".weight")
    if layer == HEAD:
        return "int8"
    return form if layer.endswith(_PROJECTION) else None


def to_integers(
    name: str, weight: Tensor, scale_dtype: torch.dtype, form: Form, group: int, symmetric: bool
) -> Integers:
    """A weight rounded to a form.

    Args:
        name: for errors.
        weight: [O, I], of any floating-point dtype.
        scale_dtype: what scales are stored in.
        form: see the module, and `form_of`.
        group: for int4: the number of inputs that share a scale. If it does not divide I, the largest smaller one of
            GROUPS that does.
        symmetric: int4 without zero points of its own.

    Raises:
        ValueError: the weight contains inf or NaN; or, for int4, no group size divides its inputs. The message names
            the weight.
    """
    size = group_size(name, weight.shape[1], group) if form == "int4" else -1
    parts = []
    for rows in weight.split(max(_CHUNK // weight.shape[1], 1)):
        rows = rows.float()
        if not rows.isfinite().all():
            raise ValueError(f"{shown(name)} contains inf or NaN, which cannot be quantised")
        if form == "int4":
            parts.append(int4(rows, scale_dtype, size, symmetric))
        else:
            parts.append(int8(rows, scale_dtype) if form == "int8" else fp8(rows, scale_dtype))
    zeros = [part.zero for part in parts if isinstance(part.zero, Tensor)]
    return parts[0]._replace(
        q=torch.cat([part.q for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else parts[0].zero,
    )


def group_size(name: str, inputs: int, wanted: int) -> int:
    """`wanted`, or the largest smaller one of GROUPS, that divides `inputs`. Raises ValueError if there is none."""
    for size in (wanted, *(size for size in GROUPS if size < wanted)):
        if inputs % size == 0:
            return size
    raise ValueError(f"{shown(name)} has {inputs} inputs, and no group of 4-bit weights that divides them: use 8 bits")


def int4(weight: Tensor, scale_dtype: torch.dtype, group: int, symmetric: bool) -> Integers:
    """q and zero are from 0 to 15. weight: [O, I] float32; `group` divides I."""
    groups = weight.unflatten(1, (-1, group))
    if symmetric:
        scale = _stored(groups.abs().amax(-1) / 7.5, scale_dtype)
        q = (groups / scale.float()[..., None]).round() + 8
        return Integers(q.clamp(0, 15).flatten(1).to(torch.uint8), scale, 8, bits=4)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = _stored((high - low) / 15, scale_dtype)
    zero = (-low / scale.float()).round().clamp(0, 15)
    q = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15)
    return Integers(q.flatten(1).to(torch.uint8), scale, zero.to(torch.uint8), bits=4)


def int8(weight: Tensor, scale_dtype: torch.dtype) -> Integers:
    """Symmetric: q is int8 from -127 to 127. weight: [O, I] float32."""
    scale = _stored(weight.abs().amax(1, keepdim=True) / 127, scale_dtype)
    return Integers((weight / scale.float()).round().clamp(-127, 127).to(torch.int8), scale)


def fp8(weight: Tensor, scale_dtype: torch.dtype) -> Integers:
    """q is float8_e4m3fn. weight: [O, I] float32."""
    scale = _stored(weight.abs().amax(1, keepdim=True) / _FP8_MAX, scale_dtype)
    return Integers((weight / scale.float()).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), scale)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale in the dtype that it is stored in. That of a group of zeros is 1; none is less than a normal number."""
    scale = torch.where(scale == 0, 1.0, scale)
    return scale.clamp(torch.finfo(dtype).tiny, torch.finfo(dtype).max).to(dtype)
