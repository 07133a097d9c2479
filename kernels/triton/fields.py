"""The fields of int16 words as floats, exactly q - zero: see kernels/quantised.py for kinds and words.

On NVIDIA's GPUs an instruction handles the same field of two words. Instructions for two numbers of 16 bits:

    int4      2.75   mask and set an exponent: a field becomes 128 + q in bfloat16, 1024 + q in float16; subtract
    int8      3.5    in bfloat16: seven bits become 128 + q, the sign 128 or 256; subtract the latter from the former
              2.5    in float16: 1024 + 128 + q; subtract
    float8    4.5    move sign, exponent and mantissa to their places; multiply by the ratio of the exponents' biases

Elsewhere, and in float32, numbers are computed one by one with ordinary operations, to the same values.
"""

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
        "PTX": "" if plain else ptx(form.kind, dtype, form.zero),
    }  # fmt: skip


@lru_cache
def ptx(kind: Kind, dtype: torch.dtype, zero: int | None) -> str:
    """Instructions that turn a pair of words into pairs of bfloat16 or float16.

    Operands: $0 to $F-1 are the fields, $F the words; without `zero`, $F+1 to $2F are -(OFFSET + zero) of each field.
    """
    wide = dtype == torch.bfloat16
    fma = "fma.rn.bf16x2" if wide else "fma.rn.f16x2"
    fields = 4 if kind == "int4" else 2
    words = f"${fields}"
    lines = []

    def constant(name: str, value: float) -> None:
        lines.append(f".reg .b32 {name}; mov.b32 {name}, {_pair(value, dtype)};")

    lines.append(".reg .b32 s, t, u;")
    constant("one", 1.0)
    if zero is not None:
        constant("minus", -float(OFFSET[kind, dtype] + zero))
    if kind == "int8" and wide:
        constant("minus_one", -1.0)
    if kind == "float8":
        constant("ratio", 2.0**120 if wide else 2.0**8)
    for field in range(fields):
        y, subtracted = f"${field}", "minus" if zero is not None else f"${fields + 1 + field}"
        source = words
        if field and kind != "float8":
            lines.append(f"shr.u32 s, {words}, {16 // fields * field};")
            source = "s"
        if kind == "int4":
            exponent = "0x43004300" if wide else "0x64006400"
            lines.append(f"lop3.b32 t, {source}, 0x000F000F, {exponent}, 0xEA;")  # (source & mask) | exponent
            lines.append(f"{fma} {y}, t, one, {subtracted};")
        elif kind == "int8" and wide:
            lines.append(f"lop3.b32 t, {source}, 0x007F007F, 0x43004300, 0xEA;")
            lines.append(f"lop3.b32 u, {source}, 0x00800080, 0x43004300, 0xEA;")
            lines.append(f"{fma} {y}, u, minus_one, t;")
            if zero != 0:
                lines.append(f"{fma} {y}, {y}, one, {subtracted};")
        elif kind == "int8":
            lines.append(f"lop3.b32 t, {source}, 0x00FF00FF, 0x64806480, 0x6A;")  # (source & mask) ^ (exponent | sign)
            lines.append(f"{fma} {y}, t, one, {subtracted};")
        else:
            # The sign moves to bit 15; exponent and mantissa move to end at bit 4 in bfloat16, at bit 7 in float16.
            up = (4 if wide else 7) - 8 * field
            lines.append(f"shl.b32 t, {words}, {up};" if up > 0 else f"shr.u32 t, {words}, {-up};")
            lines.append(f"and.b32 t, t, {'0x07F007F0' if wide else '0x3F803F80'};")
            lines.append(f"shl.b32 u, {words}, {8 - 8 * field};")
            lines.append("lop3.b32 t, u, 0x80008000, t, 0xEA;")
            lines.append(f"{fma} {y}, t, ratio, minus;")  # minus is -0
    return "{ " + " ".join(lines) + " }"


def _pair(value: float, dtype: torch.dtype) -> str:
    """The bits of two equal 16-bit floats. Raises ValueError if the dtype does not have the value."""
    number = torch.tensor(value, dtype=torch.float64)
    if number.to(dtype).double() != number:
        raise ValueError(f"{dtype} does not have {value}")
    bits = int(number.to(dtype).view(torch.int16)) & 0xFFFF
    return f"0x{bits:04X}{bits:04X}"


@triton.jit
def fields_of(words, zeros, KIND: tl.constexpr, PTX: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, dtype):
    """The fields of words [n, m], each [n, m] of dtype, as a tuple.

    PTX: of `ptx`, or "" for ordinary operations. zeros: the zero point [n, 1] of each field in float32, without ZERO.
    """
    if PTX != "":
        minus = ()
        for i in tl.static_range(len(zeros)):
            minus += ((-(OFFSET + zeros[i])).to(dtype).to(tl.int16, bitcast=True),)  # type: ignore[assignment]
        if KIND == "int4":
            if ZERO is None:
                bits = tl.inline_asm_elementwise(
                    PTX, "=&r,=&r,=&r,=&r,r,r,r,r,r", [words, minus[0], minus[1], minus[2], minus[3]],
                    (tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
                )  # fmt: skip
            else:
                bits = tl.inline_asm_elementwise(
                    PTX, "=&r,=&r,=&r,=&r,r", [words], (tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2
                )
        elif ZERO is None:
            bits = tl.inline_asm_elementwise(
                PTX, "=&r,=&r,r,r,r", [words, minus[0], minus[1]], (tl.int16, tl.int16), is_pure=True, pack=2
            )
        else:
            bits = tl.inline_asm_elementwise(PTX, "=&r,=&r,r", [words], (tl.int16, tl.int16), is_pure=True, pack=2)
        numbers = ()
        for i in tl.static_range(len(bits)):
            numbers += (bits[i].to(dtype, bitcast=True),)  # type: ignore[assignment]
        return numbers
    else:
        numbers = ()
        for i in tl.static_range(4 if KIND == "int4" else 2):
            if KIND == "int4":
                q = ((words >> (4 * i)) & 15).to(tl.float32)
            elif KIND == "int8":
                q = ((words << (8 - 8 * i)) >> 8).to(tl.float32)
            else:
                bits = words >> (8 * i)
                bits = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8)
                q = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
            zero = ZERO if ZERO is not None else zeros[i]
            numbers += ((q - zero).to(dtype),)  # type: ignore[assignment]
        return numbers


@triton.jit
def scale_and_zero(scale_ptr, ZERO: tl.constexpr):
    """The scales at scale_ptr [n], and the zero points that they hold, in float32: see QuantisedWeight.scales."""
    scale = tl.load(scale_ptr)
    if ZERO is None:
        bits = scale.to(tl.int32, bitcast=True)
        return (bits & -8192).to(tl.float32, bitcast=True), ((bits << 19) >> 19).to(tl.float32)
    else:
        return scale, None
