"""Simulate launches on a GPU, program by program: where each runs, when its bytes arrive, when it ends.

Programs are placed on multiprocessors by registers, shared memory, warps and the limit of blocks. Those of a launch may
start when all programs of its predecessor have triggered it. A program

    starts, and takes its room on a multiprocessor
    requests its early bytes
    waits until its predecessor has ended
    waits for data and at barriers, in sequence
    loads and computes its tiles, a number of which are outstanding at once
    computes the rest and ends, and its room is free

Loads go through one queue of bytes, in the order of the requests, and through a port of each multiprocessor. Programs
of a multiprocessor share its issue slots, and one warp issues at a limited rate.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from .machine_code.targets import Target


class Work(NamedTuple):
    """What a program does in sequence, loops included."""

    waits: float = 0  # for data: each for something requested after the previous one
    barriers: float = 0
    instructions: float = 0  # of a warp
    matrix: float = 0  # of these, tensor-core instructions that a warp waits for


class Programs(NamedTuple):
    """The programs of a launch, all alike. Bytes are those of one program."""

    number: int
    warps: int
    registers: int  # of a thread
    shared: int  # bytes of shared memory
    early: float = 0  # bytes of memory that are requested before the wait for the predecessor
    prefetched: float = 0  # of the late bytes, those that are requested into the L2 cache before that wait
    late: float = 0  # bytes of memory that are requested after it
    cached: float = 0  # bytes of the L2 cache that are requested after it
    tiles: int = 1  # in which late and cached bytes come, one after another
    outstanding: int = 1  # tiles that are requested ahead
    before: Work = Work()  # until the early bytes can be requested
    addressed: float = 0  # waits after that for the predecessor, until the late bytes can be requested
    after: Work = Work()  # after the wait for the predecessor and all tiles
    tile: Work = Work()  # after the arrival of each tile
    trigger: str = "start"  # the successor may start after: "start", "loads" (the early ones), "wait", or "end"
    scattered: bool = False  # reads rows of a matrix that are many megabytes apart


class Gpu(NamedTuple):
    """Rates in bytes and instructions per microsecond, times in microseconds."""

    read: float  # of memory
    l2: float  # from the L2 cache to all multiprocessors
    port: float  # into one multiprocessor
    issued: float  # instructions of a multiprocessor
    issued_by_warp: float
    trip: float  # from a request of memory to its data, if nothing is in the queues
    hit: float  # the same of the L2 cache
    start: float  # from a free place to a program's first instruction
    release: float  # from a launch's end until its successor knows
    barrier: float
    matrix: float  # a tensor-core instruction that a warp waits for
    tail: float  # from a program's last instruction to its end
    scattered: float  # bytes of scattered rows take the time of this many


def ends(launches: Sequence[Programs], gpu: Gpu, target: Target) -> list[float]:
    """When each launch ends, in microseconds. The first has no predecessor; each next one waits for the one before."""
    return _Simulation(launches, gpu, target).run()


# What happens at a time. It returns the time at which to call it again, or None.
_Action = Callable[[], "float | None"]


class _Multiprocessor:
    """What a multiprocessor has free, and the programs that compute on it."""

    def __init__(self, target: Target) -> None:
        self.room = [target.registers, target.shared, target.warps, target.blocks]
        self.port = 0.0  # until when it is busy with the bytes requested of it
        # All warps that compute execute at the same rate: the instructions of one that has always computed, at `since`.
        self.executed = self.since = 0.0
        self.computing: list[tuple[float, int, int, _Action]] = []  # that number at the end, order, warps, what follows
        self.warps = 0  # that compute
        self.changes = 0  # of that number


class _Simulation:
    def __init__(self, launches: Sequence[Programs], gpu: Gpu, target: Target) -> None:
        self.launches, self.gpu = launches, gpu
        self.all = [_Multiprocessor(target) for _ in range(target.multiprocessors)]
        step = target.registers_step
        self.needs = [
            (-(-x.registers // step) * step * target.gpu.warp_size * x.warps, x.shared + target.reserved, x.warps, 1)
            for x in launches
        ]
        self.memory = self.l2 = 0.0  # until when each is busy with the bytes requested of it
        self.now = 0.0
        self.events: list[tuple[float, int, _Action]] = []
        self.order = itertools.count()  # of two events at the same time, the first planned comes first
        self.action: _Action  # the one that happens
        self.placing = 0  # the launch whose programs are placed
        self.started, self.triggered, self.ended = ([0 for _ in launches] for _ in range(3))
        self.waiting: list[list[_Action]] = [[] for _ in launches]  # for the predecessor's end
        self.found: dict[int, float] = {}  # when a launch's first program knows the addresses of its late bytes
        self.end: list[float] = []  # of the launches that have ended

    def run(self) -> list[float]:
        self._place(self.all)
        while self.events:
            self.now, _, action = heapq.heappop(self.events)
            self._do(action)
        return self.end

    def _do(self, action: _Action) -> None:
        self.action = action
        time = action()
        if time is not None:
            self._at(time, action)

    def _at(self, time: float, action: _Action) -> None:
        heapq.heappush(self.events, (time, next(self.order), action))

    def _place(self, where: Sequence[_Multiprocessor]) -> None:
        """Starts programs on these multiprocessors: the emptiest first, one on each in turn, while there is room."""
        while self.placing < len(self.launches):
            i = self.placing
            if i and self.triggered[i - 1] < self.launches[i - 1].number:
                return
            needs = self.needs[i]
            where = sorted(where, key=lambda each: -each.room[2])
            while self.started[i] < self.launches[i].number:
                where = [each for each in where if all(map(int.__ge__, each.room, needs))]
                where = where[: self.launches[i].number - self.started[i]]
                if not where:
                    return
                for each in where:
                    each.room = [room - need for room, need in zip(each.room, needs, strict=True)]
                    self.started[i] += 1
                    self._at(self.now + self.gpu.start, self._program(i, each).__next__)
            self.placing += 1
            where = self.all

    def _trigger(self, i: int) -> None:
        self.triggered[i] += 1
        if self.triggered[i] == self.launches[i].number and self.placing == i + 1:
            self._place(self.all)

    def _program(self, i: int, at: _Multiprocessor) -> Iterator[float | None]:
        """The life of a program: the times at which it goes on, or None when what it waits for calls it."""
        x, gpu = self.launches[i], self.gpu
        if x.trigger == "start":
            self._trigger(i)
        if x.before != Work():
            yield self.now + self._latency(x.before)
            self._compute(at, x.warps, x.before.instructions)
            yield None
        ready = self._arrival(at, x.early, 0, x.scattered)
        self._arrival(at, x.prefetched, 0, x.scattered)
        if x.trigger == "loads":
            self._trigger(i)

        if len(self.end) < i:
            self.waiting[i].append(self.action)
            yield None
        if i and self.now < self.end[i - 1] + gpu.release:
            yield self.end[i - 1] + gpu.release
        if x.trigger == "wait":
            self._trigger(i)
        if x.late:
            yield from self._tiles(i, at)
        else:
            ready = max(ready, self._arrival(at, 0, x.cached))
        yield max(ready, self.now + self._latency(x.after))
        self._compute(at, x.warps, x.after.instructions)
        yield None
        if x.trigger == "end":
            self._trigger(i)
        yield self.now + gpu.tail

        at.room = [room + need for room, need in zip(at.room, self.needs[i], strict=True)]
        self.ended[i] += 1
        if self.ended[i] == x.number:
            self.end.append(self.now)
            for action in self.waiting[i + 1] if i + 1 < len(self.waiting) else ():
                self._do(action)
        self._place([at])
        yield None

    def _tiles(self, i: int, at: _Multiprocessor) -> Iterator[float | None]:
        """A program's loop over its late bytes."""
        x = self.launches[i]
        size, cached = x.late / x.tiles, x.cached / x.tiles

        def request(tile: int) -> float:
            if tile * size < x.prefetched:
                return self._arrival(at, 0, cached + size)
            return self._arrival(at, size, cached, x.scattered)

        if x.addressed:  # the first program loads from memory, the others from the L2 cache
            found = self.found.setdefault(i, self.now + x.addressed * self.gpu.trip)
            yield max(found, self.now + x.addressed * self.gpu.hit)
        arrivals = deque(request(tile) for tile in range(min(x.outstanding, x.tiles)))
        for tile in range(x.tiles):
            yield max(self.now, arrivals.popleft()) + self._latency(x.tile)
            self._compute(at, x.warps, x.tile.instructions)
            yield None
            if tile + x.outstanding < x.tiles:
                arrivals.append(request(tile + x.outstanding))

    def _latency(self, work: Work) -> float:
        gpu = self.gpu
        return work.waits * gpu.hit + work.barriers * gpu.barrier + work.matrix * gpu.matrix

    def _arrival(self, at: _Multiprocessor, memory: float, cached: float = 0, scattered: bool = False) -> float:
        """When bytes of memory and of the L2 cache, requested now, have arrived."""
        gpu, now, size = self.gpu, self.now, memory + cached
        if not size:
            return now
        self.l2 = served = max(self.l2, now) + size / gpu.l2
        at.port = max(at.port, now) + size / gpu.port
        if memory:
            self.memory = max(self.memory, now) + memory * (gpu.scattered if scattered else 1) / gpu.read
            served = max(served, self.memory)
        trip = gpu.trip if memory else gpu.hit
        # Half of a trip is the request's, which a queue hides.
        return max(now + trip, max(served, at.port) + trip / 2)

    def _compute(self, at: _Multiprocessor, warps: int, instructions: float) -> None:
        """The action is called again when the warps of a program have executed instructions that they begin now."""
        self._execute(at)
        heapq.heappush(at.computing, (at.executed + instructions, next(self.order), warps, self.action))
        at.warps += warps
        self._plan(at)

    def _rate(self, at: _Multiprocessor) -> float:
        """Instructions of a warp in a microsecond."""
        return min(self.gpu.issued_by_warp, self.gpu.issued / at.warps)

    def _execute(self, at: _Multiprocessor) -> None:
        """What a multiprocessor has executed until now."""
        if at.warps:
            at.executed += (self.now - at.since) * self._rate(at)
        at.since = self.now

    def _plan(self, at: _Multiprocessor) -> None:
        """The event of the next program that ends to compute, if no other begins before it."""
        at.changes += 1
        if at.computing:
            left = max(at.computing[0][0] - at.executed, 0.0)
            self._at(self.now + left / self._rate(at), partial(self._computed, at, at.changes))

    def _computed(self, at: _Multiprocessor, changes: int) -> None:
        if changes < at.changes:
            return
        self._execute(at)
        following = []
        while at.computing and at.computing[0][0] <= at.executed + 1e-6:
            _, _, warps, action = heapq.heappop(at.computing)
            at.warps -= warps
            following.append(action)
        self._plan(at)
        for action in following:
            self._do(action)
