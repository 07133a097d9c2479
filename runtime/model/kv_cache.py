"""The paged KV cache: where keys and values are in memory, and which of it the tokens of a launch belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import InternLM3Config

# Tokens on a page.
PAGE = 64


def pages_of(tokens: int) -> int:
    """The number of pages that `tokens` tokens need."""
    return -(-tokens // PAGE)


def page_bytes(config: InternLM3Config, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize * PAGE


@dataclass
class BatchMetadata:
    """The sequences of one launch, which runs the last T tokens of each of B sequences.

    Attributes:
        block_table: [B, N] int32, the pages of each sequence in order.
        seq_lens: [B] int32, context length of each sequence, the tokens of this launch included; 0 marks an idle slot.
        inv_freq: [B, D/2] float32, rotary frequencies of each sequence, fixed when it begins.
        positions: [B * T] int32, rotary position of each token; None: its index in its sequence.
        write_table: [B, N] int32, the pages that keys and values are written to; None: those of `block_table`.
    """

    block_table: Tensor
    seq_lens: Tensor
    inv_freq: Tensor
    positions: Tensor | None = None
    write_table: Tensor | None = None


class PagedKVCache:
    """Keys and values of all layers, on `num_pages` pages of PAGE tokens each.

    The memory of a layer is [2, K, P, S, D], keys first, so that the consecutive pages of one head are contiguous: a
    CPU reads them in place, and kernels take the strides. Tokens that no sequence has written may hold anything.

    Args:
        scratch: all layers share one layer's memory, which is enough for sequences that are not continued.

    Attributes:
        layers: for each layer [2, P, K, S, D], the view that the ops take.
        spare: index of one more page, which belongs to no sequence: what must not be kept is written there.
    """

    def __init__(
        self,
        config: InternLM3Config,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        scratch: bool = False,
    ):
        shape = (2, config.num_key_value_heads, num_pages + 1, PAGE, config.head_dim)
        layers = config.num_hidden_layers
        own = 1 if scratch else layers
        memory = [torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(own)]
        self.layers = memory * (layers // own)
        self.spare = num_pages

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [P, K, S, D] each."""
        k, v = self.layers[index].unbind()
        return k, v

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies pages `source` to as many pages `target`, in all layers."""
        for kv in self.layers:
            kv[:, target] = kv[:, source]

    def grow(self, owned: Sequence[Sequence[int]], pages_each: int) -> list[list[int]]:
        """Makes room for `pages_each` pages of every sequence, and moves their pages there, one layer after another.

        Args:
            owned: the pages of each sequence, in order.

        Returns:
            The new pages of each sequence, which are consecutive.
        """
        runs = [list(range(first, first + pages_each)) for first in range(0, len(owned) * pages_each, pages_each)]
        for layer, old in enumerate(self.layers):
            _, _, heads, _, dim = old.shape
            new = old.new_empty((2, heads, len(owned) * pages_each + 1, PAGE, dim)).transpose(1, 2)
            for pages, run in zip(owned, runs, strict=True):
                new[:, run[0] : run[0] + len(pages)] = old[:, pages]
            self.layers[layer] = new
        self.spare = len(owned) * pages_each
        return runs
