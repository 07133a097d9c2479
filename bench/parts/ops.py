"""The table of bench.ops: every op next to its peers."""

from collections.abc import Iterator

import torch

from .. import peers
from ..cases import DENSE, SIZES, SMALL, cases
from ..measure import measured
from ..record import Row
from .bare_step import device_of


def rows(small: bool, name: str) -> Iterator[Row]:
    """The cases that take longest come last, in case the part runs out of time."""
    device, dtype, rounds = device_of(small), torch.bfloat16, 3 if small else 20
    shapes = [([1], [], [1024]), ([1, 16], [], [32768]), ([4, 16], [], [1024]), ([], [512], [1024, 8192])]
    size = SMALL if small else SIZES[name]
    chosen = [
        case
        for batches, chunks, contexts in ([([1], [], [64])] if small else shapes)
        for case in cases(size, [dtype], batches, chunks, contexts)
        # Quantised weights once for a number of rows: the context length changes only the qkv op.
        if case.stored == DENSE or (batches and contexts != [32768])
    ]
    peers.SECONDS = 30
    yield from measured(chosen, device, rounds)
