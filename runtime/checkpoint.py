"""Checkpoints: all is checked by the files' headers first, then weights go shard by shard straight into place."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .config import InternLM3Config
from .files import locate, read_json, whole, write_json
from .keywords import reject_unknown

if TYPE_CHECKING:
    from .model import InternLM3ForCausalLM

GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FORMAT_NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers that some tools save although they follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")

# name -> (shape, dtype or the format's name of one that no weight may have)
Header = dict[str, tuple[tuple[int, ...], Any]]


def load_pretrained(
    cls: type[InternLM3ForCausalLM],
    id_or_path: str | os.PathLike[str],
    *,
    config: InternLM3Config | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    **unknown: Any,
) -> InternLM3ForCausalLM:
    """Loads a model from a local folder or the hub.

    Host memory stays under the model's size plus one shard.

    Args:
        id_or_path: a folder with config.json and weights, or a hub repository "owner/name".
        config: use this configuration instead of the checkpoint's.
        revision, token, cache_dir, local_files_only: as in huggingface_hub.
        dtype (or torch_dtype): "auto" (the default: what the checkpoint says), "bfloat16", "float16" or "float32".
        device_map: "auto" (the default: the GPU if there is one), or a device; this runtime runs on one device.
        device: the same as device_map.
        progress: show progress bars of download and load.

    Raises:
        FileNotFoundError: a file that the checkpoint should have is missing.
        ValueError: files that are damaged or disagree with each other or with config.json; the message names them.
        TypeError: an unknown keyword.
        MemoryError: the weights don't fit into the device's free memory.
    """
    if unknown:
        known = load_pretrained.__kwdefaults__ or {}
        # Remote code is never run, so its switch means nothing here and may stay in people's calls.
        reject_unknown("from_pretrained", [name for name in unknown if name != "trust_remote_code"], known)
    where = resolve_device(_agreed(device=device, device_map=device_map))
    wanted = _agreed(dtype=_resolve_dtype(dtype), torch_dtype=_resolve_dtype(torch_dtype))
    folder = locate(id_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    config = config or InternLM3Config.from_file(folder / "config.json")
    generation_config = read_generation_config(folder)

    skeleton = cls(config, device="meta")
    shapes = {name: tuple(weight.shape) for name, weight in skeleton.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    shards = _check_shards(folder, shapes)
    kept = wanted or DTYPES.get(config.dtype or "") or _common_dtype(shards)
    _check_memory(skeleton, kept, where)

    model = _materialise(skeleton, kept, where)
    model.tie_weights()
    weights = model.state_dict()
    bar = tqdm(total=len(shapes), desc="Loading weights", unit="tensor", disable=None if progress else True)
    with bar:
        for path in shards:
            for name, tensor in _tensors(path, shapes, where):
                weights[name].copy_(tensor)
                bar.update()
    model.generation_config = generation_config
    return model.eval()


def save_pretrained(
    model: InternLM3ForCausalLM, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> None:
    """Writes config.json, generation_config.json and safetensors shards with their index, in the hub's format.

    All files are written before the first of them takes its place: after an error the folder is as it was. Shards that
    an earlier save left, and that this one does not name, are removed.

    Raises:
        ValueError: a max_shard_size that is no size. OSError: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    groups = _split(weights, _parse_size(max_shard_size))
    names = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    )
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    notes = {"config.json": model.config.to_dict()}
    if model.generation_config:
        notes[GENERATION_CONFIG] = model.generation_config
    if len(groups) > 1:
        total = sum(weight.nbytes for weight in weights.values())
        weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        notes[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    try:
        with ExitStack() as drafts:
            for name, content in notes.items():
                write_json(drafts.enter_context(whole(folder / name)), content)
            for name, group in zip(names, groups, strict=True):
                draft = drafts.enter_context(whole(folder / name))
                save_file({key: weights[key].contiguous() for key in group}, draft, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise OSError(f"the model was not saved into {folder}, which is as it was ({error})") from error
    for pattern in ("model.safetensors", "model-?????-of-?????.safetensors", INDEX):
        for path in folder.glob(pattern):
            if path.name not in (*names, *notes):
                path.unlink()


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a checkpoint, {} where it has none. Raises ValueError where it is damaged."""
    path = folder / GENERATION_CONFIG
    return read_json(path) if path.is_file() else {}


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


def _agreed(**spellings: Any) -> Any:
    """The value given under one of two names, None where neither is. Raises ValueError where both are and differ."""
    given = {name: value for name, value in spellings.items() if value is not None}
    value = next(iter(given.values()), None)
    if any(other != value for other in given.values()):
        raise ValueError(f"{' and '.join(f'{name}={other!r}' for name, other in given.items())}: give one of them")
    return value


def _resolve_dtype(wanted: str | torch.dtype | None) -> torch.dtype | None:
    """None stands for the checkpoint's own."""
    if wanted is None or wanted == "auto":
        return None
    name = str(wanted).removeprefix("torch.")
    name = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}.get(
        name, name
    )
    if name not in DTYPES:
        raise ValueError(f"dtype {wanted!r} is not supported; give 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def _materialise(model: InternLM3ForCausalLM, dtype: torch.dtype, device: torch.device) -> InternLM3ForCausalLM:
    """Gives a model on the meta device memory, unset. (`to_empty` would do, and imports half a second of sympy.)"""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=dtype, device=device)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))
    return model


# -------------------------------------------------------------------- reading


def _check_shards(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[Path, Header]:
    """The checkpoint's weight files with their headers, after every check that needs no weight read."""
    shards: dict[Path, Header] = {}
    origin: dict[str, Path] = {}
    files, weight_map, index = _weight_files(folder)
    for path in files:
        shards[path] = header = _header(path)
        for name in header:
            if name in origin:
                raise ValueError(f"{path} and {origin[name]} both hold {name!r}: one of them is stale; remove it")
            origin[name] = path
    for name in {**weight_map, **origin} if index else ():
        said, held = weight_map.get(name, "no file"), origin[name].name if name in origin else "no file"
        if said != held:
            raise ValueError(f"{index} says that {name!r} lies in {said}, but {held} holds it; fetch both again")

    expected = set(shapes)
    extra = {name for name in origin if not name.endswith(_DERIVED)} - expected - {"lm_head.weight"}
    if missing := sorted(expected - set(origin)):
        raise ValueError(f"{folder}: {_listed(missing)} missing from the weights that config.json describes")
    if extra:
        first = min(extra)
        raise ValueError(
            f"{origin[first]}: {_listed(sorted(extra))} unexpected; config.json describes another model "
            "(or the checkpoint is quantised, which this runtime does not read)"
        )
    for name, shape in shapes.items():
        found, dtype = shards[origin[name]][name]
        if found != shape:
            raise ValueError(
                f"{origin[name]}: {name!r} has shape {list(found)}, and config.json makes it {list(shape)}"
            )
        if not isinstance(dtype, torch.dtype) or dtype not in _FORMAT_NAMES.values():
            raise ValueError(f"{origin[name]}: {name!r} is {dtype}; weights must be bfloat16, float16 or float32")
    return shards


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str], Path | None]:
    """The weight files, and what the index says of them where there is one."""
    for single, index_name in (
        ("model.safetensors", INDEX),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
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
        if (folder / single).is_file():
            return [folder / single], {}, None
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


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file. Only weights are read: a pickle that would run code is refused."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle may fail in any way at all
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or holds more than weights, and is not read ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} must hold a dictionary of tensors")
    return state


def _common_dtype(shards: Mapping[Path, Header]) -> torch.dtype:
    return next(dtype for header in shards.values() for _, dtype in header.values())


def _check_memory(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Raises MemoryError, with the arithmetic, where the weights can't fit into what a GPU has free."""
    if device.type != "cuda":
        return
    needed = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
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
