"""Writing tensors as safetensors one by one, so that at most one file's are in memory."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ...common.files import json_bytes, share
from ...common.hub import WEIGHTS

SINGLE, INDEX = WEIGHTS[0]
LIMIT = 2 * 10**9  # bytes in a file; a larger tensor gets a file of its own


class Shards:
    """The weight files of a new checkpoint in `folder`, which has none yet. They count after `finish`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._written: list[list[str]] = []  # the names in each file
        self._pending: dict[str, Tensor] = {}
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises SafetensorError if a file cannot be written."""
        if self._pending and sum(each.nbytes for each in self._pending.values()) + tensor.nbytes > LIMIT:
            self._flush()
        self._pending[name] = tensor.cpu().contiguous()
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Writes the rest and the index, if there are several files. Raises as `add`."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._draft(0).rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._written):
            shard = self._folder / f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._draft(index).rename(shard)
            weight_map |= dict.fromkeys(names, shard.name)
        content = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._folder / INDEX).write_bytes(json_bytes(content))

    def _flush(self) -> None:
        draft = self._draft(len(self._written))
        save_file(self._pending, draft, metadata={"format": "pt"})
        share(draft)
        self._written.append(list(self._pending))
        self._pending = {}

    def _draft(self, index: int) -> Path:
        return self._folder / f"{index}.draft"
