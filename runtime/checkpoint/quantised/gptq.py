"""GPTQ, as AutoGPTQ and GPTQModel write it: 4 or 8 bits, packed along the inputs.

    qweight  [I / n, O] int32   n = 32 / bits fields per word; field i of word r is input n r + i
    qzeros   [G, O / n] int32   field i of word c is output n c + i
    scales   [G, O]
    g_idx    [I] int32          the group of each input; in order unless desc_act reordered them by importance

    w[o, i] = scales[g, o] * (q[i, o] - zero[g, o])

Version 1 of the format stores zero - 1, subtracted from whole words, so that a zero of 0 borrows from its neighbour;
adding to whole words inverts that. Version 2 stores the zero. Some files of version 2 say that they are of version 1;
in a symmetric file that shows, because every zero is half of the range.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .integers import Integers, check_groups, unpack
from .scheme import FLOATS, OneScheme, Part, Settings, check_scales, groups, in_groups

_ONES = {4: 0x11111111, 8: 0x01010101}  # a one in every field of a word


def method(settings: Settings) -> OneScheme:
    """Raises ValueError for settings that this runtime does not read."""
    settings.refuse(
        dynamic="this runtime reads one setting for all layers",
        is_marlin_format="this runtime does not read Marlin's layout",
    )
    settings.one_of("pack_dtype", "int32", default="int32")
    version = settings.one_of("checkpoint_format", "gptq", "gptq_v2", default=settings.get("format", "gptq"))
    scheme = GPTQ(
        bits=settings.one_of("bits", 4, 8),
        group_size=settings.group_size(),
        symmetric=settings.one_of("sym", True, False, default=True),
        reordered=settings.one_of("desc_act", False, True, default=False),
        stored_less_one=version == "gptq",
    )
    return OneScheme("gptq", scheme, f"GPTQ, {scheme.bits} bits {in_groups(scheme.group_size)}")


@dataclass(frozen=True)
class GPTQ:
    """See the module. stored_less_one: version 1."""

    bits: int
    group_size: int
    symmetric: bool
    reordered: bool
    stored_less_one: bool

    def parts(self, shape: tuple[int, int]) -> Mapping[str, Part]:
        outputs, inputs = shape
        per_word, count = 32 // self.bits, groups(inputs, self.group_size)
        if outputs % per_word or inputs % per_word:
            raise ValueError(f"its shape {list(shape)} is no multiple of {per_word}, the numbers in a word")
        return {
            "qweight": Part((inputs // per_word, outputs), [torch.int32], large=True),
            "qzeros": Part((count, outputs // per_word), [torch.int32]),
            "scales": Part((count, outputs), FLOATS),
            "g_idx": Part((inputs,), [torch.int32, torch.int64], optional=not self.reordered),
        }

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        check_scales("scales", parts["scales"])
        if "g_idx" in parts:
            check_groups("g_idx", parts["g_idx"], len(parts["scales"]), in_sequence=not self.reordered)
        self._zeros(parts["qzeros"])

    def numbers(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Integers:
        q = unpack(parts["qweight"], self.bits, 0).T
        group_of = parts["g_idx"].long() if self.reordered else None
        return Integers(q, parts["scales"].T, self._zeros(parts["qzeros"]), self.bits, group_of=group_of)

    def _zeros(self, words: Tensor) -> Tensor | int:
        """[O, G], or one number for all."""
        if self.symmetric:
            middle = 2 ** (self.bits - 1)
            low, high = (int(bound) for bound in unpack(words, self.bits, 1).aminmax())
            if low == high == middle and self.stored_less_one:
                warnings.warn(
                    "the checkpoint says GPTQ version 1, and its zeros are of version 2 (checkpoint_format gptq_v2): "
                    "read as such",
                    stacklevel=2,
                )
            elif not low == high == middle - self.stored_less_one:
                raise ValueError(
                    f"qzeros holds zeros from {low} to {high}; the configuration says symmetric (sym), where all are "
                    f"{middle - self.stored_less_one}"
                )
            return middle
        if self.stored_less_one:
            # Wraps around like the 32-bit words that it inverts.
            words = ((words.long() + _ONES[self.bits] + 2**31) % 2**32 - 2**31).to(torch.int32)
        return unpack(words, self.bits, 1).T
