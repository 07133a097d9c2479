"""Time calls: with CUDA events on a GPU, else by the host's clock."""

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import torch

Call = Callable[[], Any]
FLOOR = 0.1  # microseconds: no call of an op is faster, on any machine
MOST_CALLS = 512  # in one round
MOST_BYTES = 8 << 30  # of the arguments of one round


def rounds_of(call: Call, calls: int) -> Iterator[float]:
    """Runs `call` once to warm up, then yields the microseconds of each further run, divided by `calls`.

    calls: how many calls of an op one run of `call` makes.
    """
    call()
    while True:
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            yield begin.elapsed_time(end) * 1e3 / calls
        else:
            started = perf_counter()
            call()
            yield (perf_counter() - started) * 1e6 / calls


def cold_calls(device: torch.device, moved: int, size: int) -> tuple[int, bool]:
    """How many calls a round makes on a GPU, each on arguments of its own; whether their inputs come from memory.

    moved: bytes that a call reads and writes. size: bytes of its arguments. False: L2 may keep some from before.
    """
    wanted = max(-(-3 * torch.cuda.get_device_properties(device).L2_cache_size // moved), 2)
    calls = min(wanted, MOST_CALLS, max(MOST_BYTES // size, 2))
    return calls, calls == wanted


def replayed(calls: Sequence[Call]) -> Call:
    """All calls captured in one CUDA graph; returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:  # compile before the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
