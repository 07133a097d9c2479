"""The weight files of a checkpoint: which tensors they contain, and reading them."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...kernels.quantised import Layout, Weight
from ..common.checks import is_unicode
from ..common.files import has_file, read_json
from ..common.hub import weight_names
from ..common.shown import one_line, shown

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what a weight may be stored as
_SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}

# Tensor name -> (shape, dtype). A dtype that no tensor may have is kept under the file format's own name.
Header = dict[str, tuple[tuple[int, ...], Any]]


@dataclass(frozen=True)
class WeightFiles:
    """The headers of a checkpoint's weight files, read without the weights.

    Attributes:
        folder: the checkpoint; a GGUF file is one.
        headers: the header of each file.
        file_of: tensor name -> the file that contains it.
        layouts: of the weights that can be read in the form of the ops' quantised weights.
    """

    folder: Path
    headers: dict[Path, Header]
    file_of: dict[str, Path]
    layouts: Mapping[str, Layout]

    @property
    def quantised(self) -> Collection[str]:
        """The weights that are stored quantised, in whatever form."""
        return ()

    @classmethod
    def open(cls, folder: Path) -> WeightFiles:
        """Reads all headers and compares them with the index, if there is one.

        Raises:
            FileNotFoundError: no weights, or a file that the index names is missing.
            ValueError: a damaged file, or two files that contradict each other; the message names them.
        """
        headers: dict[Path, Header] = {}
        file_of: dict[str, Path] = {}
        paths, weight_map, index = _find(folder)
        if not is_unicode(str(folder)):
            raise ValueError(f"{shown(str(folder))} is not UTF-8, and safetensors reads no such folder: rename it")
        for path in paths:
            headers[path] = header = read_header(path)
            for name in header:
                if name in file_of:
                    raise ValueError(
                        f"{path} and {file_of[name]} both contain {shown(name)}: one of them is stale; remove it"
                    )
                file_of[name] = path
        for name in {**weight_map, **file_of} if index else ():
            expected, found = weight_map.get(name, "no file"), file_of[name].name if name in file_of else "no file"
            if expected != found:
                raise ValueError(
                    f"{index} says that {shown(name)} is in {expected}, but {found} contains it; fetch both again"
                )
        return cls(folder, headers, file_of, {})

    def read(
        self, path: Path, names: Collection[str], device: torch.device, packed: Collection[str] = ()
    ) -> Iterator[tuple[str, Weight]]:
        """Yields the weights of one file that are in `names`, one at a time (those of a .bin file on the CPU).

        Those in `packed`, which are in `layouts`, are quantised weights; all others are tensors.
        """
        yield from self.tensors(path, names, device)

    def tensors(self, path: Path, names: Collection[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yields tensors as they are stored."""
        if path.suffix == ".bin":
            yield from ((name, tensor) for name, tensor in _unpickle(path).items() if name in names)
            return
        with safe_open(path, framework="pt", device=str(device)) as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                if name in names:
                    yield name, shard.get_tensor(name)

    def check_layers(self, layers: int) -> None:
        """Raises ValueError if config.json describes more layers than there are tensors.

        Called before the model is built: building 50 000 layers takes a minute and gigabytes.
        """
        if layers > len(self.file_of):
            raise ValueError(
                f"{self.folder}: config.json describes {layers} layers, and the weight files contain "
                f"{len(self.file_of)} tensors: they belong to different models"
            )


def tied_names(module: nn.Module) -> dict[str, str]:
    """Names of parameters that the module has under two names: the later name -> the earlier one.

    A checkpoint stores such a parameter once, under the earlier name.
    """
    first: dict[nn.Parameter, str] = {}
    names = ((name, first.setdefault(weight, name)) for name, weight in module.named_parameters(remove_duplicate=False))
    return {name: earlier for name, earlier in names if name != earlier}


@contextmanager
def naming(*what: object) -> Iterator[None]:
    """The messages of ValueErrors begin with `what`: a file, a layer."""
    try:
        yield
    except ValueError as error:
        raise ValueError(": ".join(map(str, [*what, error]))) from None


def read_header(path: Path) -> Header:
    """Names, shapes and dtypes of the tensors in one file. Raises ValueError if it is damaged."""
    if path.suffix == ".bin":
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _unpickle(path).items()}
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - not a mapping
            return {
                name: (tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({one_line(str(error))}); fetch it again") from None


def _find(folder: Path) -> tuple[list[Path], dict[str, str], Path | None]:
    """The weight files; with an index also its map, tensor name -> file name, and its path."""
    for single, index_name in weight_names(folder):
        # As in transformers, a single file wins over an index, which may be left over from the base model.
        if has_file(folder / single):
            return [folder / single], {}, None
        index = folder / index_name
        if has_file(index):
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index} has no weight_map of names to files; fetch it again")
            for name, file in weight_map.items():
                if not isinstance(file, str) or not _is_file_name(file):
                    raise ValueError(
                        f"{index} names {shown(file)} for {shown(name)}, which is no file of its own folder; "
                        "fetch it again"
                    )
            paths = [folder / file for file in sorted(set(weight_map.values()))]
            for path in paths:
                if not has_file(path):
                    raise FileNotFoundError(f"{path} is missing, and {index} names it; fetch the checkpoint again")
            return paths, weight_map, index
    raise FileNotFoundError(
        f"{folder} contains no weights: it needs model.safetensors, or shards with model.safetensors.index.json"
    )


def _is_file_name(text: str) -> bool:
    """Whether a text names a file of a folder, and a file can have that name."""
    return Path(text).name == text != ".." and text.isprintable() and 0 < len(text.encode()) <= 255


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file. Reads weights only: a pickle that would run code is refused."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or contains more than weights, and is not read ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} must contain a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(
                f"{path} must contain tensors by name, and one is called {shown(name)}, a {type(name).__name__}"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "a quantised" if tensor.is_quantized else "an empty" if tensor.is_meta else "a sparse"
            raise ValueError(f"{path}: {shown(name)} is {kind} tensor; weights must be dense tensors")
    return {name: tensor.detach() for name, tensor in state.items()}  # parameters would want gradients
