"""The rows of a step that verifies drafts: several for each slot, at consecutive positions of its sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.reference import FEW_ROWS
from ..model.kv_cache import BatchMetadata
from ..sampling.settings import STATE
from .state import DecodeState, Tier

# Launches of up to this many rows take about as long as those of one, on a GPU.
ROWS = FEW_ROWS
# The most sequences whose drafts are verified: each has at least two rows.
MOST_SEQUENCES = ROWS // 2


@dataclass
class DraftRows:
    """K rows for each of B slots.

    Attributes:
        batch: block tables, lengths and rotary frequencies of the B * K rows, each a sequence of one new token.
        drafts: [B, K] int64, the tokens that the rows read.
        settings: seed, stream and the settings of sampling, [B * K] each.
    """

    batch: BatchMetadata
    drafts: Tensor
    settings: dict[str, Tensor]

    @classmethod
    def like(cls, state: DecodeState) -> DraftRows:
        """ROWS idle rows of one slot."""

        def rows(x: Tensor) -> Tensor:
            return torch.zeros(ROWS, *x.shape[1:], dtype=x.dtype, device=x.device)

        batch = BatchMetadata(*(rows(getattr(state.batch, name)) for name in ("block_table", "seq_lens", "inv_freq")))
        settings = {name: rows(getattr(state, name)) for name in ("seed", "stream", *STATE)}
        return cls(batch, rows(state.token)[None], settings)

    def of(self, slots: int) -> DraftRows:
        """The rows as views, the same number for each of `slots` slots, which are at most MOST_SEQUENCES."""
        each = ROWS // slots
        count = slots * each
        batch = BatchMetadata(self.batch.block_table[:count], self.batch.seq_lens[:count], self.batch.inv_freq[:count])
        settings = {name: x[:count] for name, x in self.settings.items()}
        return DraftRows(batch, self.drafts.view(-1)[:count].view(slots, each), settings)

    def load(self, slots: DecodeState) -> None:
        """Copies to each slot's rows what `draft` does not write."""
        pairs = [(self.batch.block_table, slots.batch.block_table), (self.batch.inv_freq, slots.batch.inv_freq)]
        for rows, own in [*pairs, *((x, getattr(slots, name)) for name, x in self.settings.items())]:
            rows.unflatten(0, self.drafts.shape).copy_(own[:, None])

    def stages(self, slots: DecodeState, tier: Tier) -> dict[str, Any]:
        """The arguments of the op `sample` besides the logits. Tables over the vocabulary are the slots' own."""
        rows = {**self.settings, "position": self.batch.seq_lens}
        own = {name: None if x is None else rows.get(name, x) for name, x in slots.stages(tier).items()}
        return {**own, "drafts": self.drafts}
