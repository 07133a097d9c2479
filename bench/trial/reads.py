"""E0: how fast a GPU reads from its L2 cache. The ceilings of reads from memory are the part `ceilings`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch

from ..read_bandwidth import read_all
from ..record import Part, Row
from .prompts import times_of

BLOCK = 4096  # numbers of a program, 16 KB
NEEDED = 7000  # GB/s: at 32 rows gate and up read 168 MB of W, and 320 programs 84 MB of x, in 36 us


def from_l2(part: Part, device: torch.device, megabytes: int, rounds: int) -> Iterator[Row]:
    """Reads of the same memory, which fits the cache, over and over."""
    numbers = (megabytes << 18) // BLOCK * BLOCK
    x, y = torch.zeros(numbers, device=device), torch.empty(numbers // BLOCK, device=device)
    call = partial(read_all, x, y, BLOCK, 4, "")
    rates = [4e-3 * numbers / time for time in times_of([call] * (40 if x.is_cuda else 1), rounds)]
    decision = "x through L2 costs the ring time at 32 rows: tiles of more rows of W there"
    if median(rates) >= NEEDED:
        decision = "x through L2 costs the ring nothing at 32 rows"
    predicted = "5500 to 7000 GB/s"
    note = f"predicted: {predicted}; {decision}"
    yield part.figure("E0 reads from L2", rates, "GB/s", note, experiment="E0", predicted=predicted, decision=decision)
