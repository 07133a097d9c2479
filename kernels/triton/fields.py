"""The fields of int16 words as floats, exactly q - zero: see kernels/quantised.py for kinds and words.

On NVIDIA's GPUs an instruction handles the same field of two words. Instructions for two numbers of 16 bits:

    int4      2.75   mask and set an exponent: a field becomes 128 + q in bfloat16, 1024 + q in float16; subtract
    int8      3.5    in bfloat16: seven bits become 128 + q, the sign 128 or 256; subtract the latter from the former
              2.5    in float16: 1024 + 128 + q; subtract
    float8    4.5    move sign, exponent and mantissa to their places; multiply by the ratio of the exponents' biases

Elsewhere, and in float32, numbers are computed one by one with ordinary operations, to the same values.
"""

import struct
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from ..quantised import Form, Kind
from .launch import INTERPRETED

# By how much a field exceeds q when its exponent is set. It is subtracted together with the zero point.
OFFSET = {
    ("int4", torch.bfloat16): 128,
    ("int4", torch.float16): 1024,
    ("int8", torch.bfloat16): 0,
    ("int8", torch.float16): 1152,
    ("float8", torch.bfloat16): 0,
    ("float8", torch.float16): 0,
}


def constants(form: Form, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of a kernel that reads words of this form and computes in `dtype`."""
    plain = INTERPRETED or torch.version.hip or dtype == torch.float32
    return {
        "C": form.columns, "WORDS": form.words, "L": form.width, "KIND": form.kind, "GROUP": form.group,
        "ZERO": form.zero, "OFFSET": OFFSET.get((form.kind, dtype), 0),
        "PTX": () if plain else tuple(ptx(form.kind, dtype, form.zero, field) for field in range(form.fields)),
    }  # fmt: skip


@lru_cache
def ptx(kind: Kind, dtype: torch.dtype, zero: int | None, field: int) -> str:
    """Instructions that turn a field of a pair of words into a pair of bfloat16 or float16.

    Operands: $0 is the result, $1 the words; without `zero`, $2 is -(OFFSET + zero).
    """
    wide = dtype == torch.bfloat16
    fma = "fma.rn.bf16x2" if wide else "fma.rn.f16x2"
    lines = [".reg .b32 words, t, u, one, minus, other;", f"mov.b32 one, {_pair(1.0, dtype)};"]
    if zero is None:
        lines.append("mov.b32 minus, $2;")
    else:
        lines.append(f"mov.b32 minus, {_pair(-float(OFFSET[kind, dtype] + zero), dtype)};")
    shift = field * (4 if kind == "int4" else 8)
    lines.append(f"shr.u32 words, $1, {shift};" if shift and kind != "float8" else "mov.b32 words, $1;")
    if kind == "int4":
        exponent = "0x43004300" if wide else "0x64006400"
        lines.append(f"lop3.b32 t, words, 0x000F000F, {exponent}, 0xEA;")  # (words & mask) | exponent
        lines.append(f"{fma} $0, t, one, minus;")
    elif kind == "int8" and wide:
        lines.append(f"mov.b32 other, {_pair(-1.0, dtype)};")
        lines.append("lop3.b32 t, words, 0x007F007F, 0x43004300, 0xEA;")
        lines.append("lop3.b32 u, words, 0x00800080, 0x43004300, 0xEA;")
        lines.append(f"{fma} $0, u, other, t;")
        if zero != 0:
            lines.append(f"{fma} $0, $0, one, minus;")
    elif kind == "int8":
        lines.append("lop3.b32 t, words, 0x00FF00FF, 0x64806480, 0x6A;")  # (words & mask) ^ (exponent | sign)
        lines.append(f"{fma} $0, t, one, minus;")
    else:
        # The sign moves to bit 15; exponent and mantissa move to end at bit 4 in bfloat16, at bit 7 in float16.
        up = (4 if wide else 7) - 8 * field
        lines.append(f"mov.b32 other, {_pair(2.0**120 if wide else 2.0**8, dtype)};")
        lines.append(f"shl.b32 t, words, {up};" if up > 0 else f"shr.u32 t, words, {-up};")
        lines.append(f"and.b32 t, t, {'0x07F007F0' if wide else '0x3F803F80'};")
        lines.append(f"shl.b32 u, words, {8 - 8 * field};")
        lines.append("lop3.b32 t, u, 0x80008000, t, 0xEA;")
        lines.append(f"{fma} $0, t, other, minus;")  # minus is -0
    return "{ " + " ".join(lines) + " }"


def _pair(value: float, dtype: torch.dtype) -> str:
    """The bits of two equal 16-bit floats. Raises ValueError if the dtype does not have the value."""
    wide = dtype == torch.bfloat16  # which is the upper half of float32
    packed = struct.pack(">f" if wide else ">e", value)
    if struct.unpack(">f" if wide else ">e", packed)[0] != value or (wide and any(packed[2:])):
        raise ValueError(f"{dtype} does not have {value}")
    bits = packed[:2].hex().upper()
    return f"0x{bits}{bits}"


@triton.jit
def field_of(
    words,
    zero,
    FIELD: tl.constexpr,
    KIND: tl.constexpr,
    PTX: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    dtype: tl.constexpr,
):
    """A field of words [n, m], less its zero point, in dtype.

    zero: [n, 1] float32, without ZERO. PTX: `ptx` of all fields, or empty for ordinary operations.
    """
    if len(PTX) > 0:
        if ZERO is None:
            minus = (-(OFFSET + zero)).to(dtype).to(tl.int16, bitcast=True)
            bits = tl.inline_asm_elementwise(PTX[FIELD], "=&r,r,r", [words, minus], tl.int16, is_pure=True, pack=2)
        else:
            bits = tl.inline_asm_elementwise(PTX[FIELD], "=&r,r", [words], tl.int16, is_pure=True, pack=2)
        return bits.to(dtype, bitcast=True)
    else:
        if KIND == "int4":
            q = ((words >> (4 * FIELD)) & 15).to(tl.float32)
        elif KIND == "int8":
            q = ((words << (8 - 8 * FIELD)) >> 8).to(tl.float32)
        else:
            bits = words >> (8 * FIELD)
            bits = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8)
            q = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return (q - (ZERO if ZERO is not None else zero)).to(dtype)


@triton.jit
def scale_and_zero(scale_ptr, ZERO: tl.constexpr):
    """The scales at scale_ptr [n], and the zero points that they hold, in float32: see QuantisedWeight.scales.

    With ZERO, the second means nothing: Triton 3.6 takes no None out of a tuple.
    """
    scale = tl.load(scale_ptr)
    if ZERO is None:
        bits = scale.to(tl.int32, bitcast=True)
        return (bits & -8192).to(tl.float32, bitcast=True), ((bits << 19) >> 19).to(tl.float32)
    else:
        return scale, scale
