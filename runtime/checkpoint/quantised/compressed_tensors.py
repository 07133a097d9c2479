"""compressed-tensors, as llm-compressor writes it: groups of layers, each with a format of its own.

    format                 tensors                              w
    pack-quantized         weight_packed [O, I / n] int32       (q - half) * scale; field i of a word is input n c + i
    int-quantized          weight [O, I] int8                   q * scale
    float-quantized        weight [O, I] float8_e4m3fn          q * scale
    nvfp4-pack-quantized   weight_packed [O, I / 2] uint8       fp4 * (scale / weight_global_scale); low field first
    mxfp4-pack-quantized   weight_packed [O, I / 2] uint8       fp4 * 2^(scale - 127)

`half` is 8 of 4 bits, 128 of 8. weight_scale is [O, G], [O, 1] or [1], or one per block of outputs and inputs.
weight_zero_point replaces half of the range where a layer is not symmetric. pack-quantized packs those of outputs and
groups along the outputs, with the same offset as q; all others are int8. A weight_g_idx [I] names the group of each
input.

Formats that also round activations at run time (input_activations) are read as weights only, which is more exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...common.shown import shown
from .four_bit_floats import FP4_VALUES, looked_up
from .integers import Integers, check_groups, unpack
from .scheme import FLOATS, Part, Scheme, Settings, check_scales, groups, in_groups

_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale")  # of activations, which are not quantised
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
            "mxfp4-pack-quantized")  # fmt: skip


@dataclass(frozen=True)
class CompressedTensors:
    """The schemes of layers by patterns of their names, and the patterns of layers that are not quantised."""

    schemes: Sequence[tuple[Sequence[str], Scheme]]
    ignored: Sequence[str]
    name: str = "compressed-tensors"

    @property
    def summary(self) -> str:
        return f"compressed-tensors, {' and '.join(dict.fromkeys(str(scheme) for _, scheme in self.schemes))}"

    def scheme(self, layer: str) -> Scheme | None:
        if any(_matches(pattern, layer) for pattern in self.ignored):
            return None
        return next((scheme for patterns, scheme in self.schemes if any(_matches(p, layer) for p in patterns)), None)


def method(settings: Settings) -> CompressedTensors:
    """Raises ValueError for settings that this runtime does not read."""
    settings.refuse(
        transform_config="this runtime does not apply rotations",
        kv_cache_scheme="this runtime does not quantise keys and values",
    )
    sparsity = Settings(settings.get("sparsity_config", {}))
    sparsity.one_of("format", "dense", default="dense")
    settings.one_of("quantization_status", "compressed", default="compressed")
    config_groups, ignored = settings.get("config_groups", {}), settings.get("ignore", [])
    if not isinstance(config_groups, Mapping) or not config_groups:
        raise ValueError(f"config_groups is {shown(config_groups)}; it must name the layers of each format")
    schemes = []
    for name, group in config_groups.items():
        try:
            schemes.append((_patterns("targets", group.get("targets")), _scheme(group, settings.get("format"))))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"config_groups, {shown(name)}: {error}") from None
    return CompressedTensors(schemes, _patterns("ignore", ignored))


def _scheme(group: Mapping[str, Any], format_of_all: Any) -> Scheme:
    weights = Settings(group.get("weights") or {})
    Settings(group).refuse(output_activations="this runtime does not quantise activations")
    format = Settings({"format": group.get("format") or format_of_all}).one_of("format", *_FORMATS)
    weights.refuse(dynamic="weights must be stored quantised")
    if format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        weights.one_of("num_bits", 4)
        weights.one_of("type", "float")
        return FP4(nv=format.startswith("nv"), group_size=weights.group_size())
    kind = weights.one_of("type", "int", "float", default="int")
    if format == "naive-quantized":
        format = f"{kind}-quantized"
    if (kind == "float") != (format == "float-quantized"):
        raise ValueError(f"its type is {kind!r}, which the format {format!r} does not hold")
    bits = weights.one_of("num_bits", *((4, 8) if format == "pack-quantized" else (8,)))
    strategy = weights.one_of("strategy", "channel", "group", "tensor", "block")
    block = weights.get("block_structure") if strategy == "block" else None
    if strategy == "block" and not (
        isinstance(block, Sequence) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    ):
        raise ValueError(f"block_structure is {shown(block)}; it must be two positive integers")
    return Scaled(
        format=format,
        bits=bits,
        symmetric=weights.one_of("symmetric", True, False, default=True),
        group_size=weights.group_size() if strategy == "group" else -1,
        one_scale=strategy == "tensor",
        block=None if block is None else (block[0], block[1]),
        reordered=strategy == "group" and weights.get("actorder") in ("group", "dynamic"),
    )


def _patterns(key: str, values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key} is {shown(values)}; it must be a list of names")
    for pattern in values:
        try:
            re.compile(pattern.removeprefix("re:"))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{key} holds {shown(pattern)}, which is no regular expression ({error})") from None
    return values


def _matches(pattern: str, layer: str) -> bool:
    """As compressed-tensors matches: a regular expression, the class of the layer, or its name."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), layer) is not None
    return pattern in ("Linear", layer)


@dataclass(frozen=True)
class Scaled:
    """Integers, or floats of 8 bits, with scales for the tensor, each output, each group of inputs, or each block."""

    format: str
    bits: int
    symmetric: bool
    group_size: int
    one_scale: bool
    block: tuple[int, int] | None
    reordered: bool

    def __str__(self) -> str:
        kind = "fp8" if self.format == "float-quantized" else f"{self.bits} bits"
        if self.block is not None:
            return f"{kind} in blocks of {self.block[0]} x {self.block[1]}"
        return f"{kind} per tensor" if self.one_scale else f"{kind} {in_groups(self.group_size)}"

    def parts(self, shape: tuple[int, int]) -> Mapping[str, Part]:
        outputs, inputs = shape
        scale_shape: tuple[int, ...] = (outputs, groups(inputs, self.group_size))
        if self.one_scale:
            scale_shape = (1,)
        if self.block is not None:
            scale_shape = (-(-outputs // self.block[0]), -(-inputs // self.block[1]))
        zero = Part(scale_shape, [torch.int8])
        if self.format == "pack-quantized":
            per_word = 32 // self.bits
            if not self.one_scale and self.block is None:
                zero = Part((-(-outputs // per_word), scale_shape[-1]), [torch.int32])
            data = {
                "weight_packed": Part((outputs, -(-inputs // per_word)), [torch.int32], large=True),
                "weight_shape": Part((2,), [torch.int64, torch.int32], optional=True),
            }
        else:
            data = {
                "weight": Part(
                    shape, [torch.int8 if self.format == "int-quantized" else torch.float8_e4m3fn], large=True
                )
            }
        return {
            **data,
            "weight_scale": Part(scale_shape, FLOATS),
            **({} if self.symmetric else {"weight_zero_point": zero}),
            **({"weight_g_idx": Part((inputs,), [torch.int32, torch.int64])} if self.reordered else {}),
            **{name: Part(None, (), optional=True) for name in _ACTIVATIONS},
        }

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        stored = parts["weight_shape"].tolist() if "weight_shape" in parts else list(shape)
        if stored != list(shape):
            raise ValueError(f"weight_shape is {stored}, and config.json makes it {list(shape)}")
        check_scales("weight_scale", parts["weight_scale"])
        if "weight_g_idx" in parts:
            check_groups("weight_g_idx", parts["weight_g_idx"], parts["weight_scale"].shape[1], in_sequence=False)

    def numbers(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Integers:
        outputs, inputs = shape
        scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
        if "weight" in parts:
            q, offset = parts["weight"], 0
        else:
            q, offset = unpack(parts["weight_packed"], self.bits, 1)[:, :inputs], 2 ** (self.bits - 1)
        zeros: Tensor | int = offset
        if zero is not None and zero.dtype == torch.int32:
            zeros = unpack(zero, self.bits, 0)[:outputs]
        elif zero is not None:
            zeros = (zero.to(torch.int16) + offset).to(torch.uint8) if offset else zero
        group_of = parts["weight_g_idx"].long() if "weight_g_idx" in parts else None
        if self.one_scale:
            scale = scale.expand(outputs, 1)
            zeros = zeros.expand(outputs, 1) if isinstance(zeros, Tensor) else zeros
        if self.block is not None:
            rows, columns = self.block
            scale = scale.repeat_interleave(rows, 0)[:outputs]
            zeros = zeros.repeat_interleave(rows, 0)[:outputs] if isinstance(zeros, Tensor) else zeros
            if inputs % columns and inputs > columns:  # the last block is narrower
                group_of = torch.arange(inputs, dtype=torch.int64, device=scale.device) // columns
        return Integers(q, scale, zeros, self.bits, group_of=group_of)


@dataclass(frozen=True)
class FP4:
    """Floats of 4 bits. nv: scales of float8_e4m3fn, over a scale of the whole tensor; else powers of two."""

    nv: bool
    group_size: int

    def __str__(self) -> str:
        return "NVFP4" if self.nv else "MXFP4"

    def parts(self, shape: tuple[int, int]) -> Mapping[str, Part]:
        outputs, inputs = shape
        count = groups(inputs, self.group_size)
        if inputs % 2:
            raise ValueError(f"its {inputs} inputs are odd, and a byte holds two")
        scale = Part((outputs, count), [torch.float8_e4m3fn if self.nv else torch.uint8])
        return {
            "weight_packed": Part((outputs, inputs // 2), [torch.uint8], large=True),
            "weight_scale": scale,
            **({"weight_global_scale": Part((1,), [torch.float32])} if self.nv else {}),
            **{name: Part(None, (), optional=True) for name in _ACTIVATIONS},
        }

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        # The scale of a group of zeros may be too small for 8 bits.
        check_scales("weight_scale", self._scale(parts), "not negative")

    def numbers(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Integers:
        twice = torch.tensor([int(2 * value) for value in FP4_VALUES], dtype=torch.int8, device="cpu")
        return Integers(looked_up(twice, parts["weight_packed"], low_first=True), self._scale(parts) / 2)

    def _scale(self, parts: Mapping[str, Tensor]) -> Tensor:
        if self.nv:
            return parts["weight_scale"].float() / parts["weight_global_scale"]
        exponent = parts["weight_scale"].int()
        # 255 is NaN; 0 is 2^-127, which float32 holds as a subnormal number.
        return torch.where(
            exponent == 255, torch.nan, torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 127)
        )
