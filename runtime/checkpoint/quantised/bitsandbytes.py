"""bitsandbytes: 4 bits by a table of values, or 8 bits with a scale for each output.

4 bits, blocks of the weight's memory with one scale each, whatever its shape:
    weight                                        [O I / 2, 1] uint8   the high field first
    weight.quant_map                              [16] float32
    weight.absmax                                 [blocks] float32, or uint8 where it is quantised itself:
    weight.nested_absmax, weight.nested_quant_map   absmax = nested_quant_map[absmax] * nested_absmax[block] + offset
    weight.quant_state.bitsandbytes__nf4 (__fp4)  JSON: the sizes of blocks, the shape, the offset
8 bits:
    weight [O, I] int8, SCB [O] float32           w = weight * (SCB / 127)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...common.shown import shown
from .four_bit_floats import looked_up
from .integers import Integers
from .scheme import OneScheme, Part, Settings, check_scales


def method(settings: Settings) -> OneScheme:
    """Raises ValueError for settings that this runtime does not read."""
    if settings.get("load_in_8bit"):
        return OneScheme("bitsandbytes", Int8(), "bitsandbytes, 8 bits per output")
    settings.one_of("load_in_4bit", True)
    settings.one_of("bnb_4bit_quant_storage", "uint8", default="uint8")
    kind = settings.one_of("bnb_4bit_quant_type", "nf4", "fp4")
    scheme = FourBits(kind, nested=settings.one_of("bnb_4bit_use_double_quant", False, True, default=False))
    return OneScheme("bitsandbytes", scheme, f"bitsandbytes, 4 bits ({kind})")


@dataclass(frozen=True)
class Int8:
    """See the module."""

    def parts(self, shape: tuple[int, int]) -> Mapping[str, Part]:
        return {
            "weight": Part(shape, [torch.int8], large=True),
            "SCB": Part((shape[0],), [torch.float32]),
            "weight_format": Part((), [torch.uint8], optional=True),
        }

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        check_scales("SCB", parts["SCB"], "not negative")
        if "weight_format" in parts and parts["weight_format"].item() != 0:
            raise ValueError(f"weight_format is {parts['weight_format'].item()}; this runtime reads 0 (rows) only")

    def numbers(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Integers:
        return Integers(parts["weight"], (parts["SCB"] / 127)[:, None])


@dataclass(frozen=True)
class FourBits:
    """See the module. kind: "nf4" or "fp4"; nested: whether the scales are quantised too."""

    kind: str
    nested: bool

    @property
    def _state(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.kind}"

    def parts(self, shape: tuple[int, int]) -> Mapping[str, Part]:
        size = shape[0] * shape[1]
        nested = {
            "weight.nested_absmax": Part(None, [torch.float32]),
            "weight.nested_quant_map": Part((256,), [torch.float32]),
        }
        return {
            "weight": Part((-(-size // 2), 1), [torch.uint8], large=True),
            "weight.quant_map": Part((16,), [torch.float32]),
            "weight.absmax": Part(None, [torch.uint8 if self.nested else torch.float32]),
            self._state: Part(None, [torch.uint8]),
            **(nested if self.nested else {}),
        }

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        absmax, block = self._absmax(parts), self._number(parts, "blocksize")
        if -(-shape[0] * shape[1] // block) != len(absmax) or self._settings(parts).get("shape") != list(shape):
            raise ValueError(f"{self._state} describes another shape than the {list(shape)} that config.json makes it")
        check_scales("weight.absmax", absmax, "not negative")

    def numbers(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        absmax, size = self._absmax(parts), shape[0] * shape[1]
        values = looked_up(parts["weight.quant_map"], parts["weight"].flatten(), low_first=False)[:size]
        block = min(self._number(parts, "blocksize"), size)
        return (values * absmax.to(values.device).repeat_interleave(block)[:size]).view(shape)

    def _absmax(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The scale of each block, float32."""
        absmax = parts["weight.absmax"].flatten()
        if not self.nested:
            return absmax
        size, offset = self._number(parts, "nested_blocksize"), self._settings(parts).get("nested_offset")
        nested = parts["weight.nested_absmax"].flatten()
        if -(-len(absmax) // size) != len(nested) or not isinstance(offset, float):
            raise ValueError(f"{self._state} does not describe weight.nested_absmax")
        scales = nested.repeat_interleave(min(size, len(absmax)))[: len(absmax)]
        return parts["weight.nested_quant_map"][absmax.long()] * scales + offset

    def _number(self, parts: Mapping[str, Tensor], key: str) -> int:
        value = self._settings(parts).get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self._state} has {shown(value)} as {key}; it must be a positive integer")
        return value

    def _settings(self, parts: Mapping[str, Tensor]) -> dict[str, Any]:
        try:
            values = json.loads(bytes(parts[self._state].flatten().tolist()))
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ValueError(f"{self._state} is no JSON object")
        return values
