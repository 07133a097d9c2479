"""The header of a GGUF file (version 2 or 3): its settings, and where its tensors are.

    magic "GGUF", version uint32, tensors uint64, settings uint64
    each setting: name, type uint32, value        strings: length uint64, UTF-8; arrays: type uint32, length uint64
    each tensor:  name, dimensions uint32, their sizes uint64 (the innermost first), type uint32, offset uint64
    padding to a multiple of general.alignment, from which the offsets count
    the data of the tensors, in the same order, each padded likewise

Numbers are little-endian. Source: the specification in ggml's repository (docs/gguf.md).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...common.shown import shown
from .blocks import BLOCKS

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_MOST = 2**24  # bytes of a string, or values of an array: a damaged length would take gigabytes
_ALIGNMENT = "general.alignment"


class StoredTensor(NamedTuple):
    """Where a tensor is. shape: the outermost dimension first, as PyTorch has it."""

    kind: int
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class GGUFHeader:
    """The settings and tensors of a GGUF file."""

    path: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def read(cls, path: Path) -> GGUFHeader:
        """Raises ValueError, naming the file, if it is no GGUF file, or damaged, or of a form that is not read."""
        with path.open("rb") as file:
            size = path.stat().st_size
            try:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise ValueError(f"{path} is empty; fetch it again") from None
            with content:
                try:
                    return cls(path, *_Reader(content).header(size))
                except (struct.error, UnicodeDecodeError, IndexError, OverflowError, RecursionError):
                    raise ValueError(f"{path} is truncated or damaged; fetch it again") from None
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None


class _Reader:
    """Reads one value after the other."""

    def __init__(self, content: mmap.mmap):
        self._content, self._at = content, 0

    def header(self, size: int) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        if self._content[:4] != b"GGUF":
            raise ValueError("it does not begin like a GGUF file")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"it is of version {version} of the format (or big-endian); this runtime reads 2 and 3")
        tensors, settings = self._number("Q"), self._number("Q")
        values: dict[str, Any] = {}
        for _ in range(settings):
            name = self._string()
            if name in values:
                raise ValueError(f"{shown(name)} is set twice")
            values[name] = self._value(self._number("I"))
        found: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self._string()
            if name in found:
                raise ValueError(f"the tensor {shown(name)} is there twice")
            count = self._number("I")
            if count > _MOST_DIMENSIONS:
                raise ValueError(f"the tensor {shown(name)} has {count} dimensions")
            shape = tuple(self._number("Q") for _ in range(count))[::-1]
            found[name] = self._number("I"), shape, self._number("Q")
        alignment = values.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{_ALIGNMENT} is {shown(alignment)}; it must be a positive integer")
        end = _padded(self._at, alignment)
        base, placed = end, {}
        for name, (kind, shape, offset) in found.items():
            if base + offset != end:
                raise ValueError(
                    f"the tensor {shown(name)} has the offset {offset}, and what is before it ends at {end - base}: "
                    "it is damaged; fetch it again"
                )
            placed[name] = _placed(name, kind, shape, end)
            end = placed[name].end
            if end > size:
                raise ValueError(
                    f"the tensor {shown(name)} ends at byte {end} of {size}: it is truncated or damaged; fetch it again"
                )
            end = _padded(end, alignment)
        if size > end:
            raise ValueError(f"{size - end} bytes follow the last tensor: it is damaged; fetch it again")
        return values, placed

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._content, self._at)
        self._at += struct.calcsize(f"<{kind}")
        return value

    def _string(self) -> str:
        length = self._number("Q")
        begin, self._at = self._at, self._at + length
        if self._at > len(self._content) or length > _MOST:
            raise IndexError
        return self._content[begin : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, length = self._number("I"), self._number("Q")
            if length > _MOST:
                raise IndexError
            if inner not in _NUMBERS:
                return [self._value(inner) for _ in range(length)]
            if length * struct.calcsize(f"<{_NUMBERS[inner]}") > len(self._content) - self._at:
                raise IndexError
            values = struct.unpack_from(f"<{length}{_NUMBERS[inner]}", self._content, self._at)
            self._at += struct.calcsize(f"<{length}{_NUMBERS[inner]}")
            return list(values)
        if kind not in _NUMBERS:
            raise ValueError(f"a setting has type {kind}, which the format does not have")
        return self._number(_NUMBERS[kind])


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _placed(name: str, kind: int, shape: tuple[int, ...], begin: int) -> StoredTensor:
    if kind not in BLOCKS:
        known = ", ".join(block.name for block in BLOCKS.values())
        raise ValueError(
            f"the tensor {shown(name)} has type {kind}, which this runtime does not read; it reads {known}"
        )
    block = BLOCKS[kind]
    numbers = 1
    for length in shape:
        numbers *= length
    if not shape or numbers == 0 or shape[-1] % block.size:
        raise ValueError(
            f"the tensor {shown(name)} of type {block.name} has shape {list(shape)}, in rows of {block.size}"
        )
    return StoredTensor(kind, shape, begin, begin + numbers // block.size * block.bytes)
