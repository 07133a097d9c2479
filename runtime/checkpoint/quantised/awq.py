"""AWQ in its "gemm" layout, as AutoAWQ, lmdeploy and GPTQModel write it: 4 bits, packed along the outputs.

qweight  [I, O / 8] int32   field i of word c is output 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
qzeros   [G, O / 8] int32   likewise
scales   [G, O]

w[o, i] = scales[g, o] * (q[i, o] - zero[g, o])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .integers import Integers, unpack
from .scheme import FLOATS, OneScheme, Part, Settings, check_scales, groups, in_groups

_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # the field of each of the 8 outputs of a word
_FIELDS = 8


def method(settings: Settings) -> OneScheme:
    """Raises ValueError for settings that this runtime does not read."""
    for key in ("version", "format", "checkpoint_format"):
        layout = settings.get(key, "gemm")
        Settings({key: layout.lower() if isinstance(layout, str) else layout}).one_of(key, "gemm")
    settings.one_of("bits", 4, default=settings.get("w_bit"))
    settings.refuse(dynamic="this runtime reads one setting for all layers")
    size = settings.group_size("group_size" if settings.get("group_size") else "q_group_size")
    return OneScheme("awq", AWQ(size), f"AWQ, 4 bits {in_groups(size)}")


@dataclass(frozen=True)
class AWQ:
    """See the module."""

    group_size: int

    def parts(self, shape: tuple[int, int]) -> Mapping[str, Part]:
        outputs, inputs = shape
        count = groups(inputs, self.group_size)
        if outputs % _FIELDS:
            raise ValueError(f"its {outputs} outputs are no multiple of {_FIELDS}, the numbers in a word")
        return {
            "qweight": Part((inputs, outputs // _FIELDS), [torch.int32], large=True),
            "qzeros": Part((count, outputs // _FIELDS), [torch.int32]),
            "scales": Part((count, outputs), FLOATS),
        }

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        check_scales("scales", parts["scales"])

    def numbers(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Integers:
        q, zero = _in_order(parts["qweight"]), _in_order(parts["qzeros"])
        return Integers(q.T, parts["scales"].T, zero.T, bits=4)


def _in_order(words: Tensor) -> Tensor:
    """[N, O / 8] int32 -> [N, O] uint8."""
    return unpack(words, 4, 1).unflatten(1, (-1, _FIELDS))[:, :, list(_PLACE)].flatten(1)
