"""Calls on a large stack, for recursion in foreign code, which would end the process where the stack does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
_setting = threading.Lock()  # the size of new stacks is the process's


def on_large_stack(work: Callable[[], T], size: int) -> T:
    """The result of `work`, called in a thread of its own with a stack of `size` bytes.

    Memory is used as far as the stack is. Raises what `work` raises.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    with _setting:
        before = threading.stack_size(size)
        try:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    return future.result()
