"""Where the fields of a slot's state are in memory: in one buffer, so that one copy brings a request to a slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.kv_cache import PAGE
from ..sampling.settings import STATE


class Field(NamedTuple):
    """A number, of shape (), or a vector. It takes `words` 32-bit words of each slot."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    words: int


def number(dtype: torch.dtype) -> Field:
    return Field(dtype, (), dtype.itemsize // 4)


def vector(length: int, dtype: torch.dtype = torch.int32) -> Field:
    """Padded to a multiple of 16 bytes, which kernels load at a time."""
    return Field(dtype, (length,), -(-length * dtype.itemsize // 16) * 4)


class Layout:
    """The places of some fields in a buffer of 32-bit words for B slots, field by field.

    Field f of slot b begins at word B * starts[f] + b * (starts[f + 1] - starts[f]). So every field is one tensor with
    a row for each slot, and the buffer of a single slot is a row with all fields in order (see the op `store_row`).

    Attributes:
        fields: by name, in order.
        starts: the first word of each field in a buffer of one slot; then the number of words.
        words: of one slot.
    """

    def __init__(self, fields: Mapping[str, Field]):
        self.fields = fields
        self.starts = [0, *accumulate(field.words for field in fields.values())]
        self.words = self.starts[-1]

    def __iter__(self) -> Iterator[tuple[str, int, Field]]:
        """The name, first word in a buffer of one slot, and description of each field."""
        for (name, field), start in zip(self.fields.items(), self.starts, strict=False):
            yield name, start, field

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The fields in a buffer [B * words] int32: [B, *shape] each."""
        slots, views = buffer.numel() // self.words, {}
        for (name, field), (start, end) in zip(self.fields.items(), pairwise(self.starts), strict=True):
            rows = buffer[slots * start : slots * end].view(field.dtype).view(slots, -1)
            views[name] = rows[:, : field.shape[0]] if field.shape else rows[:, 0]
        return views


def state_layout(pages: int, vocab_size: int, head_dim: int, tokens: int = 1) -> Layout:
    """The layout of a DecodeState for sequences of up to `pages` pages. What the op `count_prompt` writes comes first.

    tokens: the most that one step generates for a sequence.
    """
    bits = vector(-(-vocab_size // 32))
    dtypes = {**dict.fromkeys(("token", "seed", "stream"), "int64"), **STATE}
    dtypes |= dict.fromkeys(("seq_lens", "max_len", "min_len", "most_drafts"), "int32")
    report = 3 * tokens + 1
    numbers = {name: number(getattr(torch, dtype)) for name, dtype in dtypes.items()}
    return Layout(
        {
            "history": vector(pages * PAGE),
            "prompt_counts": vector(vocab_size),
            "output_counts": vector(vocab_size),
            "logit_bias": vector(vocab_size, torch.float32),
            "block_table": vector(pages),
            "inv_freq": vector(head_dim // 2, torch.float32),
            "end_mask": bits,
            "permitted": bits,
            "allowed": bits,
            # The 64-bit ones first: only an even number of words is before them.
            **dict(sorted(numbers.items(), key=lambda named: -named[1].words)),
            "report": Field(torch.int32, (report,), report),  # not padded: it is copied to the host
        }
    )
