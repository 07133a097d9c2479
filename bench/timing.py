"""Time calls, and what no call can beat on this machine. Without an accelerator by the host's clock."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from .roofline import nbytes

Call = Callable[[], Any]


def rounds_of(call: Call, calls: int) -> Iterator[float]:
    """Microseconds of each round's `call()`, divided among the calls that it makes; one before them warms up."""
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
            started = time.perf_counter()
            call()
            yield (time.perf_counter() - started) * 1e6 / calls


def replayed(calls: Sequence[Call]) -> Call:
    """All calls in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:  # what compiles does it before the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


class Floor(NamedTuple):
    """What no op can beat, a second."""

    read: float  # bytes
    copy: float  # bytes, read and written
    matmul: dict[str, float]  # operations, by dtype

    def share(self, dtype: str, bytes: int, operations: int, microseconds: float) -> tuple[str, float]:
        """Which floor binds, "read" or "matmul", and the share of it that so many microseconds are."""
        reads, products = bytes / self.read, operations / self.matmul[dtype]
        return ("read" if reads >= products else "matmul"), max(reads, products) * 1e6 / microseconds


def measure_floor(device: torch.device, dtypes: Sequence[torch.dtype], rounds: int) -> Floor:
    """The fastest reads, copies and square products, by the median round."""
    on_gpu = device.type == "cuda"
    x = torch.zeros(1 << 29 if on_gpu else 1 << 25, device=device)
    y = torch.empty_like(x)
    read: Call = x.sum
    if on_gpu:
        from . import read_bandwidth

        read = partial(reads.read, x, y)

    def rate(amount: int, call: Call) -> float:
        return amount / statistics.median(islice(rounds_of(call, 1), rounds)) * 1e6

    side = 8192 if on_gpu else 1024
    matmul = {}
    for dtype in dtypes:
        a = torch.randn(side, side, device=device).to(dtype)
        matmul[name_of(dtype)] = rate(2 * side**3, partial(torch.mm, a, a))
    return Floor(rate(nbytes(x), read), rate(2 * nbytes(x), lambda: y.copy_(x)), matmul)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
