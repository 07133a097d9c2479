"""What `forward` hands out as past_key_values: some sequences, on pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.pages import Pages, Sequences, pages_of


@dataclass(eq=False)
class KVCache:
    """Keys (rotated) and values of B sequences, each as long as it is.

    Attributes:
        pages: where they lie.
        held: for each sequence the pages that are its own, in order.
        lengths: tokens held by each. Padding is not held.
        real: [B, columns] bool on the host, False where a column of input was padding, which is not held; one column
            for each that was seen, which is also where the next default position begins.
        inv_freq: [B, D/2] float32, each one's rotary frequencies, set when its first tokens enter and fixed from then
            on; None before that.
    """

    pages: Pages
    held: list[list[int]]
    lengths: list[int] = field(default_factory=list)
    real: Tensor = field(init=False)
    inv_freq: Tensor | None = None

    def __post_init__(self) -> None:
        self.lengths = self.lengths or [0] * len(self.held)
        self.real = torch.ones(len(self.held), 0, dtype=torch.bool)
        self._table = self._block_table()

    @property
    def columns(self) -> int:
        return self.real.shape[1]

    def get_seq_length(self) -> int:
        """Columns of input seen, as transformers counts them."""
        return self.columns

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` more in every sequence; grows by half at least, so that appending stays cheap.

        Raises ValueError where that takes more pages, and others hold some of these.
        """
        needed, capacity = pages_of(max(self.lengths) + tokens), min(map(len, self.held))
        if any(pages_of(n + tokens) > len(held) for n, held in zip(self.lengths, self.held, strict=True)):
            self.held = self.pages.spread(self.held, max(needed, capacity * 3 // 2))
            self._table = self._block_table()

    def sequences(self, rows: Sequence[int], tokens: int, positions: Tensor | None) -> Sequences:
        """Where `tokens` new rows of each of these sequences stand; positions [rows, tokens], or None."""
        assert self.inv_freq is not None
        device = self._table.device
        seq_lens = torch.tensor([self.lengths[row] + tokens for row in rows], dtype=torch.int32, device=device)
        if positions is not None:
            positions = positions.flatten().to(torch.int32).contiguous()
        every = list(rows) == list(range(len(self.held)))  # as in every decode step, which then copies nothing
        table, inv_freq = (x if every else x[list(rows)] for x in (self._table, self.inv_freq))
        return Sequences(table, seq_lens, inv_freq, positions)

    def advance(self, real: Tensor) -> None:
        """Sequence b now holds those columns of T more that `real` [B, T] bool, on the host, names."""
        self.lengths = [length + new for length, new in zip(self.lengths, real.sum(1).tolist(), strict=True)]
        self.real = torch.cat((self.real, real), 1)

    def _block_table(self) -> Tensor:
        widest = max(map(len, self.held))
        table = [held + [0] * (widest - len(held)) for held in self.held]
        return torch.tensor(table, dtype=torch.int32, device=self.pages.kv[0].device)
