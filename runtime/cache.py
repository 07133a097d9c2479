"""The keys and values of a batch of sequences, for the plain forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import InternLM3Config


class KVCache:
    """Keys (rotated) and values of every layer, each row as long as its own sequence; grows as tokens come.

    Attributes:
        lengths: tokens held by each row, a list of B integers. Padding is not held.
        columns: columns of input seen, padding included: where the next default position begins.
        inv_freq: [B, D/2] float32, each row's rotary frequencies, set when its first tokens enter and fixed from then
            on; None before that.
    """

    def __init__(self, config: InternLM3Config, batch: int, dtype: torch.dtype, device: torch.device):
        self.lengths = [0] * batch
        self.columns = 0
        self.inv_freq: Tensor | None = None
        self._kv = torch.empty(
            (config.num_hidden_layers, 2, batch, 0, config.num_key_value_heads, config.head_dim),
            dtype=dtype,
            device=device,
        )

    def get_seq_length(self) -> int:
        """Columns of input seen, as transformers counts them."""
        return self.columns

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` more in every row; grows by half at least, so that appending stays cheap."""
        held, capacity = max(self.lengths), self._kv.shape[3]
        if held + tokens <= capacity:
            return
        grown = self._kv.new_empty((*self._kv.shape[:3], max(held + tokens, capacity * 3 // 2), *self._kv.shape[4:]))
        grown[:, :, :, :held] = self._kv[:, :, :, :held]
        self._kv = grown

    def append(self, layer: int, row: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v [T, K, D] behind the row's tokens; returns all of the layer's [L + T, K, D], as views.

        Lengths move on in `advance`, once every layer has written.
        """
        start, end = self.lengths[row], self.lengths[row] + k.shape[0]
        keys, values = self._kv[layer, 0, row], self._kv[layer, 1, row]
        keys[start:end] = k
        values[start:end] = v
        return keys[:end], values[:end]

    def advance(self, tokens: list[int], columns: int) -> None:
        """Row b now holds tokens[b] more, of `columns` columns of input."""
        self.lengths = [length + new for length, new in zip(self.lengths, tokens, strict=True)]
        self.columns += columns

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these; a row may be kept more than once."""
        self.lengths = [self.lengths[row] for row in rows]
        self._kv = self._kv[:, :, rows]
        if self.inv_freq is not None:
            self.inv_freq = self.inv_freq[rows]

    @classmethod
    def join(cls, caches: list[KVCache]) -> KVCache:
        """One cache of all the rows of `caches`, which have begun and are not used again."""
        joined = cls.__new__(cls)
        joined.lengths = [length for cache in caches for length in cache.lengths]
        joined.columns = max(cache.columns for cache in caches)
        joined.inv_freq = torch.cat([cache.inv_freq for cache in caches if cache.inv_freq is not None])
        first, held = caches[0]._kv, max(joined.lengths)
        joined._kv = first.new_empty((*first.shape[:2], len(joined.lengths), held, *first.shape[4:]))
        row = 0
        for cache in caches:
            for own, length in enumerate(cache.lengths):
                joined._kv[:, :, row, :length] = cache._kv[:, :, own, :length]
                row += 1
        return joined
