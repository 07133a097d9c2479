"""What a quantisation method must know of itself: the tensors of a layer, and the weight that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...common.shown import shown
from .integers import Integers

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Part(NamedTuple):
    """A tensor that a quantised layer has in a checkpoint.

    Attributes:
        shape: None where any will do.
        dtypes: what it may be stored as.
        optional: whether it may be missing.
        large: whether it holds the weights themselves. The others are read twice: once to check them all before memory
            is allocated.
    """

    shape: tuple[int, ...] | None
    dtypes: Sequence[torch.dtype]
    optional: bool = False
    large: bool = False


class Scheme(Protocol):
    """How one linear layer is quantised. O: outputs, I: inputs; its weight has shape (O, I)."""

    def parts(self, shape: tuple[int, int]) -> Mapping[str, Part]:
        """The layer's tensors, by what follows the layer's name. Raises ValueError for an impossible shape."""

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        """Raises ValueError if the small tensors of a layer have values that no tool writes."""

    def numbers(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Integers | Tensor:
        """The weight as integers; or [O, I] in float32 where it is no product of integers and scales.

        On the device of the large parts.
        """


class Method(Protocol):
    """A quantisation method with the settings of one checkpoint.

    Attributes:
        name: its quant_method in config.json.
        summary: in a few words, for `internlm3 info`.
    """

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...

    def scheme(self, layer: str) -> Scheme | None:
        """The scheme of a layer, by its full name; None for one that is not quantised."""


@dataclass(frozen=True)
class OneScheme:
    """A method that quantises all layers alike. Which layers it left as they were, their tensors say."""

    name: str
    of_all: Scheme
    summary: str

    def scheme(self, layer: str) -> Scheme | None:
        return self.of_all


def in_groups(size: int) -> str:
    """For a summary: "in groups of 128"."""
    return "per output" if size == -1 else f"in groups of {size}"


def groups(inputs: int, size: int) -> int:
    """The number of groups of `size` inputs, -1 for one group of all. Raises ValueError if `size` is no divisor."""
    if size == -1:
        return 1
    if inputs % size:
        raise ValueError(f"its {inputs} inputs are no multiple of the group size {size}")
    return inputs // size


def check_scales(name: str, scales: Tensor, least: str = "positive") -> None:
    """Raises ValueError unless all scales are finite, and positive or, with least="not negative", zero."""
    values = scales.float()
    wrong = ~values.isfinite() | ((values <= 0) if least == "positive" else (values < 0))
    if wrong.any():
        raise ValueError(f"{name} holds {values[wrong][0].item()}; scales must be finite and {least}")


class Settings:
    """The keys of a quantization_config. Each is read with the values that are supported; the rest must be neutral."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(key)
        return default if value is None else value

    def one_of(self, key: str, *supported: Any, default: Any = None) -> Any:
        """The value of a key; ValueError if it is not one of those supported."""
        value = self.get(key, default)
        if value not in supported or isinstance(value, bool) != isinstance(supported[0], bool):
            raise ValueError(f"{key} is {shown(value)}; this runtime reads {' and '.join(map(shown, supported))} only")
        return value

    def group_size(self, key: str = "group_size") -> int:
        """A positive number, or -1."""
        size = self.get(key)
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ValueError(
                f"{key} is {shown(size)}; it must be a positive integer, or -1 for one group of all inputs"
            )
        return size

    def refuse(self, **reasons: str) -> None:
        """Raises ValueError if one of these keys is set: to anything but None, False, or an empty container."""
        for key, reason in reasons.items():
            if value := self.get(key):
                raise ValueError(f"{key} is {shown(value)}: {reason}")
