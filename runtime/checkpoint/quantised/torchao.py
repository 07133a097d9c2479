"""torchao's weights of 8 bits, and of 4 bits in a byte each, where transformers wrote them as plain tensors.

_weight_qdata        [O, I] int8 or float8_e4m3fn
_weight_scale        [O, G]
_weight_zero_point   [O, G] int8, which may be missing

w[o, i] = (q[o, i] - zero_point[o, g]) * scale[o, g]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...common.shown import shown
from .integers import Integers
from .scheme import FLOATS, OneScheme, Part, Settings, check_scales

_TYPES = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig")


def method(settings: Settings) -> OneScheme:
    """Raises ValueError for settings that this runtime does not read."""
    settings.refuse(include_input_output_embeddings="this runtime reads embeddings in 16 or 32 bits only")
    kind: Any = settings.get("quant_type")
    default = kind.get("default") if isinstance(kind, Mapping) else None
    if not isinstance(default, Mapping) or set(kind) != {"default"} or default.get("_type") not in _TYPES:
        raise ValueError(f"quant_type is {shown(kind)}; this runtime reads {', '.join(_TYPES)} for all layers only")
    scheme = TorchAO(torch.float8_e4m3fn if default["_type"].startswith("Float8") else torch.int8)
    return OneScheme("torchao", scheme, f"torchao, {default['_type']}")


@dataclass(frozen=True)
class TorchAO:
    """See the module."""

    dtype: torch.dtype

    def parts(self, shape: tuple[int, int]) -> Mapping[str, Part]:
        return {
            "_weight_qdata": Part(shape, [self.dtype], large=True),
            "_weight_scale": Part(None, FLOATS),
            "_weight_zero_point": Part(None, [torch.int8], optional=True),
        }

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        scale, zero = parts["_weight_scale"], parts.get("_weight_zero_point")
        if scale.dim() != 2 or len(scale) != shape[0] or not scale.numel() or shape[1] % scale.shape[1]:
            raise ValueError(f"_weight_scale has shape {list(scale.shape)}, which does not divide {list(shape)}")
        if zero is not None and zero.shape != scale.shape:
            raise ValueError(f"_weight_zero_point has shape {list(zero.shape)}, and _weight_scale {list(scale.shape)}")
        check_scales("_weight_scale", scale)

    def numbers(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Integers:
        scale, zero = parts["_weight_scale"], parts.get("_weight_zero_point")
        return Integers(parts["_weight_qdata"], scale, 0 if zero is None else zero)
