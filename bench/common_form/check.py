"""Check a solution on a workload, strictly, and time it."""

import statistics
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import harness, peers, strict, verify
from ..cases import Arguments
from ..measure import reason_of
from ..timing import FLOOR, Call, cold_calls, rounds_of
from .definition import Definition, Reference, Unable
from .solution import Loaded
from .workload import Workload, check_memory, draw

ROUNDS = 20
REFERENCE_ROUNDS = 5


class Verdict(NamedTuple):
    """The status of a trace, and why. The errors are there for PASSED and INCORRECT_NUMERICAL, the times for PASSED."""

    status: str
    log: str = ""
    errors: tuple[float, float] | None = None  # the largest, relative and absolute
    times: tuple[float, float] | None = None  # milliseconds of the solution and of the reference, means


def verdict(workload: Workload, reference: Reference, loaded: Loaded, device: torch.device) -> Verdict:
    """Checks a solution as `bench.ops --kernel` checks a kernel, then times it. Raises Unable if it can't be checked.

    The calls are timed one by one, not in a CUDA graph, which an author's code may not permit. So are the reference's.
    """
    definition, axes = loaded.definition, workload.axes
    check_memory(workload, definition, device)
    new = partial(draw, workload, definition, reference, device)

    def run(given: Arguments) -> tuple[Any, ...]:
        return loaded.call(given, loaded.new_outputs(axes, device), device)

    try:
        with peers.time_limit(peers.SECONDS):
            values = new()
            results = strict.watched(run, loaded.watching, True)(verify.copies(values, verify.same_strides))
            wrong = _form(results, definition, axes)
            if wrong:
                return wrong
            errors = _errors(results, reference(**values))
            error = strict.error_of(reference, new, run, loaded.watching)
            if error:
                return Verdict("INCORRECT_NUMERICAL", error, errors)
            kept = _calls(new, loaded, axes, device)

        def whole() -> None:
            for call in kept:
                call()

        rounds = rounds_of(whole, len(kept))
        times = [*strict.checked_rounds(reference, rounds, ROUNDS, kept, new, loaded.watching)]
    except Unable:
        raise
    except strict.Refused as refused:
        return Verdict("RUNTIME_ERROR", f"REFUSED: {refused}")
    except peers.Unfit as late:
        return Verdict("TIMEOUT", str(late))
    except Exception as error:  # whatever an author's code raises belongs in the trace
        return Verdict("RUNTIME_ERROR", reason_of(error))
    if min(times) < FLOOR:
        return Verdict("RUNTIME_ERROR", f"REFUSED: a round took {min(times):.3g} us per call, less than {FLOOR} us")
    slow = islice(rounds_of(partial(reference, **values), 1), REFERENCE_ROUNDS)
    return Verdict("PASSED", "", errors, (statistics.fmean(times) / 1e3, statistics.fmean(slow) / 1e3))


def _calls(new: strict.Draw, loaded: Loaded, axes: dict[str, int], device: torch.device) -> list[strict.Kept]:
    """Calls with inputs and outputs of their own: on a GPU enough to leave little of them in its L2 cache."""

    def call() -> strict.Kept:
        given, outputs = new(), loaded.new_outputs(axes, device)
        made: Call = partial(loaded.call, given, outputs, device)
        return strict.Kept(made, given)

    first = call()
    if device.type != "cuda":
        return [first]
    first()
    size = sum(x.nbytes for _, x in harness.tensors_in((first.arguments, first.results)))
    count, _ = cold_calls(device, size, size)
    return [first, *(call() for _ in range(count - 1))]


def _form(results: tuple[Any, ...], definition: Definition, axes: dict[str, int]) -> Verdict | None:
    """What is wrong with the number, kind, shapes and dtypes of the results."""
    outputs = definition.outputs
    if len(results) != len(outputs):
        return Verdict("INCORRECT_SHAPE", f"it returns {len(results)} outputs, must be {', '.join(outputs)}")
    for x, (name, spec) in zip(results, outputs.items(), strict=True):
        if type(x) is not Tensor:
            return Verdict("RUNTIME_ERROR", f"REFUSED: {name} is a {type(x).__name__}, and must be a plain Tensor")
        if [*x.shape] != spec.sizes(axes):
            return Verdict("INCORRECT_SHAPE", f"{name} has shape {[*x.shape]}, must have {spec.sizes(axes)}")
        if x.dtype != spec.dtype:
            return Verdict("INCORRECT_DTYPE", f"{name} is {x.dtype}, must be {spec.dtype}")
    return None


def _errors(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[float, float]:
    """The largest relative error, of elements that are not to be zero, and the largest absolute error."""
    relative, absolute = [0.0], [0.0]
    for x, y in zip(results, expected, strict=True):
        found, wanted = x.to(y.device).double(), y.double()
        error = torch.where(found == wanted, 0.0, (found - wanted).abs())
        shares = (error / wanted.abs())[wanted != 0]
        relative += [shares.max().item()] * bool(shares.numel())
        absolute += [error.max().item()] * bool(error.numel())
    return _largest(relative), _largest(absolute)


def _largest(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).max().item()  # NaN if one is
