"""A quantised weight as a matrix of floats, for products that are bound by arithmetic.

    w[o, c] = (q[o, c] - zero[o, g]) * scale[o, g] + minimum[o, g]      words [O, N] -> w [O, C], rounded to the dtype

Bytes at InternLM3-8B's shapes (gate and up, 20480 x 4096): 45 MB read from 4 bits in groups of 128, 168 MB written.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..quantised import QuantisedWeight
from .fields import constants, field_of, scale_and_zero
from .launch import cdiv, jit, options

ROWS, NUM_WARPS = 32, 4  # rows of a program; it has one block of words of each


@jit("w_ptr y_ptr")
def _dequantise(
    w_ptr, scale_ptr, minimum_ptr, y_ptr,
    OUT: tl.constexpr, C: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    KIND: tl.constexpr, L: tl.constexpr, PTX: tl.constexpr, OFFSET: tl.constexpr, BO: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    dtype = y_ptr.dtype.element_ty
    FIELDS: tl.constexpr = 4 if KIND == "int4" else 2
    row = tl.program_id(0) * BO + tl.arange(0, BO)
    b = tl.program_id(1)
    inside = tl.minimum(row, OUT - 1).to(tl.int64)
    column = tl.arange(0, L)[None, :]
    words = tl.load(w_ptr + inside[:, None] * WORDS + b * L + column, eviction_policy="evict_first")
    scales = ()
    minima = ()
    zeros = ()
    for i in tl.static_range(FIELDS):
        # Padding may be a group of its own, which has no scale.
        group = tl.minimum(b * FIELDS + i, (C - 1) // L) * L // GROUP if GROUP else 0
        scale, zero = scale_and_zero(scale_ptr + group * OUT + inside[:, None], ZERO)
        scales += (scale,)  # type: ignore[assignment]
        zeros += (zero,)  # type: ignore[assignment]
        if minimum_ptr is not None:
            minima += (tl.load(minimum_ptr + group * OUT + inside[:, None]),)  # type: ignore[assignment]
    if PDL:
        tl.extra.cuda.gdc_wait()
    for i in tl.static_range(FIELDS):
        numbers = field_of(words, zeros[i], i, KIND, PTX, OFFSET, ZERO, dtype)
        y = numbers.to(tl.float32) * scales[i]
        if minimum_ptr is not None:
            y += minima[i]
        columns = (b * FIELDS + i) * L + column
        place = y_ptr + row.to(tl.int64)[:, None] * C + columns
        tl.store(place, y.to(dtype), mask=(row < OUT)[:, None] & (columns < C))


def dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [O, C] in dtype. Its columns are in its own order: `weight.order` is not applied."""
    form, outputs = weight.form, weight.shape[0]
    y = torch.empty((outputs, form.columns), dtype=dtype, device=weight.words.device)
    _dequantise[(cdiv(outputs, ROWS), form.words // form.width)](
        weight.words, weight.scales, weight.minimum, y, OUT=outputs, **constants(form, dtype), BO=ROWS,
        num_warps=NUM_WARPS, **options(y.device),
    )  # fmt: skip
    return y
