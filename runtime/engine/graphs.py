"""Steps that run ahead of the host: captured once for each shape, their results copied back through pinned memory."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .state import Tier

# Runs a step once and returns a callable that runs it again: a CUDA graph on a GPU, the step itself on a CPU.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def eager(step: Callable[[], None]) -> Callable[[], None]:
    step()
    return step


def cuda_graphs() -> Capture:
    """Captures each step as a CUDA graph. All graphs share one memory pool, since no two run at once.

    The first run compiles kernels and does what a capture must not; the capture after it executes nothing. If memory is
    too short for a capture, that step stays eager, with a warning.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        step()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                step()
        except torch.cuda.OutOfMemoryError as error:
            warnings.warn(f"no memory to capture a decode step: it runs eagerly, and slower ({error})", stacklevel=2)
            return step
        return graph.replay

    return capture


@dataclass
class Report:
    """What one step reports of one slot; see the op `advance`."""

    token: int
    end: int
    logprob: float


@dataclass
class _HostBuffer:
    """Host memory for the report of one step, and an event that fires when it has arrived."""

    report: Tensor
    arrived: Any  # torch.cuda.Event; None on a CPU


class StepQueue:
    """Decode steps in flight, oldest first.

    Args:
        step: (batch size, tier) -> None: one decode step of the first slots, on the device's tensors alone.
        report: [B, 3] int32 on the device, where a step writes what the host must know.
    """

    def __init__(self, step: Callable[[int, Tier], None], report: Tensor, capture: Capture):
        self._step, self._report, self._capture = step, report, capture
        self._captured: dict[tuple[int, Tier], Callable[[], None]] = {}
        self._idle: list[_HostBuffer] = []
        self._in_flight: deque[tuple[_HostBuffer, Sequence[Any]]] = deque()

    def __len__(self) -> int:
        """The number of steps in flight."""
        return len(self._in_flight)

    def launch(self, batch_size: int, tier: Tier, readers: Sequence[Any]) -> None:
        """Launches one step. `readers` has an object for each slot, None for a slot that nobody reads."""
        if not self.capture(batch_size, tier):
            self._captured[batch_size, tier]()
        self.copy_report(readers)

    def capture(self, batch_size: int, tier: Tier) -> bool:
        """Captures the step for (batch size, tier) if it is new. Returns True if that executed it."""
        if (batch_size, tier) in self._captured:
            return False
        self._captured[batch_size, tier] = self._capture(partial(self._step, batch_size, tier))
        return True

    def copy_report(self, readers: Sequence[Any]) -> None:
        """Queues a copy of the present report to the host."""
        buffer = self._idle.pop() if self._idle else self._new_buffer()
        buffer.report.copy_(self._report, non_blocking=True)
        if buffer.arrived is not None:
            buffer.arrived.record()
        self._in_flight.append((buffer, readers))

    def collect(self) -> list[tuple[Any, Report]]:
        """Waits for the oldest step, and returns each reader with its slot's report. Idle slots report nothing."""
        buffer, readers = self._in_flight.popleft()
        if buffer.arrived is not None:
            buffer.arrived.synchronize()
        logprobs = buffer.report.view(torch.float32)[:, 2].tolist()
        reports = [
            (reader, Report(token, end, logprob))
            for reader, (token, end, _), logprob in zip(readers, buffer.report.tolist(), logprobs, strict=False)
            if reader is not None and token >= 0
        ]
        self._idle.append(buffer)
        return reports

    def drain(self) -> None:
        """Waits for all steps in flight, and drops their reports."""
        while self._in_flight:
            self.collect()

    def _new_buffer(self) -> _HostBuffer:
        on_gpu = self._report.is_cuda
        report = torch.empty(self._report.shape, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        return _HostBuffer(report, torch.cuda.Event() if on_gpu else None)
