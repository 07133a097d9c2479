"""Steps that run ahead of the host: captured once for each shape, their tokens back through pinned memory."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .state import Tier

# Runs a step once, really, and returns what runs it again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def eager(step: Callable[[], None]) -> Callable[[], None]:
    step()
    return step


def cuda_graphs() -> Capture:
    """Each step a CUDA graph; all of them share one pool of memory, since no two run at once.

    The first run compiles and settles what a capture may not do; the capture behind it executes nothing. Where memory
    is too short for it, that step stays eager, with a warning.
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
class Told:
    """What the host is told of a row by one step: see `advance`."""

    token: int
    end: int
    logprob: float


@dataclass
class _Slot:
    """Host memory for what one step says, and when it is there."""

    report: Tensor
    there: Any  # torch.cuda.Event, None on a CPU


class Replays:
    """Steps that are under way, oldest first, each with what its reader noted of it.

    Args:
        step: (rows, tier) -> None: one decode step of the first `rows` rows, on the device's tensors alone.
        report: [B, 3] int32, where a step leaves its report to the host (see `advance`).
    """

    def __init__(self, step: Callable[[int, Tier], None], report: Tensor, capture: Capture):
        self._step, self._report, self._capture = step, report, capture
        self._captured: dict[tuple[int, Tier], Callable[[], None]] = {}
        self._idle: list[_Slot] = []
        self._flights: deque[tuple[_Slot, Sequence[Any]]] = deque()

    def __len__(self) -> int:
        """How many steps are under way."""
        return len(self._flights)

    def queue(self, rows: int, tier: Tier, notes: Sequence[Any]) -> None:
        """Queues one step. notes: one for each row, None where nobody asks for it."""
        if not self.prepare(rows, tier):
            self._captured[rows, tier]()
        self.tell(notes)

    def prepare(self, rows: int, tier: Tier) -> bool:
        """Runs a step, and keeps what runs it again, unless it has been. Whether it ran; nobody is told of it."""
        if (rows, tier) in self._captured:
            return False
        self._captured[rows, tier] = self._capture(lambda: self._step(rows, tier))
        return True

    def tell(self, notes: Sequence[Any]) -> None:
        """Brings what the rows say now to the host, in its turn."""
        slot = self._idle.pop() if self._idle else self._slot()
        slot.report.copy_(self._report, non_blocking=True)
        if slot.there is not None:
            slot.there.record()
        self._flights.append((slot, notes))

    def take(self) -> list[tuple[Any, Told]]:
        """Waits for the oldest step: each note with the report of its row, unless it was idle."""
        slot, notes = self._flights.popleft()
        if slot.there is not None:
            slot.there.synchronize()
        logprobs = slot.report[:, 2].contiguous().view(torch.float32).tolist()
        told = [
            (note, Told(token, end, logprob))
            for note, (token, end, _), logprob in zip(notes, slot.report.tolist(), logprobs, strict=False)
            if note is not None and token >= 0
        ]
        self._idle.append(slot)
        return told

    def drop(self) -> None:
        """Forgets what is under way, once it is done."""
        while self._flights:
            self.take()

    def _slot(self) -> _Slot:
        on_gpu = self._report.is_cuda
        report = torch.empty(self._report.shape, dtype=torch.int32, pin_memory=on_gpu)
        return _Slot(report, torch.cuda.Event() if on_gpu else None)
