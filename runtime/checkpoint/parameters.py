"""The parameters of a module in the files of a checkpoint: their names there, and whether they are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..common.shown import shown
from .weight_files import FLOATS, WeightFiles, tied_names

# Buffers that some tools save although they are computed from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_PREFIX = "model."  # of every name but that of the head
_HEAD = "lm_head.weight"  # which a module without a head leaves unread


def is_base(files: WeightFiles) -> bool:
    """Whether the files are those of a base model, whose names have no prefix "model." and which may have no head."""
    return not any(name.startswith(_PREFIX) for name in files.file_of)


def names_in(files: WeightFiles) -> Callable[[str], str]:
    """Maps the name of a parameter to its name in the files."""
    return (lambda name: name.removeprefix(_PREFIX)) if is_base(files) else str


def parameters_in(files: WeightFiles, module: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes of a module's parameters by their names in the files; and, of those that the module has twice, the
    name under which they are not read -> the one under which they are.
    """
    stored = names_in(files)
    pairs = [(stored(name), stored(first)) for name, first in tied_names(module).items()]
    # safetensors' save_model keeps only the later one.
    only_later = [name in files.file_of and first not in files.file_of for name, first in pairs]
    tied = dict(pair[::-1] if swap else pair for pair, swap in zip(pairs, only_later, strict=True))
    shapes = {stored(name): tuple(weight.shape) for name, weight in module.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if name not in tied}, tied


def check_parameters(files: WeightFiles, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> None:
    """Compares headers with a module's `parameters_in` the files. Only tied tensors that are stored twice are read.

    Raises ValueError, naming the tensor and its file, if one is missing, unexpected, or of another shape or dtype.
    """
    file_of, expected = files.file_of, set(shapes)
    extra = {name for name in file_of if not name.endswith(_DERIVED)} - expected - tied.keys() - {_HEAD}
    if missing := sorted(expected - set(file_of)):
        raise ValueError(f"{files.folder}: {_listed(missing)} missing from the weights that config.json describes")
    if extra:
        first = min(extra)
        raise ValueError(
            f"{file_of[first]}: {_listed(sorted(extra))} unexpected; config.json describes another model, or does not "
            "say how the checkpoint is quantised"
        )
    for name, shape in shapes.items():
        found, dtype = files.headers[file_of[name]][name]
        if found != shape:
            raise ValueError(
                f"{file_of[name]}: {shown(name)} has shape {list(found)}, and config.json makes it {list(shape)}"
            )
        if dtype not in FLOATS:
            raise ValueError(f"{file_of[name]}: {shown(name)} is {dtype}; weights must be bfloat16, float16 or float32")
    for name, first in tied.items():
        if name in file_of and not torch.equal(_tensor(files, name), _tensor(files, first)):
            raise ValueError(
                f"{file_of[name]}: {shown(name)} differs from {shown(first)}, and config.json says that they are the "
                "same (tie_word_embeddings): set that to false, or remove the tensor"
            )


def _tensor(files: WeightFiles, name: str) -> Tensor:
    """One tensor in float32."""
    (weight,) = (weight for _, weight in files.read(files.file_of[name], {name}, torch.device("cpu")))
    assert isinstance(weight, Tensor)  # nothing was asked for packed
    return weight.float()


def _listed(names: list[str]) -> str:
    """Up to three names and their verb: "'a' is", "'a', 'b', 'c' and 2 more tensors are"."""
    first = ", ".join(map(shown, names[:3]))
    if len(names) > 3:
        return f"{first} and {len(names) - 3} more tensors are"
    return f"{first} {'is' if len(names) == 1 else 'are'}"
