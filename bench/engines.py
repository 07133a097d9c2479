"""The engines of bench.ops, each in a process of its own.

An engine that ends its process is a row, and the other rows are measured. A user's file never runs in the process that
prints and writes the rows, nor in that of another engine.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import peers, user_kernels
from .cases import DENSE, Case
from .integrity import Watch
from .measure import Engine, known_engine, measure, ours, untimed
from .record import Row
from .timing import name_of
from .workers import Ended, Restarted, Worker


class EngineProcess(Restarted):
    """An engine's process. arguments: those of bench.ops, which say what the cases are."""

    def __init__(self, name: str, device: torch.device, arguments: Iterable[str], worker: str = ""):
        super().__init__(partial(Worker, "bench.ops", *arguments, "--worker", worker or name))
        self.name = name
        self._device = device

    def row(self, case: Case) -> Row:
        why = self.name in peers.PEERS and peers.unfit(self.name, self._device)
        if why:
            return untimed(case, self.name, self._device, f"not timed: {why}")
        try:
            row = Row(**self.ask((case.op, case.shape, name_of(case.dtype))))
        except Ended as ended:
            return untimed(case, self.name, self._device, f"not timed: it ended its process, {ended.how}")
        if not row.rounds and self._device.type == "cuda":
            self.end()  # after an illegal memory access no later call would work
        return row


class UserProcess(EngineProcess):
    """That of a user's file. Raises ValueError if the file can't be run or has no op."""

    def __init__(self, path: str, device: torch.device, arguments: Iterable[str]):
        if not path.endswith(".py"):  # a worker of such a name might be that of another engine
            raise ValueError(f"{path} is not a Python file: its name must end in .py")
        super().__init__(Path(path).name, device, arguments, worker=path)
        try:
            found = self.ask(None)
        except Ended as ended:
            raise ValueError(f"{path} ends the process when it is run: {ended.how}") from None
        if "error" in found:
            self.end()
            raise ValueError(found["error"])
        self.ops: list[str] = found["ops"]
        self._quantised: bool = found["quantised"]

    def takes(self, case: Case) -> bool:
        return case.op in self.ops and (case.stored == DENSE or self._quantised)


def answers(name: str, every: Iterable[Case], device: torch.device, rounds: int, seed: int) -> Callable[[Any], Any]:
    """What the process of an engine answers: to an op, shape and dtype its row, to None what a user's file has.

    name: of ours or a peer, or the path of a user's file. The inputs of a row depend on the seed alone, not on the rows
    before it.
    """
    known = {(case.op, case.shape, name_of(case.dtype)): case for case in every}
    found: dict[str, Any] = {}
    if name in (ours(device)[0], *peers.PEERS):
        engine = known_engine(name, device)
    else:
        watch = Watch()
        try:
            file = user_kernels.load(name)
        except ValueError as error:
            found = {"error": str(error)}
            return lambda _: found
        found = {"ops": [*file.ops], "quantised": file.quantised}
        watching = user_kernels.watching(watch, file.files)
        engine = Engine(Path(name).name, lambda op, arguments: file.ops[op].bound(**arguments), watching)

    def answer(question: Any) -> Any:
        if question is None:
            return found
        torch.manual_seed(seed)
        row = measure(known[tuple(question)], engine, device, rounds)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # others measure on the same GPU
        return dataclasses.asdict(row)

    return answer
