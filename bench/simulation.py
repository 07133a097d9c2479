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


class Programs(NamedTuple):
    """The programs of a launch, all alike. Bytes are those of one program."""

    count: int
    warps: int
    registers: int  # of a thread
    shared: int  # bytes of shared memory
    early: float = 0  # bytes of memory that are requested before the wait for the predecessor
    prefetched: float = 0  # of the late bytes, those that are requested into the L2 cache before that wait
    late: float = 0  # bytes of memory that are requested after it
    cached: float = 0  # bytes of the L2 cache that are requested after it
    tiles: int = 1  # in which late and cached bytes come, one after another
    outstanding: int = 1  # tiles that are requested ahead
    before: Work = Work()  # the wait for the predecessor
    addressed: float = 0  # waits after that until the late bytes can be requested
    after: Work = Work()  # the wait for the predecessor, besides the tiles
    tile: Work = Work()  # for each tile
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
    tail: float  # from a program's last instruction to its end
    scattered: float  # bytes of scattered rows take the time of this many


def ends(launches: Sequence[Programs], gpu: Gpu, target: Target) -> list[float]:
    """When each launch ends, in microseconds. The first has no predecessor; each next one waits for the one before."""
    return _Simulation(launches, gpu, target).run()


# The life of a program: each item is called with the life itself, and has it go on when its next step is due.
_Life = Iterator[Callable[["_Life"], None]]


class _Multiprocessor:
    """What a multiprocessor has free, and the programs that compute on it."""

    def __init__(self, target: Target) -> None:
        self.room = [target.registers, target.shared, target.warps, target.blocks]
        self.port = 0.0  # until when it is busy with the bytes requested of it
        # Each warp that computes executes instructions at the same rate, so a count of them, of a warp that computed
        # all the time, tells which program is next to finish.
        self.executed = self.since = 0.0
        self.computing: list[tuple[float, int, int, _Life]] = []  # by that count at its end; order; warps
        self.warps = self.changes = 0  # that compute; how often that number has changed


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
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()  # of two events at the same time, the first comes first
        self.placing = 0  # the launch whose programs are placed
        self.started, self.triggered, self.ended = ([0 for _ in launches] for _ in range(3))
        self.waiting: list[list[_Life]] = [[] for _ in launches]
        self.end: list[float] = []  # of the launches that have ended

    def run(self) -> list[float]:
        self._place(self.all)
        while self.events:
            self.now, _, action = heapq.heappop(self.events)
            action()
        return self.end

    def _go_on(self, program: _Life) -> None:
        if until := next(program, None):
            until(program)

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time, next(self.order), action))

    def _until(self, time: float) -> Callable[[_Life], None]:
        return lambda program: self._at(time, partial(self._go_on, program))

    def _place(self, where: Sequence[_Multiprocessor]) -> None:
        """Starts programs on these multiprocessors: the emptiest first, one on each in turn, while there is room."""
        while self.placing < len(self.launches):
            i = self.placing
            if i and self.triggered[i - 1] < self.launches[i - 1].count:
                return
            needs = self.needs[i]
            where = sorted(where, key=lambda each: -each.room[2])
            while self.started[i] < self.launches[i].count:
                where = [each for each in where if all(map(int.__ge__, each.room, needs))]
                where = where[: self.launches[i].count - self.started[i]]
                if not where:
                    return
                for each in where:
                    each.room = [room - need for room, need in zip(each.room, needs, strict=True)]
                    self.started[i] += 1
                    self._until(self.now + self.gpu.start)(self._program(i, each))
            self.placing += 1
            where = self.all

    def _trigger(self, i: int) -> None:
        self.triggered[i] += 1
        if self.triggered[i] == self.launches[i].count and self.placing == i + 1:
            self._place(self.all)

    def _arrival(self, at: _Multiprocessor, memory: float, cached: float = 0) -> float:
        """When bytes of memory and of the L2 cache, requested now, have arrived."""
        gpu, now, size = self.gpu, self.now, memory + cached
        if not size:
            return now
        self.l2 = served = max(self.l2, now) + size / gpu.l2
        at.port = max(at.port, now) + size / gpu.port
        if memory:
            self.memory = max(self.memory, now) + memory / gpu.read
            served = max(served, self.memory)
        # A queue hides the request's way, half of the trip.
        trip = gpu.trip if memory else gpu.hit
        return max(now + trip, max(served, at.port) + trip / 2)

    def _latency(self, work: Work) -> float:
        return work.waits * self.gpu.hit + work.barriers * self.gpu.barrier

    def _compute(self, at: _Multiprocessor, warps: int, instructions: float) -> Callable[[_Life], None]:
        def begin(program: _Life) -> None:
            self._execute(at)
            heapq.heappush(at.computing, (at.executed + instructions, next(self.order), warps, program))
            at.warps += warps
            self._next_end(at)

        return begin

    def _rate(self, at: _Multiprocessor) -> float:
        return min(self.gpu.issued_by_warp, self.gpu.issued / at.warps)

    def _execute(self, at: _Multiprocessor) -> None:
        """The instructions since the last change of what computes there."""
        if at.warps:
            at.executed += (self.now - at.since) * self._rate(at)
        at.since = self.now

    def _next_end(self, at: _Multiprocessor) -> None:
        at.changes += 1
        if at.computing:
            left = max(at.computing[0][0] - at.executed, 0.0)
            self._at(self.now + left / self._rate(at), partial(self._computed, at, at.changes))

    def _computed(self, at: _Multiprocessor, changes: int) -> None:
        if changes < at.changes:  # more or fewer programs compute than when this event was planned
            return
        self._execute(at)
        ended = []
        while at.computing and at.computing[0][0] <= at.executed + 1e-6:
            _, _, warps, program = heapq.heappop(at.computing)
            at.warps -= warps
            ended.append(program)
        self._next_end(at)
        for program in ended:
            self._go_on(program)

    def _program(self, i: int, at: _Multiprocessor) -> _Life:
        x, gpu = self.launches[i], self.gpu
        weight = gpu.scattered if x.scattered else 1.0
        if x.trigger == "start":
            self._trigger(i)
        if x.before != Work():
            yield self._until(self.now + self._latency(x.before))
            yield self._compute(at, x.warps, x.before.instructions)
        ready = self._arrival(at, x.early * weight)
        if x.prefetched:
            self.memory = max(self.memory, self.now) + x.prefetched * weight / gpu.read
        if x.trigger == "loads":
            self._trigger(i)

        if len(self.end) < i:
            yield self.waiting[i].append
        if i and self.now < self.end[i - 1] + gpu.release:
            yield self._until(self.end[i - 1] + gpu.release)
        if x.trigger == "wait":
            self._trigger(i)
        if x.late:
            yield from self._tiles(x, at, weight)
        else:
            ready = max(ready, self._arrival(at, 0, x.cached))
        yield self._until(max(ready, self.now + self._latency(x.after)))
        yield self._compute(at, x.warps, x.after.instructions)
        if x.trigger == "end":
            self._trigger(i)
        yield self._until(self.now + gpu.tail)

        at.room = [room + need for room, need in zip(at.room, self.needs[i], strict=True)]
        self.ended[i] += 1
        if self.ended[i] == x.count:
            self.end.append(self.now)
            for program in self.waiting[i + 1] if i + 1 < len(self.waiting) else ():
                self._go_on(program)
        if self.placing < len(self.launches):
            self._place([at])

    def _tiles(self, x: Programs, at: _Multiprocessor, weight: float) -> _Life:
        """A program's loop over its late bytes."""
        size, cached = x.late / x.tiles, x.cached / x.tiles

        def request(tile: int) -> float:
            if tile * size < x.prefetched:
                return self._arrival(at, 0, cached + size)
            return self._arrival(at, size * weight, cached)

        if x.addressed:
            yield self._until(self.now + x.addressed * self.gpu.hit)
        arrivals = deque(request(tile) for tile in range(min(x.outstanding, x.tiles)))
        for tile in range(x.tiles):
            yield self._until(max(self.now, arrivals.popleft()) + self._latency(x.tile))
            yield self._compute(at, x.warps, x.tile.instructions)
            if tile + x.outstanding < x.tiles:
                arrivals.append(request(tile + x.outstanding))
