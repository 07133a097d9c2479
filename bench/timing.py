"""Time calls: with CUDA events on a GPU, else by the host's clock."""

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import torch

Call = Callable[[], Any]
FLOOR = 0.1  # microseconds: no call of an op is faster, on any machine


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
