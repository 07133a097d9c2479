"""What `forward` returns as past_key_values: the keys and values of a batch of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.kv_cache import BatchMetadata, PagedKVCache, pages_of


@dataclass(eq=False)
class KVCache:
    """Keys (rotated) and values of B sequences of different lengths.

    Attributes:
        kv_cache: the pages, all of which belong to these sequences.
        pages: the pages of each sequence, in order.
        lengths: cached tokens of each sequence. Padding is not cached.
        real: [B, columns] bool on the host, one column for each column of input so far: False marks padding, which is
            not cached. The next default position is the number of columns.
        inv_freq: [B, D/2] float32, rotary frequencies of each sequence, set when its first tokens enter and fixed from
            then on; None before that.
    """

    kv_cache: PagedKVCache
    pages: list[list[int]]
    lengths: list[int] = field(default_factory=list)
    real: Tensor = field(init=False)
    inv_freq: Tensor | None = None

    def __post_init__(self) -> None:
        self.lengths = self.lengths or [0] * len(self.pages)
        self.real = torch.ones(len(self.pages), 0, dtype=torch.bool, device="cpu")
        self._table = self._block_table()

    @property
    def columns(self) -> int:
        return self.real.shape[1]

    def get_seq_length(self) -> int:
        """Columns of input so far, as transformers counts them."""
        return self.columns

    @torch.inference_mode(False)
    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` more in every sequence; grows by half at least, so that appending stays cheap."""
        needed, capacity = pages_of(max(self.lengths) + tokens), min(map(len, self.pages))
        if any(pages_of(n + tokens) > len(pages) for n, pages in zip(self.lengths, self.pages, strict=True)):
            self.pages = self.kv_cache.grow(self.pages, max(needed, capacity * 3 // 2))
            self._table = self._block_table()

    def batch(self, rows: Sequence[int], tokens: int, positions: Tensor | None) -> BatchMetadata:
        """The metadata of a launch of `tokens` new tokens of each of these sequences; positions [rows, tokens]."""
        assert self.inv_freq is not None
        device = self._table.device
        seq_lens = torch.tensor([self.lengths[row] + tokens for row in rows], dtype=torch.int32, device=device)
        if positions is not None:
            positions = positions.flatten().to(torch.int32).contiguous()
        all_rows = list(rows) == list(range(len(self.pages)))  # as in every decode step, which then copies nothing
        table, inv_freq = (x if all_rows else x[list(rows)] for x in (self._table, self.inv_freq))
        return BatchMetadata(table, seq_lens, inv_freq, positions)

    def advance(self, real: Tensor) -> None:
        """Counts T columns of input as cached; `real` [B, T] bool, on the host, is False at padding."""
        self.lengths = [length + new for length, new in zip(self.lengths, real.sum(1).tolist(), strict=True)]
        self.real = torch.cat((self.real, real), 1)

    def _block_table(self) -> Tensor:
        widest = max(map(len, self.pages))
        table = [pages + [0] * (widest - len(pages)) for pages in self.pages]
        return torch.tensor(table, dtype=torch.int32, device=self.kv_cache.device)
