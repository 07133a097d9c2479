"""Which pages of the KV cache are in use, which hold a reusable prefix, and how many there are."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import torch

from ..common.memory import free_memory
from ..model.config import InternLM3Config
from ..model.kv_cache import PAGE, page_bytes, pages_of


def page_budget(
    config: InternLM3Config,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    max_seq_len: int,
    cache_tokens: int | None = None,
) -> int:
    """The number of pages of a KV cache.

    With `cache_tokens`, enough for that many tokens. By default enough for `batch_size` sequences of `max_seq_len`
    tokens, but at most half of the device's free memory.

    Raises:
        ValueError: `cache_tokens` is less than `max_seq_len`.
        MemoryError: the pages don't fit into free memory; the message shows the arithmetic.
    """
    window, each = pages_of(max_seq_len), page_bytes(config, dtype)
    free = free_memory(device)
    if cache_tokens is not None and cache_tokens < max_seq_len:
        raise ValueError(f"cache_tokens is {cache_tokens}, less than one window: max_seq_len is {max_seq_len}")
    room = (free if cache_tokens is not None else free // 2) // each
    wanted = batch_size * window if cache_tokens is None else pages_of(cache_tokens)
    if room < (window if cache_tokens is None else wanted):
        tokens = max_seq_len if cache_tokens is None else cache_tokens
        raise MemoryError(
            f"a KV cache of {tokens:,} tokens needs {pages_of(tokens) * each / 1e9:.2f} GB ({each // PAGE:,} bytes a "
            f"token), and of {free / 1e9:.2f} GB that are free on {device} it may have {room * each / 1e9:.2f}: "
            f"lower {'max_seq_len (in generate: max_new_tokens)' if cache_tokens is None else 'cache_tokens'}"
        )
    return min(wanted, room)


_FREE, _EVICTABLE, _IN_USE = range(3)


class PageAllocator:
    """Tracks `count` pages. Each is free, in use by one or more sequences, or evictable: unused, with a known prefix.

    Pages of a prompt that are registered under a digest of their tokens can be found again by another prompt with the
    same prefix, after their sequence has ended too, until they are evicted for other tokens.
    """

    def __init__(self, count: int):
        self._users = [0] * count
        self._state = bytearray(count)  # bytes, because a run of equal ones is found fast
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._evictable: dict[int, None] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._state)

    @property
    def free(self) -> int:
        """The number of pages that can be allocated, evictable ones included."""
        return len(self._state) - self._state.count(_IN_USE)

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Allocates `count` pages.

        Prefers the pages right after page `after`, then the first contiguous run, evicting as few of the least recently
        used pages as that needs, then any pages, evictable ones last.

        Raises ValueError, and allocates nothing, if fewer are free.
        """
        if count > self.free:
            raise ValueError(
                f"{count} pages of {PAGE} tokens are needed, and {self.free} of {len(self)} are free: "
                "make more of them, or take fewer or shorter sequences"
            )
        first = len(self) if after is None else after + 1
        if self._state[first : first + count] != bytes(count):
            first = self._find_run(count)
        free = (page for page, state in enumerate(self._state) if state == _FREE)
        pages = list(range(first, first + count) if first >= 0 else islice(chain(free, self._evictable), count))
        for page in pages:
            self._evict(page)
        self.retain(pages)
        return pages

    def _find_run(self, count: int) -> int:
        """The first page of a contiguous run that can be allocated, -1 if there is none."""
        state, evictable, run = self._state.copy(), iter(self._evictable), bytes(count)
        first = state.find(run)
        while first < 0 and (oldest := list(islice(evictable, count))):
            for page in oldest:
                state[page] = _FREE
            first = state.find(run)
        return first

    def retain(self, pages: Iterable[int]) -> None:
        """Adds one user to each page."""
        for page in pages:
            self._users[page] += 1
            self._state[page] = _IN_USE
            self._evictable.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Removes one user from each page. Raises ValueError, and releases nothing, if a page has too few."""
        for page, times in Counter(pages).items():
            if not 0 <= page < len(self) or self._users[page] < times:
                raise ValueError(f"page {page} of {len(self)} is released, and it is not in use")
        for page in reversed(pages):  # a sequence's last page is evicted before its first
            self._users[page] -= 1
            if not self._users[page]:
                registered = page in self._digest_of
                self._state[page] = _EVICTABLE if registered else _FREE
                if registered:
                    self._evictable[page] = None

    def register_prefix(self, pages: Sequence[int], ids: Sequence[int], root: bytes) -> None:
        """Lets `match_prefix` find these pages, which hold these tokens, PAGE each, until they are evicted.

        Args:
            root: everything besides the tokens that keys and values depend on.
        """
        for page, digest in zip(pages, _digests(ids, root), strict=True):
            if digest not in self._page_of:
                self._evict(page)
                self._page_of[digest], self._digest_of[page] = page, digest

    def match_prefix(self, ids: Sequence[int], root: bytes, multiple: int) -> list[int]:
        """Retains and returns the pages of the longest registered prefix of `ids`, in multiples of `multiple` pages."""
        pages: list[int] = []
        for digest in _digests(ids, root):
            if digest not in self._page_of:
                break
            pages.append(self._page_of[digest])
        del pages[len(pages) // multiple * multiple :]
        self.retain(pages)
        return pages

    def reset(self) -> None:
        """Frees every page and forgets every prefix."""
        count = len(self)
        self._users, self._state = [0] * count, bytearray(count)
        for known in (self._digest_of, self._page_of, self._evictable):
            known.clear()

    def _evict(self, page: int) -> None:
        """Forgets the prefix that a page holds, if any."""
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
        self._evictable.pop(page, None)


def _digests(ids: Sequence[int], root: bytes) -> Iterator[bytes]:
    """For every whole page of `ids` a digest of all tokens up to its end."""
    digest = hashlib.sha256(root)
    for end in range(PAGE, len(ids) + 1, PAGE):
        digest.update(array("q", ids[end - PAGE : end]).tobytes())
        yield digest.digest()
