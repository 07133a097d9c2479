"""State that threads share: one at a time changes it, and nothing that breaks a change off leaves it half done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from types import FrameType

# Ctrl-C again after this many seconds is raised at once.
PATIENCE = 1.0


class Reentered(RuntimeError):
    """A change began inside another one of the same thread."""

    def __init__(self) -> None:
        super().__init__(
            "called from inside a step of the same model, as a logits processor is: such a callback may call the model "
            "itself (its forward), or generate with another model"
        )


class Exclusive:
    """A base class: a subclass changes its state inside `with self.exclusively()`, and says how to `repair` it.

    After a fork the child has a lock of its own, whichever thread held the parent's, and the state is repaired.

    Attributes:
        forked: whether this is the copy of a forked process.
    """

    def __init__(self) -> None:
        self.forked = False
        self._lock, self._changing = threading.RLock(), threading.Lock()
        self._broken = False
        _alive.add(self)

    def repair(self) -> None:
        """Makes the state whole again after a change was broken off anywhere. May run more than once."""
        raise NotImplementedError

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """A change: other threads wait for its end, and so does Ctrl-C.

        An exception inside, whatever its kind, repairs the state; if that is broken off too, the next change does.

        Raises Reentered inside a change of the same thread, where a callback or the garbage collector may call.
        """
        with self._lock, held_back_interrupts():
            if self._changing.locked():  # by this thread: others wait above
                raise Reentered
            with self._changing:
                if self._broken:
                    self._repair()
                self._broken = True
                try:
                    yield
                except BaseException:
                    self._repair()
                    raise
                self._broken = False

    def _repair(self) -> None:
        self.repair()
        self._broken = False

    def _after_fork(self) -> None:
        self.forked = True
        self._lock, self._changing = threading.RLock(), threading.Lock()
        self._broken = True


@contextlib.contextmanager
def held_back_interrupts() -> Iterator[None]:
    """Ctrl-C (SIGINT) waits for the end of the block. A second one is raised at once, if it comes a second later.

    Only the main thread gets signals; in another thread this does nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[float, int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((time.monotonic(), number, frame))
        if held[-1][0] - held[0][0] > PATIENCE:
            handler(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0][1:])


_alive: weakref.WeakSet[Exclusive] = weakref.WeakSet()


def _renew_all() -> None:
    for exclusive in list(_alive):
        exclusive._after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew_all)
