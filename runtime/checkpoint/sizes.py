"""How much memory the weights of a checkpoint take, from its small files."""

from __future__ import annotations

from pathlib import Path

import torch

from ..model.config import InternLM3Config
from ..model.model import LanguageModel
from .gguf.blocks import BLOCKS
from .gguf.folder import weights_of
from .quantised.bitsandbytes import FourBits
from .quantised.compressed_tensors import CompressedTensors
from .quantised.methods import method_of
from .weight_files import tied_names

_LAYER = "_proj.weight"  # of what quantisation methods quantise by default
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


def weight_bytes(folder: Path, config: InternLM3Config, dtype: torch.dtype) -> dict[str, int]:
    """The bytes of each parameter by its name: as it is stored where it stays quantised, else in `dtype`.

    In memory, scales of quantised weights take 32 bits each, which may be a few percent more.
    """
    module = LanguageModel(config, device="meta")
    tied = tied_names(module)
    shapes = {name: weight.shape for name, weight in module.state_dict().items() if name not in tied}
    sizes = {name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}
    if (files := weights_of(folder, config)) is not None:
        stored = {name: source.tensor.end - source.tensor.begin for name, source in files.sources.items()}
        return sizes | {name: stored[name] for name in files.layouts.keys() & sizes.keys() - {_EMBEDDING}}
    method = method_of(folder, config.extra)
    if method is None:
        return sizes
    # Only compressed-tensors says in the configuration whether the head is quantised, which it seldom is.
    layers = (_LAYER, _HEAD) if isinstance(method, CompressedTensors) else (_LAYER,)
    for name in sizes:
        scheme = method.scheme(name.removesuffix(".weight")) if name.endswith(layers) else None
        if scheme is not None and not isinstance(scheme, FourBits):  # which is converted when it is loaded
            try:
                parts = scheme.parts((shapes[name][0], shapes[name][1])).values()
            except ValueError:
                continue  # it was left as it was because of its shape, or loading it is an error
            sizes[name] = sum(
                torch.Size(part.shape).numel() * part.dtypes[0].itemsize
                for part in parts
                if part.shape is not None and not part.optional
            )
    return sizes


def stored_as(folder: Path, config: InternLM3Config) -> str | None:
    """In a few words how the weights are quantised; None if they are not."""
    if (files := weights_of(folder, config)) is not None:
        names = {BLOCKS[files.sources[name].tensor.kind].name for name in files.layouts}
        return f"GGUF ({', '.join(sorted(names))})" if names else None
    method = method_of(folder, config.extra)
    return None if method is None else method.summary


def read_per_token(sizes: dict[str, int]) -> int:
    """The bytes of weights that decoding one token reads: all but the embedding, of which it reads a row."""
    return sum(size for name, size in sizes.items() if name != _EMBEDDING)
