"""Pages of keys and values, who holds which, and where the rows of a launch stand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import InternLM3Config

# Tokens on a page.
PAGE = 64


def pages_of(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


@dataclass
class Sequences:
    """Where the rows of one launch stand: T rows for each of B sequences, the last of its tokens so far.

    Attributes:
        block_table: [B, N] int32, the pages of each sequence in order.
        seq_lens: [B] int32, the tokens of each, those of this launch included; 0: idle.
        inv_freq: [B, D/2] float32, the rotary frequencies of each, fixed when it begins.
        positions: [B * T] int32, where each row stands for the rotation; None: at its place in its sequence.
    """

    block_table: Tensor
    seq_lens: Tensor
    inv_freq: Tensor
    positions: Tensor | None = None


class Pages:
    """`count` pages of every layer, each free or held.

    A layer's memory is [2, K, P, S, D], keys first. So what one head keeps on a run of pages lies in one piece, which a
    CPU reads as it lies; kernels are told the strides. Slots that no sequence has filled may hold anything.

    Attributes:
        kv: for each layer [2, P, K, S, D], the view that the ops take. With `scratch` all layers are one, which is
            enough where a sequence is not continued.
    """

    def __init__(
        self,
        config: InternLM3Config,
        count: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        scratch: bool = False,
    ):
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (2, heads, count, PAGE, config.head_dim)
        kv = [torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(1 if scratch else layers)]
        self.kv = kv * layers if scratch else kv
        self._held = bytearray(count)  # 1 for a page that is held

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return self._held.count(0)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [P, K, S, D] each."""
        k, v = self.kv[index].unbind()
        return k, v

    def take(self, count: int) -> list[int]:
        """Holds `count` free pages: the first run that is long enough, else the first ones.

        Raises ValueError, and holds nothing, where fewer are free.
        """
        if count > self.free:
            raise ValueError(
                f"{count} pages of {PAGE} tokens are needed, and {self.free} of {len(self._held)} are free: "
                "make more of them, or take fewer or shorter sequences"
            )
        first = self._held.find(bytes(count))
        free = range(first, first + count) if first >= 0 else (i for i, held in enumerate(self._held) if not held)
        pages = [page for page, _ in zip(free, range(count), strict=False)]
        for page in pages:
            self._held[page] = 1
        return pages

    def release(self, pages: list[int]) -> None:
        """Lets go of pages. Raises ValueError, and releases nothing, where one of them is not held, or named twice."""
        for index, page in enumerate(pages):
            if page not in range(len(self._held)) or not self._held[page] or page in pages[:index]:
                raise ValueError(f"page {page} of {len(self._held)} is released, and nobody holds it")
        for page in pages:
            self._held[page] = 0

    def copy(self, source: list[int], target: list[int]) -> None:
        """Writes what the pages `source` hold to as many others."""
        for kv in self.kv:
            kv[:, target] = kv[:, source]

    def spread(self, held: list[list[int]], each: int) -> list[list[int]]:
        """Grows to `each` pages for every holder, in runs, and moves what they hold there, one layer after the other.

        `held` is what each holder had so far; returns what each has now. Raises ValueError where others hold pages too.
        """
        if sum(map(len, held)) != sum(self._held):
            raise ValueError("pages that others hold cannot be moved: these sequences have no room left")
        runs = [list(range(first, first + each)) for first in range(0, len(held) * each, each)]
        for layer, old in enumerate(self.kv):
            _, _, heads, _, dim = old.shape
            new = old.new_empty((2, heads, len(held) * each, PAGE, dim)).transpose(1, 2)
            for pages, run in zip(held, runs, strict=True):
                new[:, run[0] : run[0] + len(pages)] = old[:, pages]
            self.kv[layer] = new
        self._held = bytearray(b"\1" * len(held) * each)
        return runs
