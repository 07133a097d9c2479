"""Saving a model as safetensors. At every moment the folder contains one whole checkpoint: the old or the new one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..common.files import draft_of, json_bytes, remove_dead_drafts, share, write
from ..common.hub import WEIGHTS
from .weight_files import tied_names

SINGLE, INDEX = WEIGHTS[0]
_OWN_SHARD = re.compile(r"model(-\d+)?-\d{5}-of-\d{5}\.safetensors")


def save_weights(
    module: nn.Module, folder: Path, json_files: Mapping[str, dict[str, Any]], *, max_shard_size: int | str
) -> None:
    """Writes safetensors shards with their index, and `json_files`: file name -> content.

    Everything is written under temporary names first. Then the JSON files that changed are renamed, and last the weight
    file or the index, which makes the new shards count. After an error or KeyboardInterrupt the folder is as it was.
    No file system renames several files in one step: a process that is killed between those renames can leave new JSON
    files beside old weights of the same shapes. Files that an older checkpoint or a killed process left are removed
    once the new checkpoint is in place.

    Raises:
        ValueError: max_shard_size is not a size.
        OSError: the disk is full, or the folder cannot be written.
    """
    tied = tied_names(module)
    weights = {name: weight.detach() for name, weight in module.state_dict().items() if name not in tied}
    groups = _split(weights, _parse_size(max_shard_size))
    folder.mkdir(parents=True, exist_ok=True)
    single, index = folder / SINGLE, folder / INDEX
    target = single if len(groups) == 1 else index
    draft = draft_of(target)
    shards = [draft] if target == single else _unused(folder, len(groups))
    contents = {folder / name: json_bytes(content) for name, content in json_files.items()}
    before = {path: path.read_bytes() for path in (*contents, index) if path.is_file()}
    drafts = {path: draft_of(path) for path, content in contents.items() if before.get(path) != content}
    last = None  # the file that the last step removes: while it exists, the old checkpoint counts
    try:
        for path, group in zip(shards, groups, strict=True):
            save_file({name: weights[name].contiguous() for name in group}, path, metadata={"format": "pt"})
            share(path)
        if target == index:
            weight_map = {name: path.name for path, group in zip(shards, groups, strict=True) for name in group}
            total = sum(weight.nbytes for weight in weights.values())
            draft.write_bytes(json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map}))
        for path, other in drafts.items():
            other.write_bytes(contents[path])
        for path, other in drafts.items():
            other.replace(path)
        if target == index and single.is_file():
            # A single file wins over an index as long as it exists.
            draft.replace(index)
            last = single
            single.unlink()
        else:
            last = draft
            draft.replace(target)
    except BaseException as error:
        if last is None or last.exists():
            _restore(before, (*drafts, index), (draft, *shards, *drafts.values()))
        if isinstance(error, OSError | SafetensorError):
            failed = OSError(f"the model was not saved into {folder}, which is as it was ({error})")
            failed.errno = _errno(error)
            raise failed from error
        raise
    remove_dead_drafts(folder)
    for path in folder.iterdir():
        if path not in shards and (_OWN_SHARD.fullmatch(path.name) or (path == index != target)):
            path.unlink()


def _restore(before: Mapping[Path, bytes], changed: tuple[Path, ...], new: tuple[Path, ...]) -> None:
    """Removes the files in `new`, and gives those in `changed` the content that they had `before`, if any."""
    for path in new:
        path.unlink(missing_ok=True)
    for path in changed:
        if path not in before:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.read_bytes() != before[path]:
            write(path, before[path])


def _errno(error: Exception) -> int | None:
    """The error number of the system; safetensors has it only in its message."""
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else getattr(error, "errno", None)


def _unused(folder: Path, count: int) -> list[Path]:
    """Names for `count` shards, none of which exists yet."""
    for series in itertools.count(1):
        stem = "model" if series == 1 else f"model-{series}"
        paths = [folder / f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if not any(path.exists() for path in paths):
            return paths
    raise AssertionError("itertools.count has no end")


def _split(weights: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes; a larger tensor gets a group of its own."""
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
    """Bytes of 500000, "500MB" or "5GB" (decimal units). Raises ValueError for anything else."""
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
