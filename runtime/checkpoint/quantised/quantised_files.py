"""The files of a quantised checkpoint, by the weights that they stand for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ....kernels.quantised import Layout, Weight
from ...common.shown import shown
from ..weight_files import Header, WeightFiles, naming
from .scheme import Method, Part, Scheme

_WEIGHT = ".weight"
_CPU = torch.device("cpu")


class _Layer(NamedTuple):
    """A quantised layer: its scheme, the shape of its weight, its tensors by their names in the files."""

    scheme: Scheme
    shape: tuple[int, int]
    suffix_of: dict[str, str]
    small: frozenset[str]


@dataclass(frozen=True)
class QuantisedFiles(WeightFiles):
    """The files of a quantised checkpoint, with each quantised layer's weight in the place of its parts.

    Attributes:
        stored: the files as they are.
        layers: the quantised layers, by the name of their weight.
    """

    stored: WeightFiles
    layers: Mapping[str, _Layer]

    @property
    def quantised(self) -> Collection[str]:
        return self.layers.keys()

    @classmethod
    def of(cls, stored: WeightFiles, method: Method, shapes: Mapping[str, tuple[int, ...]]) -> QuantisedFiles:
        """Reads headers, and to check them all tensors but those that hold weights.

        Args:
            stored: the files of the checkpoint.
            method: how they are quantised.
            shapes: of the parameters of the model, by their names in the files.

        Raises:
            ValueError: tensors that the method does not write, or impossible values; the message names them.
        """
        layers: dict[str, _Layer] = {}
        unread: set[str] = set()
        of_layer = _by_layer(stored)
        for name, shape in shapes.items():
            layer = name.removesuffix(_WEIGHT)
            if len(shape) != 2 or layer == name:
                continue
            own = of_layer.get(layer, {})
            found = _quantised(stored, layer, own, method.scheme(layer), (shape[0], shape[1]))
            if found is not None:
                layers[name] = found
                unread |= found.suffix_of.keys()
                if f"{layer}.bias" not in shapes:
                    unread |= _zero_bias(stored, f"{layer}.bias")
        headers: dict[Path, Header] = {
            path: {name: tensor for name, tensor in header.items() if name not in unread}
            for path, header in stored.headers.items()
        }
        for name, found in layers.items():
            (path,) = {stored.file_of[part] for part in found.suffix_of if part not in found.small}
            headers[path][name] = found.shape, torch.float32
        file_of = {name: path for path, header in headers.items() for name in header}
        layouts: dict[str, Layout] = {}
        files = cls(stored.folder, headers, file_of, layouts, stored, layers)
        for path in headers:
            for name, parts in files._parts(path, headers[path].keys() & layers.keys(), _CPU, large=False):
                with naming(path, shown(name.removesuffix(_WEIGHT))):
                    layers[name].scheme.check(parts, layers[name].shape)
                if layout := files._layout(name, parts):
                    layouts[name] = layout
        return files

    def read(
        self, path: Path, names: Collection[str], device: torch.device, packed: Collection[str] = ()
    ) -> Iterator[tuple[str, Weight]]:
        yield from self.stored.read(path, self.headers[path].keys() & set(names) - self.layers.keys(), device)
        wanted = self.headers[path].keys() & set(names) & self.layers.keys()
        for name, parts in self._parts(path, wanted, device, large=True):
            layer = self.layers[name]
            with naming(path, shown(name.removesuffix(_WEIGHT))):
                numbers = layer.scheme.numbers(parts, layer.shape)
                weight = numbers if isinstance(numbers, Tensor) else numbers.as_weight(packed=name in packed)
            yield name, weight

    def _layout(self, name: str, small: Mapping[str, Tensor]) -> Layout | None:
        """How the ops take a layer's weight, from its small tensors; None if they don't."""
        layer = self.layers[name]
        parts = dict(small)
        for part, suffix in layer.suffix_of.items():
            if part not in layer.small:
                shape, dtype = self.stored.headers[self.stored.file_of[part]][part]
                parts[suffix] = torch.empty(shape, dtype=dtype, device="meta")
        numbers = layer.scheme.numbers(parts, layer.shape)
        return None if isinstance(numbers, Tensor) else numbers.layout()

    def _parts(
        self, path: Path, names: Collection[str], device: torch.device, *, large: bool
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The parts of the layers of a file, by suffix; without `large` only the small ones.

        The parts of a layer stand together in a file, so that few tensors are held at a time.
        """
        needed = {name: {part for part in self.layers[name].suffix_of if large or part in self.layers[name].small}
                  for name in names}  # fmt: skip
        layer_of = {part: name for name, parts in needed.items() for part in parts}
        held: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        others = {self.stored.file_of[part] for part in layer_of} - {path}
        for each in (*sorted(others), path):
            for part, tensor in self.stored.tensors(each, layer_of.keys(), device):
                name = layer_of[part]
                held[name][self.layers[name].suffix_of[part]] = tensor
                if len(held[name]) == len(needed[name]):
                    yield name, held.pop(name)


def _by_layer(files: WeightFiles) -> dict[str, dict[str, str]]:
    """Layer -> the rest of each of its tensors' names -> the whole name, for every beginning of every name."""
    of_layer: dict[str, dict[str, str]] = {}
    for name in files.file_of:
        dot = name.find(".")
        while dot >= 0:
            of_layer.setdefault(name[:dot], {})[name[dot + 1 :]] = name
            dot = name.find(".", dot + 1)
    return of_layer


def _quantised(
    files: WeightFiles, layer: str, own: Mapping[str, str], scheme: Scheme | None, shape: tuple[int, int]
) -> _Layer | None:
    """The tensors of a layer if it is quantised, checked by their headers; else None.

    Args:
        own: the layer's tensors, by what follows its name.
    """
    if scheme is None:
        return None
    try:
        parts = scheme.parts(shape)
    except ValueError as error:
        if "weight" in own and own.keys() <= {"weight", "bias"}:
            return None  # it was left as it was because of its shape
        raise ValueError(f"{files.folder / 'config.json'}: {shown(layer)} cannot be quantised: {error}") from None
    found = {suffix: own[suffix] for suffix in parts if suffix in own}
    if not found.keys() - {"weight"}:
        return None
    for suffix, part in parts.items():
        if suffix not in own:
            if not part.optional:
                beside = next(iter(found.values()))
                raise ValueError(
                    f"{files.file_of[beside]}: {shown(beside)} is there, and {shown(f'{layer}.{suffix}')} is missing"
                )
        else:
            _check_header(files, own[suffix], part)
    if "weight" in own and "weight" not in parts:
        raise ValueError(
            f"{files.file_of[own['weight']]}: {shown(own['weight'])} is there beside the quantised "
            f"{shown(next(iter(found.values())))}: remove one of them"
        )
    small = frozenset(own[suffix] for suffix in found if not parts[suffix].large)
    return _Layer(scheme, shape, {name: suffix for suffix, name in found.items()}, small)


def _check_header(files: WeightFiles, name: str, part: Part) -> None:
    path = files.file_of[name]
    shape, dtype = files.headers[path][name]
    if part.shape is not None and shape != part.shape:
        raise ValueError(
            f"{path}: {shown(name)} has shape {list(shape)}; by config.json and its quantization_config it should "
            f"have {list(part.shape)}"
        )
    if part.dtypes and dtype not in part.dtypes:
        raise ValueError(f"{path}: {shown(name)} is {dtype}; it should be {' or '.join(map(str, part.dtypes))}")


def _zero_bias(files: WeightFiles, name: str) -> set[str]:
    """The name of a bias that the model does not have, if it is there. Raises ValueError unless it is zero."""
    if name not in files.file_of:
        return set()
    path = files.file_of[name]
    for _, bias in files.tensors(path, [name], _CPU):
        if bias.any():
            raise ValueError(f"{path}: {shown(name)} is not zero, and config.json describes a model without it")
    return {name}
