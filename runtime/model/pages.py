"""Pages of keys and values, who holds which, and where the rows of a launch stand."""

import hashlib
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from .config import InternLM3Config

# Tokens on a page.
PAGE = 64


def pages_of(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


def budget(
    config: InternLM3Config,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    max_seq_len: int,
    cache_tokens: int | None = None,
) -> int:
    """How many pages a cache has: for `cache_tokens` tokens, or by default for windows of max_seq_len for all rows, but
    in at most half of the device's free memory.

    Raises ValueError where `cache_tokens` is under one window, MemoryError, with the arithmetic, where memory is.
    """
    window, each = pages_of(max_seq_len), page_bytes(config, dtype)
    free = free_memory(device)
    if cache_tokens is not None and cache_tokens < max_seq_len:
        raise ValueError(f"cache_tokens is {cache_tokens}, less than one window: max_seq_len is {max_seq_len}")
    room = (free if cache_tokens is not None else free // 2) // each
    wanted = rows * window if cache_tokens is None else pages_of(cache_tokens)
    if room < (window if cache_tokens is None else wanted):
        tokens = max_seq_len if cache_tokens is None else cache_tokens
        raise MemoryError(
            f"a KV cache of {tokens:,} tokens needs {pages_of(tokens) * each / 1e9:.2f} GB ({each // PAGE:,} bytes a "
            f"token), and of {free / 1e9:.2f} GB that are free on {device} it may have {room * each / 1e9:.2f}: "
            f"lower {'max_seq_len' if cache_tokens is None else 'cache_tokens'}"
        )
    return min(wanted, room)


def page_bytes(config: InternLM3Config, dtype: torch.dtype) -> int:
    """Bytes of a page, in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize * PAGE


def free_memory(device: torch.device) -> int:
    """Bytes that a device has free; on a CPU what Linux says is available, and no bound on other systems."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        known = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return sys.maxsize
    return int(known.split("MemAvailable:")[1].split()[0]) * 1024


@dataclass
class Sequences:
    """Where the rows of one launch stand: T rows for each of B sequences, the last of its tokens so far.

    Attributes:
        block_table: [B, N] int32, the pages of each sequence in order.
        seq_lens: [B] int32, the tokens of each, those of this launch included; 0: idle.
        inv_freq: [B, D/2] float32, the rotary frequencies of each, fixed when it begins.
        positions: [B * T] int32, where each row stands for the rotation; None: at its place in its sequence.
        write_table: [B, N] int32, the pages that keys and values go to; None: those of `block_table`.
    """

    block_table: Tensor
    seq_lens: Tensor
    inv_freq: Tensor
    positions: Tensor | None = None
    write_table: Tensor | None = None


class Pages:
    """`count` pages of every layer, each free or held.

    A layer's memory is [2, K, P, S, D], keys first. So what one head keeps on a run of pages lies in one piece, which a
    CPU reads as it lies; kernels are told the strides. Slots that no sequence has filled may hold anything.

    Attributes:
        kv: for each layer [2, P, K, S, D], the view that the ops take. With `scratch` all layers are one, which is
            enough where a sequence is not continued.
        spare: one more page, which nobody holds: what is not to be kept is written there.
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
        shape = (2, heads, count + 1, PAGE, config.head_dim)
        kv = [torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(1 if scratch else layers)]
        self.kv = kv * layers if scratch else kv
        self.spare = count
        self._holders = [0] * count
        # 0: free, 1: free and named, 2: held. Bytes, since a run of equal ones is found fast.
        self._kind = bytearray(count)
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._resting: dict[int, None] = {}  # free and named, the longest unused first

    def __len__(self) -> int:
        return len(self._kind)

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._kind) - self._kind.count(2)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [P, K, S, D] each."""
        k, v = self.kv[index].unbind()
        return k, v

    def take(self, count: int, behind: int | None = None) -> list[int]:
        """Holds `count` free pages: those behind page `behind` if they are free, else the first run that is long
        enough, of unnamed pages and as few as need be of those that have rested longest; else any, named ones last.

        Raises ValueError, and holds nothing, where fewer are free.
        """
        if count > self.free:
            raise ValueError(
                f"{count} pages of {PAGE} tokens are needed, and {self.free} of {len(self)} are free: "
                "make more of them, or take fewer or shorter sequences"
            )
        first = len(self) if behind is None else behind + 1
        if self._kind[first : first + count] != bytes(count):
            first = self._run(count)
        unnamed = (page for page, kind in enumerate(self._kind) if kind == 0)
        pages = list(range(first, first + count) if first >= 0 else islice(chain(unnamed, self._resting), count))
        for page in pages:
            self._forget(page)
        self.hold(pages)
        return pages

    def _run(self, count: int) -> int:
        """The first page of a run of free pages, -1 where there is none."""
        taken, resting, run = self._kind.copy(), iter(self._resting), bytes(count)
        first = taken.find(run)
        while first < 0 and (oldest := list(islice(resting, count))):
            for page in oldest:
                taken[page] = 0
            first = taken.find(run)
        return first

    def hold(self, pages: Iterable[int]) -> None:
        """Holds pages once more, whether they are held or not."""
        for page in pages:
            self._holders[page] += 1
            self._kind[page] = 2
            self._resting.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Lets go of pages once. Raises ValueError, and releases nothing, where one of them is not held so often."""
        for page in pages:
            if page not in range(len(self)) or self._holders[page] < pages.count(page):
                raise ValueError(f"page {page} of {len(self)} is released, and nobody holds it")
        for page in reversed(pages):  # a sequence's last page is taken for something else before its first
            self._holders[page] -= 1
            if not self._holders[page]:
                named = page in self._names
                self._kind[page] = named
                if named:
                    self._resting[page] = None

    def name(self, pages: Sequence[int], ids: Sequence[int], root: bytes) -> None:
        """Lets `match` find these pages, which hold these tokens, PAGE each, until they are taken for others.

        root: what else their keys and values follow from.
        """
        for page, name in zip(pages, _names(ids, root), strict=True):
            if name not in self._named:
                self._forget(page)
                self._named[name], self._names[page] = page, name

    def match(self, ids: Sequence[int], root: bytes, whole: int) -> list[int]:
        """Holds the pages of the longest known beginning of these tokens, in multiples of `whole` pages."""
        pages: list[int] = []
        for name in _names(ids, root):
            if name not in self._named:
                break
            pages.append(self._named[name])
        del pages[len(pages) // whole * whole :]
        self.hold(pages)
        return pages

    def reset(self) -> None:
        """Frees every page, and forgets what it held."""
        count = len(self)
        self._holders, self._kind = [0] * count, bytearray(count)
        for known in (self._names, self._named, self._resting):
            known.clear()

    def _forget(self, page: int) -> None:
        """Takes a page's name."""
        name = self._names.pop(page, None)
        if name is not None:
            del self._named[name]
        self._resting.pop(page, None)

    def copy(self, source: list[int], target: list[int]) -> None:
        """Writes what the pages `source` hold to as many others."""
        for kv in self.kv:
            kv[:, target] = kv[:, source]

    def spread(self, held: list[list[int]], each: int) -> list[list[int]]:
        """Grows to `each` pages for every holder, in runs, and moves what they hold there, one layer after the other.

        `held` is what each holder had so far; returns what each has now. Raises ValueError where others hold pages too.
        """
        if sum(map(len, held)) != sum(self._holders):
            raise ValueError("pages that others hold cannot be moved: these sequences have no room left")
        runs = [list(range(first, first + each)) for first in range(0, len(held) * each, each)]
        for layer, old in enumerate(self.kv):
            _, _, heads, _, dim = old.shape
            new = old.new_empty((2, heads, len(held) * each + 1, PAGE, dim)).transpose(1, 2)
            for pages, run in zip(held, runs, strict=True):
                new[:, run[0] : run[0] + len(pages)] = old[:, pages]
            self.kv[layer] = new
        self.spare = len(held) * each
        self._kind, self._holders = bytearray(b"\2" * len(held) * each), [1] * (len(held) * each)
        return runs


def _names(ids: Sequence[int], root: bytes) -> Iterator[bytes]:
    """For every whole page of these tokens a digest of all up to its end."""
    digest = hashlib.sha256(root)
    for end in range(PAGE, len(ids) + 1, PAGE):
        digest.update(array("q", ids[end - PAGE : end]).tobytes())
        yield digest.digest()
