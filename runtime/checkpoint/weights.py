"""Checkpoints: all is checked by the files' headers first, then weights go shard by shard straight into place."""

from __future__ import annotations

import itertools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..common.files import draft_of, json_bytes, read_json, remove_dead_drafts, write
from ..common.hub import WEIGHTS

SINGLE, INDEX = WEIGHTS[0]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_FORMAT_NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OWN_SHARD = re.compile(r"model(-\d+)?-\d{5}-of-\d{5}\.safetensors")
# Buffers that some tools save although they follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")

# name -> (shape, dtype or the format's name of one that no weight may have)
Header = dict[str, tuple[tuple[int, ...], Any]]


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weight files, by their headers alone: which tensors they hold, and where each lies."""

    folder: Path
    files: dict[Path, Header]
    origin: dict[str, Path]

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """Raises FileNotFoundError for a missing file, ValueError for one that is damaged or disagrees with another."""
        files: dict[Path, Header] = {}
        origin: dict[str, Path] = {}
        paths, weight_map, index = _weight_files(folder)
        for path in paths:
            files[path] = header = _header(path)
            for name in header:
                if name in origin:
                    raise ValueError(f"{path} and {origin[name]} both hold {name!r}: one of them is stale; remove it")
                origin[name] = path
        for name in {**weight_map, **origin} if index else ():
            said, held = weight_map.get(name, "no file"), origin[name].name if name in origin else "no file"
            if said != held:
                raise ValueError(f"{index} says that {name!r} lies in {said}, but {held} holds it; fetch both again")
        return cls(folder, files, origin)

    def check_layers(self, layers: int) -> None:
        """Raises ValueError for more layers than tensors, before anybody builds so many."""
        if layers > len(self.origin):
            raise ValueError(
                f"{self.folder}: config.json describes {layers} layers, and the weight files hold {len(self.origin)} "
                "tensors: they belong to different models"
            )


def load_weights(
    module: nn.Module, stored: Weights, *, dtype: torch.dtype | None, device: torch.device, progress: bool
) -> None:
    """Gives a module on the meta device its weights, as `dtype` (None: as they are stored).

    A parameter that the module has under two names is read under the first; where the second is stored too, it must
    hold the same.

    Raises:
        ValueError: files that disagree with the module, or are damaged; the message names them.
        MemoryError: the weights don't fit into the device's free memory.
    """
    tied = _tied(module)
    shapes = {name: tuple(weight.shape) for name, weight in module.state_dict().items() if name not in tied}
    _check(stored, shapes, tied)
    dtype = dtype or _common_dtype(stored)
    _check_memory(module, dtype, device)

    _materialise(module, dtype, device)
    weights = module.state_dict()
    bar = tqdm(total=len(shapes), desc="Loading weights", unit="tensor", disable=None if progress else True)
    with bar:
        for path in stored.files:
            for name, tensor in _tensors(path, shapes, device):
                weights[name].copy_(tensor)
                bar.update()


def save_weights(
    module: nn.Module, folder: Path, notes: Mapping[str, dict[str, Any]], *, max_shard_size: int | str
) -> None:
    """Writes safetensors shards with their index, and `notes`: file name -> JSON.

    At every moment the folder holds the older weights or these: shards get names that no file has yet, and one step in
    the end makes them count. Right before it come the notes that changed, of which all is written but their names:
    after an error or an interruption all is as it was. (A process that is killed outright between these renames leaves
    new notes beside old weights, where both have one shape: no file system renames several files in one step.) What an
    older checkpoint has left, or a process that was killed, is removed when the new one stands.

    Raises:
        ValueError: a max_shard_size that is no size. OSError: the disk is full, or the folder cannot be written.
    """
    tied = _tied(module)
    weights = {name: weight.detach() for name, weight in module.state_dict().items() if name not in tied}
    groups = _split(weights, _parse_size(max_shard_size))
    folder.mkdir(parents=True, exist_ok=True)
    single, index = folder / SINGLE, folder / INDEX
    target = single if len(groups) == 1 else index
    draft = draft_of(target)
    shards = [draft] if target == single else _unused(folder, len(groups))
    contents = {folder / name: json_bytes(content) for name, content in notes.items()}
    before = {path: path.read_bytes() for path in (*contents, index) if path.is_file()}
    drafts = {path: draft_of(path) for path, content in contents.items() if before.get(path) != content}
    last = None  # what the last step takes away
    try:
        for path, group in zip(shards, groups, strict=True):
            save_file({name: weights[name].contiguous() for name in group}, path, metadata={"format": "pt"})
        if target == index:
            weight_map = {name: path.name for path, group in zip(shards, groups, strict=True) for name in group}
            total = sum(weight.nbytes for weight in weights.values())
            draft.write_bytes(json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map}))
        for path, other in drafts.items():
            other.write_bytes(contents[path])
        for path, other in drafts.items():
            other.replace(path)
        if target == index and single.is_file():
            # A single file counts as long as it is there, whatever an index says.
            draft.replace(index)
            last = single
            single.unlink()
        else:
            last = draft
            draft.replace(target)
    except BaseException as error:
        if last is None or last.exists():
            for path in (draft, *shards, *drafts.values()):
                path.unlink(missing_ok=True)
            for path in (*drafts, index):
                if path not in before:
                    path.unlink(missing_ok=True)
                elif not path.is_file() or path.read_bytes() != before[path]:
                    write(path, before[path])
        if isinstance(error, OSError | SafetensorError):
            failed = OSError(f"the model was not saved into {folder}, which is as it was ({error})")
            failed.errno = _errno(error)
            raise failed from error
        raise
    remove_dead_drafts(folder)
    for path in folder.iterdir():
        if path not in shards and (_OWN_SHARD.fullmatch(path.name) or (path == index != target)):
            path.unlink()


def _errno(error: Exception) -> int | None:
    """The system's number for what failed; safetensors has it in its text alone."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else getattr(error, "errno", None)


def _unused(folder: Path, count: int) -> list[Path]:
    """Names for so many shards, of which there is none yet."""
    for series in itertools.count(1):
        stem = "model" if series == 1 else f"model-{series}"
        paths = [folder / f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if not any(path.exists() for path in paths):
            return paths
    raise AssertionError("there is always a next series")


def resolve_device(wanted: str | torch.device | Mapping[str, Any] | None) -> torch.device:
    """The one device of a `device` or `device_map` argument. Raises ValueError for several, or one that is not here."""
    if isinstance(wanted, Mapping):
        devices = set(map(str, wanted.values()))
        if len(devices) != 1:
            raise ValueError(f"device_map spreads the model over {sorted(devices)}; this runtime runs on one device")
        wanted = next(iter(wanted.values()))
    if wanted is None or wanted == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)  # type: ignore[arg-type]
    except (RuntimeError, TypeError):
        raise ValueError(f"device {wanted!r} is no device; give 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"device {wanted!r} is not here: PyTorch sees {count} GPUs; give 'cpu' or another")
        return torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
    if device.type != "cpu":
        raise ValueError(f"device {wanted!r} is not supported; give 'auto', 'cpu' or 'cuda'")
    return device


def resolve_dtype(wanted: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name, or of PyTorch's own; None for None and "auto". Raises ValueError for any other."""
    if wanted is None or wanted == "auto":
        return None
    name = str(wanted).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in DTYPES:
        raise ValueError(f"dtype {wanted!r} is not supported; give 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def _tied(module: nn.Module) -> dict[str, str]:
    """The names of parameters that the module has under an earlier name too, each with that name."""
    first: dict[nn.Parameter, str] = {}
    names = ((name, first.setdefault(weight, name)) for name, weight in module.named_parameters(remove_duplicate=False))
    return {name: earlier for name, earlier in names if name != earlier}


def _materialise(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a module on the meta device memory, unset. (`to_empty` would do, and imports half a second of sympy.)"""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            if weight not in made:
                empty = torch.empty(weight.shape, dtype=dtype, device=device)
                made[weight] = nn.Parameter(empty, requires_grad=False)
            setattr(part, name, made[weight])


# -------------------------------------------------------------------- reading


def _check(stored: Weights, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> None:
    """Every check that needs no weight read, but for a `tied` one that is stored twice: both are read and compared."""
    origin, expected = stored.origin, set(shapes)
    extra = {name for name in origin if not name.endswith(_DERIVED)} - expected - tied.keys()
    if missing := sorted(expected - set(origin)):
        raise ValueError(f"{stored.folder}: {_listed(missing)} missing from the weights that config.json describes")
    if extra:
        first = min(extra)
        raise ValueError(
            f"{origin[first]}: {_listed(sorted(extra))} unexpected; config.json describes another model "
            "(or the checkpoint is quantised, which this runtime does not read)"
        )
    for name, shape in shapes.items():
        found, dtype = stored.files[origin[name]][name]
        if found != shape:
            raise ValueError(
                f"{origin[name]}: {name!r} has shape {list(found)}, and config.json makes it {list(shape)}"
            )
        if not isinstance(dtype, torch.dtype) or dtype not in _FORMAT_NAMES.values():
            raise ValueError(f"{origin[name]}: {name!r} is {dtype}; weights must be bfloat16, float16 or float32")
    for name, first in tied.items():
        if name in origin and not torch.equal(*(_tensor(origin[each], each) for each in (name, first))):
            raise ValueError(
                f"{origin[name]}: {name!r} is another one than {first!r}, and config.json says that they are the same "
                "(tie_word_embeddings): set that to false, or remove the tensor"
            )


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str], Path | None]:
    """The weight files, and what the index says of them where there is one."""
    for single, index_name in WEIGHTS:
        # As in transformers: a file of all weights counts before an index, which may be its base's old one.
        if (folder / single).is_file():
            return [folder / single], {}, None
        index = folder / index_name
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index} has no weight_map of names to files; fetch it again")
            for file in weight_map.values():
                if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
                    raise ValueError(f"{index} names {file!r}, which is no file of its own folder; fetch it again")
            paths = [folder / file for file in sorted(set(weight_map.values()))]
            for path in paths:
                if not path.is_file():
                    raise FileNotFoundError(f"{path} is missing, and {index} names it; fetch the checkpoint again")
            return paths, weight_map, index
    raise FileNotFoundError(
        f"{folder} holds no weights: it needs model.safetensors, or shards with model.safetensors.index.json"
    )


def _header(path: Path) -> Header:
    """Names, shapes and dtypes of a weight file, read without its weights."""
    if path.suffix == ".bin":
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _unpickle(path).items()}
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - no mapping
            return {
                name: (tuple(part.get_shape()), _FORMAT_NAMES.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); fetch it again") from None


def _tensors(path: Path, shapes: Mapping[str, Any], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors that the model has, one after the other."""
    if path.suffix == ".bin":
        yield from ((name, tensor) for name, tensor in _unpickle(path).items() if name in shapes)
        return
    with safe_open(path, framework="pt", device=str(device)) as shard:
        for name in shard.keys():  # noqa: SIM118 - no mapping
            if name in shapes:
                yield name, shard.get_tensor(name)


def _tensor(path: Path, name: str) -> Tensor:
    return next(tensor for _, tensor in _tensors(path, {name: None}, torch.device("cpu"))).float()


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file. Only weights are read: a pickle that would run code is refused."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle may fail in any way at all
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or holds more than weights, and is not read ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} must hold a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path} must hold tensors by name, and one is called {name!r}, a {type(name).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "a quantised" if tensor.is_quantized else "an empty" if tensor.is_meta else "a sparse"
            raise ValueError(f"{path}: {name!r} is {kind} tensor; weights must be plain ones")
    return state


def _common_dtype(stored: Weights) -> torch.dtype:
    return next(dtype for header in stored.files.values() for _, dtype in header.values())


def _check_memory(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Raises MemoryError, with the arithmetic, where the weights can't fit into what a GPU has free."""
    if device.type != "cuda":
        return
    needed = sum(weight.numel() for weight in module.parameters()) * dtype.itemsize
    free, total = torch.cuda.mem_get_info(device)
    if needed > free:
        raise MemoryError(
            f"the weights need {needed / 1e9:.1f} GB in {dtype}, and {device} has {free / 1e9:.1f} GB free of "
            f"{total / 1e9:.1f}: free some, take a smaller dtype, or device='cpu'"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return (
        f"{shown} and {len(names) - 3} more tensors are"
        if len(names) > 3
        else f"{shown} {'is' if len(names) == 1 else 'are'}"
    )


# -------------------------------------------------------------------- writing


def _split(weights: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes (a larger tensor stands alone)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        if groups[-1] and size + weight.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += weight.nbytes
    return groups


def _parse_size(size: int | str) -> int:
    """Bytes of 500000, "500MB" or "5GB"."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    try:
        if isinstance(size, str) and size[-2:].upper() in units:
            value = int(float(size[:-2]) * units[size[-2:].upper()])
        else:
            value = int(size)
    except (ValueError, TypeError, OverflowError):
        value = 0
    if value <= 0:
        raise ValueError(f"max_shard_size is {size!r}; give bytes, or a text such as '500MB' or '5GB'")
    return value
