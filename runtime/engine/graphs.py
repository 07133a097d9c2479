"""Steps that run ahead of the host: captured once for each shape, their results copied back through pinned memory."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

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


class Part(IntEnum):
    """What of a decode step is launched: all of it, or one of the two parts between which the host makes masks."""

    WHOLE = 0
    LOGITS = 1  # the model, up to the logits
    TOKENS = 2  # sampling from them


class Step(NamedTuple):
    """A decode step of the first slots, as it is captured: with which stages of sampling, with or without drafts."""

    batch_size: int
    tier: Tier
    drafts: bool = False
    part: Part = Part.WHOLE


@dataclass
class Report:
    """What one step reports of one slot; see the ops `advance` and `draft`.

    tokens: of each new token, in order, its id, its log-probability, and why the sequence ended with it.
    drafts: how many drafts the next step has.
    """

    tokens: list[tuple[int, float, int]]
    drafts: int


@dataclass
class _HostBuffer:
    """Host memory for the report of one step, and an event that fires when it has arrived."""

    report: Tensor
    arrived: Any  # torch.cuda.Event; None on a CPU


@dataclass
class _InFlight:
    """A step in flight: where its report arrives, who reads it, and whether the step had drafts."""

    buffer: _HostBuffer
    readers: Sequence[Any]
    drafts: bool


class StepQueue:
    """Decode steps in flight, oldest first.

    Args:
        run: executes one decode step, on the device's tensors alone.
        report: [B, 3M+1] int32 on the device, where a step writes what the host must know.
    """

    def __init__(self, run: Callable[[Step], None], report: Tensor, capture: Capture):
        self._run, self._report, self._capture = run, report, capture
        self._captured: dict[Step, Callable[[], None]] = {}
        self._idle: list[_HostBuffer] = []
        self._in_flight: deque[_InFlight] = deque()

    def __len__(self) -> int:
        """The number of steps in flight."""
        return len(self._in_flight)

    def of(self, reader: Any) -> int:
        """The number of steps in flight whose report somebody reads."""
        return sum(reader in flight.readers for flight in self._in_flight)

    def launch(self, step: Step, readers: Sequence[Any]) -> None:
        """Launches one step. `readers` has an object for each slot, None for a slot that nobody reads."""
        self.execute(step)
        self.copy_report(readers, step.drafts)

    def execute(self, step: Step) -> None:
        """Executes one step, and captures it if it is new. Nobody reads its report."""
        if step not in self._captured:
            self._captured[step] = self._capture(partial(self._run, step))
            if step.part != Part.LOGITS:  # the capture has executed it; but the logits are in new memory, still empty
                return
        self._captured[step]()

    def copy_report(self, readers: Sequence[Any], drafts: bool = False) -> None:
        """Queues a copy of the present report to the host."""
        buffer = self._idle.pop() if self._idle else self._new_buffer()
        buffer.report.copy_(self._report, non_blocking=True)
        if buffer.arrived is not None:
            buffer.arrived.record()
        self._in_flight.append(_InFlight(buffer, readers, drafts))

    def collect(self) -> tuple[bool, list[tuple[Any, Report]]]:
        """Waits for the oldest step: whether it had drafts, and each reader with its slot's report.

        Idle slots report nothing.
        """
        flight = self._in_flight.popleft()
        buffer = flight.buffer
        if buffer.arrived is not None:
            buffer.arrived.synchronize()
        report = buffer.report[: len(flight.readers)]
        rows = zip(flight.readers, report.tolist(), report.view(torch.float32).tolist(), strict=True)
        reports = [
            (reader, _report(numbers, floats))
            for reader, numbers, floats in rows
            if reader is not None and numbers[0] >= 0
        ]
        self._idle.append(buffer)
        return flight.drafts, reports

    def drain(self) -> None:
        """Waits for all steps in flight, and drops their reports."""
        while self._in_flight:
            self.collect()

    def _new_buffer(self) -> _HostBuffer:
        on_gpu = self._report.is_cuda
        report = torch.empty(self._report.shape, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        return _HostBuffer(report, torch.cuda.Event() if on_gpu else None)


def _report(numbers: list[int], floats: list[float]) -> Report:
    """The report [3M+1] of one slot, given as integers and as the floats of the same bits."""
    *triples, drafts = numbers
    ends = (at for at in range(0, len(triples), 3) if triples[at] < 0)
    count = next(ends, len(triples))
    return Report([(numbers[at], floats[at + 2], numbers[at + 1]) for at in range(0, count, 3)], drafts)
