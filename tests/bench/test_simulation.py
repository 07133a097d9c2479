"""bench.simulation: when launches end whose programs need few things, by arithmetic."""

import pytest

from bench.machine_code.targets import TARGETS
from bench.simulation import Gpu, Programs, Work, ends

TARGET = TARGETS["sm_90"]
MULTIPROCESSORS = TARGET.multiprocessors
GPU = Gpu(
    read=1e6, l2=20e6, port=5e6, issued=4000, issued_by_warp=1000, trip=2, hit=1, start=1, release=3, barrier=0.5,
    matrix=0.25, tail=1, scattered=2,
)  # fmt: skip
ONE = Programs(1, 4, 32, 0)
MEGABYTE = 10**6
ALONE = ONE._replace(shared=200 << 10)  # no second program fits its multiprocessor
LONG = ONE._replace(after=Work(waits=20))  # ends at 22
LONG_ALONE = LONG._replace(number=MULTIPROCESSORS, shared=200 << 10)
EARLY = ONE._replace(early=10 * MEGABYTE)
LATER = ONE._replace(early=30 * MEGABYTE)
LATE = ONE._replace(late=10 * MEGABYTE, tiles=10)


CASES = {
    "start and tail": ([ONE], [1 + 1]),
    "the successor has started, and waits": ([ONE, ONE], [2, 2 + 3 + 1]),
    "waits, barriers and tensor cores": ([ONE._replace(after=Work(2, 4, 0, 8))], [1 + 2 + 2 + 2 + 1]),
    # Bytes: the queue, and half of a trip.
    "memory": ([EARLY], [1 + 10 + 1 + 1]),
    "a trip to memory": ([ONE._replace(early=1)], [1 + 2 + 1]),
    "a trip to the L2 cache": ([ONE._replace(cached=1)], [1 + 1 + 1]),
    "one queue": ([EARLY._replace(number=2)], [1 + 20 + 1 + 1]),
    "a multiprocessor's port": ([ONE._replace(cached=10 * MEGABYTE)], [1 + 2 + 0.5 + 1]),
    "the L2 cache": (
        [ONE._replace(number=MULTIPROCESSORS, cached=10 * MEGABYTE)],
        [1 + MULTIPROCESSORS / 2 + 0.5 + 1],
    ),
    "scattered rows": ([EARLY._replace(scattered=True)], [1 + 20 + 1 + 1]),
    "early bytes during the predecessor": ([LONG, EARLY], [22, 22 + 3 + 1]),
    "late bytes after it": ([LONG, LATE._replace(tiles=1)], [22, 22 + 3 + 10 + 1 + 1]),
    "one tile outstanding": ([LATE], [1 + 10 * 2 + 1]),
    "two tiles outstanding": ([LATE._replace(outstanding=2)], [1 + 10 + 1 + 1]),
    "work for each tile": ([LATE._replace(tile=Work(1, 2, 1000))], [1 + 10 * (2 + 1 + 1 + 1) + 1]),
    "tiles in the L2 cache": ([LONG, LATE._replace(prefetched=5 * MEGABYTE)], [22, 22 + 3 + 5 * 1 + 5 * 2 + 1]),
    "addresses": ([ONE._replace(late=1, addressed=2)], [1 + 2 * 2 + 2 + 1]),
    "addresses that another program has loaded": (
        [ALONE._replace(number=MULTIPROCESSORS + 1, late=1, addressed=2)],
        [8 + 1 + 2 * 1 + 2 + 1],
    ),
    # Instructions: 1000 of a warp in a microsecond, 4000 of a multiprocessor.
    "instructions": ([ONE._replace(after=Work(instructions=2000))], [1 + 2 + 1]),
    "of one warp": ([ONE._replace(warps=1, after=Work(instructions=2000))], [1 + 2 + 1]),
    "of many warps": ([ONE._replace(warps=16, after=Work(instructions=2000))], [1 + 8 + 1]),
    "of two programs": ([ONE._replace(number=MULTIPROCESSORS + 1, after=Work(instructions=2000))], [1 + 4 + 1]),
    "both programs end late, then the last starts": (
        [ONE._replace(number=2 * MULTIPROCESSORS + 1, shared=100 << 10, after=Work(instructions=2000))],
        [1 + 4 + 1 + 1 + 2 + 1],
    ),
    # Room.
    "on the emptiest multiprocessor": (
        [
            ONE._replace(number=MULTIPROCESSORS - 1, after=Work(instructions=8000)),
            ONE._replace(before=Work(instructions=12000)),
        ],
        [10, 2 + 12 + 1],
    ),
    "two waves": ([ALONE._replace(number=MULTIPROCESSORS + 1)], [2 + 2]),
    "no shared memory beside the predecessor": (
        [LONG_ALONE, EARLY._replace(shared=200 << 10)],
        [22, 22 + 1 + 10 + 1 + 1],
    ),
    "registers beside the predecessor": (
        [LONG_ALONE._replace(registers=224, warps=8), EARLY._replace(registers=64)],
        [22, 22 + 3 + 1],
    ),
    "no registers, which come in eights": (
        [LONG_ALONE._replace(registers=217, warps=8), EARLY._replace(registers=65)],
        [22, 22 + 1 + 10 + 1 + 1],
    ),
    "no warps": ([LONG_ALONE._replace(registers=16, warps=62), EARLY], [22, 22 + 1 + 10 + 1 + 1]),
    "no blocks": (
        [LONG._replace(number=32 * MULTIPROCESSORS, warps=1, registers=8), EARLY],
        [22, 22 + 1 + 10 + 1 + 1],
    ),
    # Triggers. The successor requests for 30 us.
    "at the start": ([LONG, LATER], [22, 1 + 1 + 30 + 1 + 1]),
    "after the early loads": ([LONG._replace(before=Work(waits=5), trigger="loads"), LATER], [27, 6 + 1 + 32]),
    "after the wait": ([LONG, LONG._replace(trigger="wait"), LATER], [22, 46, 25 + 1 + 32]),
    "at the end": ([LONG._replace(trigger="end"), LATER], [22, 21 + 1 + 32]),
}


@pytest.mark.parametrize(("launches", "expected"), CASES.values(), ids=CASES)
def test_launches_end_when_their_needs_are_met(launches, expected):
    assert ends(launches, GPU, TARGET) == pytest.approx(expected)
