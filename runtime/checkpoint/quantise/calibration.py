"""The inputs of a model's linear layers on a text, block by block: one block is in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...model.config import InternLM3Config
from ...model.kv_cache import BatchMetadata, PagedKVCache, pages_of
from ...model.model import Decoder
from ...model.rope import inverse_frequencies

WINDOW = 512  # tokens of the text that attend to one another


def shipped_text() -> str:
    """Prose, dialogue, instructions, mathematics and code in English, and some Chinese."""
    return files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")


class Inputs(NamedTuple):
    """What the linear layers of a block multiply, a row for each token of the text.

    Attributes:
        attention: [N, C] float32, of q_proj, k_proj and v_proj.
        mlp: [N, C] float32, of gate_proj and up_proj.
        down: [N, F] float32, of down_proj.
    """

    attention: Tensor
    mlp: Tensor
    down: Tensor


class Calibration:
    """A text on its way through the blocks of a model, in float32.

    Args:
        config: of the model.
        embedded: [N, C], the rows of the embedding for the tokens of the text.
        device: of the blocks.
    """

    def __init__(self, config: InternLM3Config, embedded: Tensor, device: torch.device):
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        one = InternLM3Config.from_dict({**config.to_dict(), **tokens, "num_hidden_layers": 1, "vocab_size": 1})
        self._windows = list(embedded.to(device, torch.float32).split(WINDOW))
        self._decoder = _Recording(one, device=device, dtype=torch.float32)
        self._kv_cache = PagedKVCache(one, pages_of(WINDOW), torch.float32, device)

    @torch.inference_mode()
    def run(self, weights: Mapping[str, Tensor]) -> Inputs:
        """Runs the next block. `weights`: its parameters, by their names in it."""
        decoder = self._decoder
        decoder.layers[0].load_state_dict(weights)
        decoder.recorded = []
        for index, x in enumerate(self._windows):
            pages = pages_of(len(x))
            batch = BatchMetadata(
                torch.arange(pages, dtype=torch.int32, device=x.device)[None],
                torch.full((1,), len(x), dtype=torch.int32, device=x.device),
                inverse_frequencies(decoder.config, len(x), x.device)[None],
            )
            self._windows[index] = decoder.run(x, batch, self._kv_cache)
        attention, mlp, down = (torch.cat(decoder.recorded[place::3]) for place in range(3))
        return Inputs(attention, mlp, down)


class _Recording(Decoder):
    """A decoder whose ops keep what linear layers multiply, in the order in which a block runs them."""

    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__(config, **factory)
        self.recorded: list[Tensor] = []

    @property
    def ops(self) -> Any:
        return _RecordingOps(super().ops, self.recorded)


class _RecordingOps:
    def __init__(self, ops: ModuleType, recorded: list[Tensor]):
        self._ops = ops
        self._recorded = recorded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def rms_norm_qkv_rope_cache(self, x: Tensor, weight: Tensor, eps: float, *rest: Any, **options: Any) -> Tensor:
        self._recorded.append(self._ops.rms_norm(x, weight, eps))
        return self._ops.rms_norm_qkv_rope_cache(x, weight, eps, *rest, **options)

    def rms_norm_swiglu(self, x: Tensor, weight: Tensor, eps: float, *rest: Any, **options: Any) -> Tensor:
        self._recorded.append(self._ops.rms_norm(x, weight, eps))
        h = self._ops.rms_norm_swiglu(x, weight, eps, *rest, **options)
        self._recorded.append(h)
        return h
