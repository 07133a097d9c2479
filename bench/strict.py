"""The check of a user's kernel, before and while it is timed: whatever it may recognise is changed under it.

Each situation takes away one way to look fast without computing. The kernel gets inputs that were drawn after its file
was loaded, and its results are compared with the reference as copies, made as soon as the call returns.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from random import Random, SystemRandom
from typing import Any

from torch import Tensor

from . import harness, verify
from .cases import Arguments
from .timing import Call

CHECKED = 5  # of the timed rounds, chosen by the operating system's random numbers
_random: Random = SystemRandom()  # a seed that a file sets does not change these
Draw = Callable[[], Arguments]
Watching = Callable[[bool], AbstractContextManager[list[str]]]  # Watch.calls of the kernel's file


class Refused(Exception):
    """Why a kernel's time does not count."""


class Kept:
    """A call on arguments of its own, which keeps what it returned."""

    def __init__(self, call: Call, arguments: Arguments):
        self.arguments = arguments
        self.results: Any = None
        self._call = call

    def __call__(self) -> None:
        self.results = self._call()


def put(given: Arguments, values: Arguments) -> None:
    """Writes new values into the same memory. A tensor's version, which a cache might compare, stays as it is."""
    for (_, x), (_, value) in zip(harness.tensors_in(given), harness.tensors_in(values), strict=True):
        x.data.copy_(value)


def _tensors(results: Any) -> list[Tensor]:
    return [x for _, x in harness.tensors_in(results)]


def _copied(results: Any) -> Any:
    """Plain results by value; others as they are, for `judge` to refuse."""
    copies = [x.clone() if type(x) is Tensor else x for x in (results if isinstance(results, tuple) else (results,))]
    return tuple(copies) if isinstance(results, tuple) else copies[0]


def _apart(x: Tensor, inputs: Arguments) -> bool:
    """Whether x shares no memory with the inputs."""
    return x.untyped_storage().data_ptr() not in {y.untyped_storage().data_ptr() for y in _tensors(inputs)}


def _overwrite(results: Any, inputs: Arguments) -> None:
    for x in _tensors(results):
        if type(x) is Tensor and _apart(x, inputs):
            harness.scramble(x)


def _overwrite_copies(results: Any, *inputs: Arguments) -> None:
    """Overwrites every tensor of this process that equals a result, which is a memo of it if it matters at all."""
    telling = [x for x in _tensors(results) if x.is_floating_point() and x.numel() > 1 and bool(x.min() != x.max())]

    def copy(x: Tensor) -> bool:
        alike = [y for y in telling if x is not y and (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)]
        return any(harness.same_bits(x, y) for y in alike) and all(_apart(x, given) for given in inputs)

    for x in [x for x in gc.get_objects() if type(x) is Tensor]:
        if copy(x):
            harness.scramble(x)


def _one_element(values: Arguments) -> None:
    """Changes one element of the first tensor of floating-point numbers, at a random place."""
    x = next((x for x in _tensors(values) if x.is_floating_point()), None)
    if x is not None:
        place = tuple(_random.randrange(size) for size in x.shape)
        x[place] = 3 - x[place]


def watched(run: Callable[[Arguments], Any], watching: Watching, first: bool) -> Callable[[Arguments], Any]:
    """run, which raises Refused after a call that did something besides computing."""

    def call(given: Arguments) -> Any:
        with watching(first) as seen:
            results = run({**given})
        if seen:
            raise Refused(seen[0])
        return results

    return call


def error_of(op: verify.Op, draw: Draw, run: Callable[[Arguments], Any], watching: Watching) -> str:
    """What is wrong with a kernel, in one sentence; "" if it computes the op in every situation.

    Raises Refused if it does something besides computing. Exceptions of `run` are passed on.
    """
    first, later = (watched(run, watching, first) for first in (True, False))
    for ordinary in (False, True):
        error = verify.error_of(op, draw(), first, strict=True, ordinary=ordinary)
        if error:
            return f"{'if its outputs begin with ordinary values, not with NaN: ' * ordinary}{error}"

    values = draw()
    given = verify.copies(values, verify.same_strides)
    results = first(given)
    changes: dict[str, Callable[[], Any]] = {
        "the same inputs again, after every kept copy of the result was overwritten": lambda: None,
        "the same inputs but for one element": lambda: _one_element(values),
        "new inputs in the same memory": lambda: values.update(draw()),
    }
    for what, change in changes.items():
        _overwrite_copies(results, given, values)
        _overwrite(results, given)
        change()
        put(given, values)
        results = later(given)
        error = verify.judge(op, values, given, _copied(results), strict=True)
        if error:
            return f"with {what}: {error}"
    return ""


def checked_rounds(
    op: verify.Op, rounds: Iterator[float], count: int, calls: Sequence[Kept], draw: Draw, watching: Watching
) -> Iterator[float]:
    """The next `count` of the rounds, each of which makes all calls. Raises Refused if a result of theirs is wrong.

    Before each round one call, chosen at random, gets new inputs in the same memory, and its earlier result is
    overwritten. What it returns is copied as soon as the round ends; that of some rounds is compared.
    """
    checked = {*_random.sample(range(count), min(count, CHECKED))}
    next(rounds)
    for i in range(count):
        call, values = _random.choice(calls), draw()
        _overwrite(call.results, call.arguments)
        put(call.arguments, values)
        time = next(rounds)
        copied = _copied(call.results)
        with watching(False) as seen:
            pass  # looks at what the round left
        if seen:
            raise Refused(seen[0])
        error = verify.judge(op, values, call.arguments, copied, strict=True) if i in checked else ""
        if error:
            raise Refused(f"in a timed call, with new inputs in the same memory: {error}")
        yield time
