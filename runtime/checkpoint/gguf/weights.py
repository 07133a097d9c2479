"""The tensors of a GGUF file under the names of a checkpoint."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ....kernels.quantised import Layout, Weight
from ...common.shown import shown
from ..quantised.integers import Integers
from ..weight_files import WeightFiles
from .blocks import BLOCKS, numbers
from .reader import GGUFHeader, StoredTensor

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Names of a layer's tensors: GGUF -> InternLM3.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Source(NamedTuple):
    """A tensor of the file. heads: how many heads of rows in pairs it has, 0 if its rows are in order."""

    tensor: StoredTensor
    heads: int


@dataclass(frozen=True)
class GGUFWeights(WeightFiles):
    """The weights of a GGUF file, in float32."""

    sources: Mapping[str, _Source]

    @property
    def quantised(self) -> Collection[str]:
        return [name for name, source in self.sources.items() if BLOCKS[source.tensor.kind].size > 1]

    @classmethod
    def of(cls, header: GGUFHeader, heads: int, kv_heads: int) -> GGUFWeights:
        """Raises ValueError for a tensor that a model of this kind does not have."""
        in_pairs = {"attn_q": heads, "attn_k": kv_heads}
        sources: dict[str, _Source] = {}
        for name, tensor in header.tensors.items():
            part, kind = name.rpartition(".")[::2]
            beginning, layer, rest = (
                ("model.layers", *part.split(".", 2)[1:]) if part.count(".") == 2 else ("", "", part)
            )
            target = LAYER_TENSORS.get(rest) if beginning and name.startswith("blk.") else _TOP.get(part)
            if target is None or kind not in ("weight", "bias"):
                raise ValueError(f"{header.path}: {shown(name)} is a tensor that InternLM3 has no place for")
            full = f"{beginning}.{layer}.{target}.{kind}" if beginning else f"{target}.{kind}"
            sources[full] = _Source(tensor, in_pairs.get(rest, 0))
        layouts = {name: layout for name, source in sources.items() if (layout := _layout(source.tensor)) is not None}
        tensors = {name: (source.tensor.shape, torch.float32) for name, source in sources.items()}
        return cls(header.path, {header.path: tensors}, dict.fromkeys(sources, header.path), layouts, sources)

    def read(
        self, path: Path, names: Collection[str], device: torch.device, packed: Collection[str] = ()
    ) -> Iterator[tuple[str, Weight]]:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as content:
            for name, (tensor, heads) in self.sources.items():
                if name in names:
                    # The copy outlives the map.
                    data = torch.frombuffer(
                        content, dtype=torch.uint8, count=tensor.end - tensor.begin, offset=tensor.begin
                    )
                    data = data.to(device, copy=True)
                    found = numbers(tensor.kind, data, tensor.shape)
                    if heads:
                        found = _in_order(found, heads)
                    yield name, found if isinstance(found, Tensor) else found.as_weight(packed=name in packed)


def _layout(tensor: StoredTensor) -> Layout | None:
    """How the ops take a matrix, None if they don't."""
    found = numbers(tensor.kind, torch.empty(tensor.end - tensor.begin, dtype=torch.uint8, device="meta"), tensor.shape)
    return None if isinstance(found, Tensor) else found.layout()


def _in_order(found: Integers | Tensor, heads: int) -> Integers | Tensor:
    """`unpermute` of the rows of a weight."""
    if isinstance(found, Tensor):
        return unpermute(found, heads)
    minimum = None if found.minimum is None else unpermute(found.minimum, heads)
    return found._replace(q=unpermute(found.q, heads), scale=unpermute(found.scale, heads), minimum=minimum)


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Reorders the rows of a q or k projection, or its bias, [heads * head_dim, ...] from llama.cpp's order.

    RoPE rotates rows in pairs. llama.cpp has the two rows of a pair side by side; a checkpoint has the first rows of
    all pairs of a head, then the second rows.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
