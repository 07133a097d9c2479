"""Quantised weights in the form of compressed-tensors, which `quantised.compressed_tensors` reads and describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..quantised.integers import Integers
from .rounding import HEAD, Form

_FORMATS: Mapping[Form, str] = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}


class Kind(NamedTuple):
    """What the layers of one group of the configuration have in common. `group`: inputs to a scale; None: all."""

    form: Form
    group: int | None
    symmetric: bool


def tensors(integers: Integers, kind: Kind) -> dict[str, Tensor]:
    """The tensors of a layer, by what follows the layer's name."""
    if kind.form != "int4":
        return {"weight": integers.q, "weight_scale": integers.scale}
    packed = {
        "weight_packed": pack(integers.q, 1),
        "weight_scale": integers.scale,
        "weight_shape": torch.tensor(integers.q.shape, dtype=torch.int64, device="cpu"),
    }
    if isinstance(integers.zero, Tensor):
        packed["weight_zero_point"] = pack(integers.zero, 0)
    return packed


def settings(layers: Mapping[str, Kind], ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint.

    Args:
        layers: the quantised layers by their names.
        ignored: the names of the linear layers that are not quantised.
    """
    kinds: dict[Kind, set[str]] = {}
    for name, kind in layers.items():
        kinds.setdefault(kind, set()).add(name.rpartition(".")[2])
    projections = [kind for kind, names in kinds.items() if names != {HEAD}]
    groups: dict[str, dict[str, Any]] = {}
    # A reader that takes the first match finds the head before the layers in general.
    for kind, names in sorted(kinds.items(), key=lambda item: item[1] != {HEAD}):
        if names == {HEAD}:
            targets = [HEAD]
        else:
            targets = ["Linear"] if len(projections) == 1 else [rf"re:.*\.{name}$" for name in sorted(names)]
        groups[f"group_{len(groups)}"] = {
            "targets": targets,
            "weights": _weights(kind),
            "input_activations": None,
            "output_activations": None,
            "format": _FORMATS[kind.form],
        }
    formats = {_FORMATS[kind.form] for kind in kinds}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def _weights(kind: Kind) -> dict[str, Any]:
    return {
        "num_bits": 4 if kind.form == "int4" else 8,
        "type": "float" if kind.form == "fp8" else "int",
        "symmetric": kind.symmetric,
        "strategy": "channel" if kind.group is None else "group",
        "group_size": kind.group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }


def pack(fields: Tensor, dim: int) -> Tensor:
    """Eight fields of 4 bits in an int32 word, the lowest first: the inverse of `unpack`.

    Args:
        fields: uint8 [O, I], from 0 to 15.
        dim: the dimension that gets eight times shorter, rounded up.
    """
    moved = fields.movedim(dim, -1)
    moved = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % 8)).unflatten(-1, (-1, 8))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=fields.device)
    # The fields do not overlap, so their sum, which wraps, is their union.
    words = (moved.int() << shifts).sum(-1, dtype=torch.int32)
    return words.movedim(-1, dim).contiguous()
