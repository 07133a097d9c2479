"""SmoothQuant as lmdeploy writes it: a number of 8 bits for each weight, and a scale for each output.

    weight  [O, I] int8 or float8_e4m3fn
    scale   [O, 1] float32

    w[o, i] = weight[o, i] * scale[o]

lmdeploy rounds activations to 8 bits too, for each token at run time. This runtime does not: it is more exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .integers import Integers
from .scheme import OneScheme, Part, Settings, check_scales

_DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


def method(settings: Settings) -> OneScheme:
    """Raises ValueError for settings that this runtime does not read."""
    dtype = settings.one_of("quant_dtype", *_DTYPES, default="int8")
    return OneScheme("smooth_quant", SmoothQuant(_DTYPES[dtype]), f"SmoothQuant, {dtype} per output")


@dataclass(frozen=True)
class SmoothQuant:
    """See the module."""

    dtype: torch.dtype

    def parts(self, shape: tuple[int, int]) -> Mapping[str, Part]:
        return {
            "weight": Part(shape, [self.dtype], large=True),
            "scale": Part((shape[0], 1), [torch.float32]),
        }

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        check_scales("scale", parts["scale"])

    def numbers(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Integers:
        return Integers(parts["weight"], parts["scale"])
