"""A quantised checkpoint from one that is not: one block of the model at a time is read, rounded and written."""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from ...common.files import json_bytes, read_json
from ...common.hub import weight_names
from ...common.progress import hides_bar
from ...model.config import InternLM3Config
from ...model.model import LanguageModel
from ..gguf.folder import file_of
from ..parameters import check_parameters, is_base, names_in, parameters_in
from ..quantised.integers import Integers
from ..quantised.methods import FILE, KEY, method_of
from ..weight_files import WeightFiles, naming
from .activation_scaling import scale
from .calibration import Calibration
from .compressed import Kind, settings, tensors
from .rounding import GROUPS, HEAD, Form, form_of, group_size, to_integers
from .shards import Shards

_WEIGHT = ".weight"
_BLOCK = re.compile(r"(?:model\.)?layers\.\d+\.")
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CPU = torch.device("cpu")


def quantise_checkpoint(
    source: Path,
    target: Path,
    form: Form,
    *,
    group: int = GROUPS[0],
    symmetric: bool = False,
    calibration: Sequence[int] | None = None,
    device: torch.device = _CPU,
    progress: bool = True,
) -> None:
    """Writes a checkpoint with its linear layers quantised, as compressed-tensors, and all else as it is.

    The new folder appears once it is complete. Memory holds one block, one file of the result, and with a calibration
    what the block computes for the text.

    Args:
        source: the folder of the checkpoint.
        target: a folder that does not exist, or is empty.
        form, group, symmetric: see `rounding`.
        calibration: token ids of a text by which weights are scaled before they are rounded; None: they are not.
        device: where to compute.
        progress: show a progress bar on a terminal.

    Raises:
        FileExistsError: there is something in `target`.
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: the checkpoint is quantised already, or damaged, or has weights that cannot be rounded.
        OSError: the disk is full, or `target` cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already: name a folder that does not exist, or is empty")
    model = _Source(source)
    kinds = {name: kind for name in model.known if (kind := model.kind(name, form, group, symmetric)) is not None}
    layers = {name.removesuffix(_WEIGHT): kind for name, kind in kinds.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(model.files.file_of), desc="Quantising", unit="tensor", disable=hides_bar(progress))
    with bar, tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        draft = Path(temporary, "checkpoint")
        draft.mkdir()
        shards = Shards(draft)
        try:
            for name, weight, dtype in _weights(model, kinds, calibration, device):
                if name in kinds:
                    layer, integers = name.removesuffix(_WEIGHT), _rounded(model, name, weight, dtype, kinds[name])
                    for suffix, part in tensors(integers, kinds[name]).items():
                        shards.add(f"{layer}.{suffix}", part)
                else:
                    shards.add(name, weight)
                bar.update()
            shards.finish()
            ignored = [] if HEAD in layers else [HEAD]
            (draft / "config.json").write_bytes(
                json_bytes({**read_json(source / "config.json"), KEY: settings(layers, ignored)})
            )
            replaced = {"config.json", FILE, *(index for _, index in weight_names(source))}
            for path in source.iterdir():
                if path.is_file() and not path.name.endswith(_OTHER_WEIGHTS) and path.name not in replaced:
                    shutil.copyfile(path, draft / path.name)
            if target.exists():
                target.rmdir()
            draft.rename(target)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{target} could not be written ({error})") from error


class _Source:
    """The checkpoint to be quantised, checked by its headers.

    Attributes:
        files: its weight files.
        known: the tensors of the model that config.json describes, in the model's order.
        others: those that a model does not read, such as a head that is the embedding's; they are copied.
        embedding: the name of the embedding.
        shared: the tensors that are two parameters at once; they are not quantised.
    """

    def __init__(self, folder: Path):
        """Raises ValueError for a checkpoint that is quantised already, or whose tensors are not those of the model."""
        self.config = InternLM3Config.from_file(folder / "config.json")
        if (path := file_of(folder)) is not None:
            raise ValueError(
                f"{path}: a GGUF file cannot be quantised again: name the checkpoint that it was made from"
            )
        if (method := method_of(folder, self.config.extra)) is not None:
            raise ValueError(
                f"{folder} is quantised already ({method.summary}): name the checkpoint that it was made from"
            )
        self.files = WeightFiles.open(folder)
        self.files.check_layers(self.config.num_hidden_layers)
        module: Any = LanguageModel(self.config, device="meta")
        if is_base(self.files) and f"{HEAD}{_WEIGHT}" not in self.files.file_of:
            module = module.model
        shapes, tied = parameters_in(self.files, module)
        check_parameters(self.files, shapes, tied)
        self.known = list(shapes)
        self.others = sorted(self.files.file_of.keys() - shapes.keys())
        embedding = names_in(self.files)("model.embed_tokens.weight")
        self.embedding = tied.get(embedding, embedding)
        self.shared = {*tied.values()}

    def kind(self, name: str, form: Form, group: int, symmetric: bool) -> Kind | None:
        """How a tensor is quantised in a model that is quantised to `form`; None if it is not."""
        own = form_of(name, form)
        if own is None or not name.endswith(_WEIGHT) or name in self.shared:
            return None
        if own != "int4":
            return Kind(own, None, True)
        (_, inputs), _ = self.files.headers[self.files.file_of[name]][name]
        with naming(self.files.folder):
            return Kind(own, group_size(name, inputs, group), symmetric)

    def read(self, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(self.files.file_of[name] for name in names):
            found |= {name: tensor.to(device) for name, tensor in self.files.tensors(path, names, device)}
        return {name: found[name] for name in names}


def _weights(
    model: _Source, kinds: Mapping[str, Kind], calibration: Sequence[int] | None, device: torch.device
) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """The name of each tensor, the tensor, scaled if there is a calibration, and the dtype that it is stored in."""
    text = None
    if calibration is not None:
        embedding = model.read([model.embedding], _CPU)[model.embedding]
        text = Calibration(model.config, embedding[list(calibration)], device)
        del embedding
    for prefix, names in itertools.groupby(model.known, _block_of):
        weights = model.read(list(names), device)
        dtypes = {name: weight.dtype for name, weight in weights.items()}
        if prefix and text is not None:
            weights = _scaled(model, prefix, weights, kinds, text)
        for name in list(weights):
            yield name, weights.pop(name), dtypes[name]
    for name in model.others:
        weight = model.read([name], _CPU)[name]
        yield name, weight, weight.dtype


def _scaled(
    model: _Source, prefix: str, weights: Mapping[str, Tensor], kinds: Mapping[str, Kind], text: Calibration
) -> dict[str, Tensor]:
    """The weights of a block, scaled. `prefix`: the beginning of their names."""
    block = {name.removeprefix(prefix): weight for name, weight in weights.items()}

    def rounding(name: str, weight: Tensor) -> Tensor:
        full = f"{prefix}{name}"
        return _rounded(model, full, weight, weights[full].dtype, kinds[full]).weight()

    scale(block, text.run(block), rounding)
    return {f"{prefix}{name}": weight for name, weight in block.items()}


def _block_of(name: str) -> str:
    """The beginning of the names of a block's tensors; "" for a tensor of no block."""
    match = _BLOCK.match(name)
    return match[0] if match else ""


def _rounded(model: _Source, name: str, weight: Tensor, dtype: torch.dtype, kind: Kind) -> Integers:
    with naming(model.files.file_of[name]):
        return to_integers(name, weight, dtype, kind.form, kind.group or -1, kind.symmetric)
