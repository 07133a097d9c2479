"""Check and time an op by an engine: ours, a peer, or a user's file. Each result is right before its time counts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch

from internlm3 import kernels

from . import harness, interpreter, peers, roofline, strict, verify
from .cases import Arguments, Case
from .record import Part, Row, first_line
from .timing import FLOOR, Call, cold_calls, name_of, replayed, rounds_of

PART = Part("ops")
Make = Callable[[str, Arguments], Call]  # from an op's name and arguments, its call


def ours(device: torch.device) -> tuple[str, Make]:
    """The name of our engine on a device, and what makes its calls."""
    backend = kernels.for_device(device)
    name = "triton" if device.type == "cuda" else "cpu"
    return name, lambda op, arguments: partial(getattr(backend, op), **arguments)


class Engine(NamedTuple):
    """What computes an op. watching: of a user's file, whose kernels are checked strictly."""

    name: str
    make: Make
    watching: strict.Watching | None = None


def known_engine(name: str, device: torch.device) -> Engine:
    """Ours, or the peer of this name."""
    if name == ours(device)[0]:
        return Engine(*ours(device))
    return Engine(name, partial(peers.make, name, device=device))


def engines_of(case: Case, device: torch.device) -> list[str]:
    """The names of the engines that implement a case's op: ours, then peers."""
    return [ours(device)[0], *(peer for peer, about in peers.PEERS.items() if about.takes(case))]


def reason_of(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    if text and "active drivers" in text[0]:
        if interpreter.chosen():
            return "Triton finds no GPU, and the file asks its driver: the interpreter answers launches of kernels only"
        return "Triton finds no GPU: TRITON_INTERPRET=1 checks a kernel without one, and times the interpreter"
    return text[0] if isinstance(error, peers.Unfit) else first_line(error)


class Prepared(NamedTuple):
    """Calls of one case by one engine, each on inputs of its own; on a GPU in one CUDA graph."""

    whole: Call
    calls: int  # made by `whole`
    bytes: int  # of one call
    flops: int  # of one call
    cold: bool
    kept: Sequence[
        strict.Kept
    ] = ()  # the calls, if the results that they return while they are timed are to be checked

    def rounds(self) -> Iterator[float]:
        """Microseconds of one call, round after round without end."""
        return rounds_of(self.whole, self.calls)


def prepare(case: Case, make: Make, device: torch.device, keep: bool = False) -> Prepared:
    """keep: each call keeps its arguments and its newest results, for `strict.checked_rounds`."""
    kept: list[strict.Kept] = []

    def new(arguments: Arguments) -> Call:
        call = make(case.op, arguments)
        if not keep:
            return call
        kept.append(strict.Kept(call, arguments))
        return kept[-1]

    arguments = case.arguments(device)
    size, flops = 0, roofline.flops(case.op, arguments)
    first = new(arguments)
    result = first()
    size = roofline.bytes_moved(case.op, arguments, kept[0].results if keep else result)
    if device.type != "cuda":
        return Prepared(first, 1, size, flops, False, kept)
    calls, cold = cold_calls(device, size, roofline.nbytes(*arguments.values()))
    made = [first, *(new(case.arguments(device)) for _ in range(calls - 1))]
    if keep and share_memory(*kept[:2]):
        made, kept, cold = made[:1], kept[:1], False  # of several calls only the last one's results could be checked
    return Prepared(replayed(made), len(made), size, flops, cold, kept)


def share_memory(one: strict.Kept, other: strict.Kept) -> bool:
    """Whether a kernel returns the same memory from every call, as one with a static output does."""
    other()
    tensors = ([x for _, x in harness.tensors_in(each.results) if x.numel()] for each in (one, other))
    memory = ({x.untyped_storage().data_ptr() for x in results} for results in tensors)
    return not set.isdisjoint(*memory)


def described(case: Case, engine: str) -> tuple[str, dict[str, Any]]:
    """The name of the row of an engine at a case, and what tables group it by."""
    about = {"op": case.op, "shape": case.shape, "dtype": name_of(case.dtype), "tokens": case.tokens}
    name = f"{case.op}, {case.shape}, {about['dtype']}, {engine}"
    return name, {**about, "context": case.context, "engine": engine}


def untimed(case: Case, engine: str, device: torch.device, note: str) -> Row:
    """Why there is no time: of a peer a reason, of ours or a user's file a failure."""
    name, about = described(case, engine)
    if engine in peers.PEERS:
        return PART.missing(name, note, **about)
    return PART.check(name, note, **about)


def measure(case: Case, engine: Engine, device: torch.device, rounds: int) -> Row:
    """The row of an engine: its times; or a note if it is not installed, fails, or computes something else."""
    name, make, watching = engine
    failed = partial(untimed, case, name, device)

    def result(given: Arguments) -> Any:
        return make(case.op, given)()

    draw = partial(case.arguments, device)
    try:
        with peers.time_limit(peers.SECONDS):
            if watching:
                error = strict.error_of(case.op, draw, result, watching)
            else:
                error = verify.error_of(case.op, draw(), result)
            if error:
                return failed(f"WRONG, not timed: {error}")
            prepared = prepare(case, make, device, keep=watching is not None)
        if watching:
            times = [*strict.checked_rounds(case.op, prepared.rounds(), rounds, prepared.kept, draw, watching)]
        else:
            times = [*islice(prepared.rounds(), rounds)]
    except strict.Refused as refused:
        return failed(f"REFUSED: {refused}")
    except Exception as error:  # whatever a peer or a user's kernel raises belongs in its row
        return failed(f"not timed: {reason_of(error)}")
    if min(times) < FLOOR:
        return failed(f"REFUSED: a round took {min(times):.3g} us per call, and no call takes less than {FLOOR} us")
    return timed(*described(case, name), times, prepared)


def timed(name: str, about: dict[str, Any], times: list[float], prepared: Prepared) -> Row:
    """A measured row; `about` gets what follows from the times."""
    row = PART.figure(name, times, "us", **about, bytes=prepared.bytes, flops=prepared.flops, cold=prepared.cold)
    row.about["GB/s"] = prepared.bytes / row.value / 1e3
    row.about["TFLOP/s"] = prepared.flops / row.value / 1e6
    return row


def reported_once(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, but why an op has no time by an engine only once."""
    reported = set()
    for row in rows:
        why = row.about["op"], row.about["engine"], row.note
        if row.rounds or why not in reported:
            reported.add(why)
            yield row


def measured(chosen: Sequence[Case], device: torch.device, rounds: int) -> Iterator[Row]:
    """The rows of these cases by our engine and its peers, in this process, each as soon as it is measured."""

    def rows() -> Iterator[Row]:
        for case in chosen:
            for name in engines_of(case, device):
                yield measure(case, known_engine(name, device), device, rounds)

    for row in reported_once(rows()):
        yield row
        if device.type == "cuda" and not row.rounds and not _gpu_works():
            print("the GPU failed during that row and no longer responds: earlier rows are kept")
            return


def _gpu_works() -> bool:
    """False after an illegal memory access, which no later call of this process survives."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
