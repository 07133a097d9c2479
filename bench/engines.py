"""The engines of bench.ops, each in a process of its own.

An engine that ends its process is a row, and the other rows are measured. A user's file never runs in the process that
prints and writes the rows, nor in that of another engine.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from . import peers, user_kernels
from .cases import DENSE, Case
from .integrity import Watch
from .measure import Engine, known_engine, measure, ours, untimed
from .record import Row
from .timing import name_of
from .workers import Ended, Worker


class EngineProcess:
    """An engine's process, which starts when it is first asked, and again after it has ended.

    arguments: those of bench.ops, which say what the cases are.
    """

    def __init__(self, name: str, device: torch.device, arguments: Iterable[str], worker: str = ""):
        self.name = name
        self._device = device
        self._arguments = [*arguments, "--worker", worker or name]
        self._process: Worker | None = None

    def end(self, error: BaseException | None = None) -> None:
        """Ends the process; at once if there was an error."""
        if self._process is not None:
            self._process.__exit__(error)
            self._process = None

    def ask(self, question: Any) -> Any:
        """The answer of `answers`. Raises Ended."""
        self._process = self._process or Worker("bench.ops", *self._arguments)
        try:
            return self._process.ask(question)
        except BaseException as error:  # it has ended, or Ctrl-C ends its work
            self.end(error)
            raise

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
