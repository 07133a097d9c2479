"""Runs chat templates of unknown origin in a child process with limits on time and memory.

Checks in the sandbox cannot set these limits: a few lines of a template keep C code busy for hours (comparing lists
that double 40 times, dividing huge integers), where neither a check in Python nor Ctrl-C comes through, or make
gigabytes of small objects. And compiling a template takes time and memory before it runs at all.

The child starts with the first template and stays for the next ones, so that rendering takes hardly longer than in the
caller's process. It is stopped at a limit, and when the caller is interrupted.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any, NoReturn

from . import sandbox

# C code does not see the child's own alarm: after this many more seconds the child is killed.
_GRACE = 1.0
_MOST_IDLE = 4  # children that wait for the next template
_PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = sys.argv[1:]; "
    f"from {__name__} import serve; serve()"
)

# -------------------------------------------------------------------- in the caller's process


def isolated(task: Callable[..., Any], template: str, *arguments: Any) -> Any:
    """The result of `task`, a function of sandbox.py, which runs in a child process. Any thread may call this.

    Raises:
        ValueError: as `task` does; or a limit is exceeded.
        OSError: the child process cannot be started.
    """
    request = json.dumps([task.__name__, sandbox.SECONDS, sandbox.SIZE, template, *arguments], ensure_ascii=False)
    if len(request) > sandbox.SIZE:
        raise ValueError(f"chat template, line ?: it and the messages have more than {sandbox.SIZE} characters")
    child = _idle_child() or _Child()
    try:
        answer = child.ask(request.encode("utf-8", "surrogatepass") + b"\n")
    except BaseException:  # such as KeyboardInterrupt: the next caller must not read the answer to this request
        child.stop()
        raise
    if answer["reusable"] and len(_idle) < _MOST_IDLE:
        _idle.append(child)
    else:
        child.stop()
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["value"]


class _Child:
    """A child process that answers one request at a time."""

    def __init__(self) -> None:
        if not sys.executable:
            raise OSError("a chat template runs in a process of its own, and sys.executable does not name Python")
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            if not self._process.stdout.readline():  # type: ignore[union-attr]
                raise OSError(f"a chat template runs in a process of its own, and {sys.executable} does not start one")
        except BaseException:
            self.stop()
            raise

    def ask(self, request: bytes) -> dict[str, Any]:
        """The child's answer: its "value" or "error", and whether the child is "reusable"."""
        answers: list[bytes] = []
        exchange = Thread(target=self._exchange, args=(request, answers), daemon=True)
        exchange.start()
        limit = time.monotonic() + sandbox.SECONDS
        while exchange.is_alive() and time.monotonic() < limit + _GRACE:
            exchange.join(0.1)  # not for longer, since not every interrupt of this thread ends a wait
        late = time.monotonic() > limit
        if answers and answers[0].endswith(b"\n"):
            answer = json.loads(answers[0])
            return {**answer, "reusable": answer["reusable"] and not late}
        reason = _too_long(sandbox.SECONDS) if late else "it is nested too deeply, or needs too much memory"
        return {"error": f"chat template, line ?: {reason}", "reusable": False}

    def _exchange(self, request: bytes, answers: list[bytes]) -> None:
        with suppress(OSError):  # the process has ended
            self._process.stdin.write(request)  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
            answers.append(self._process.stdout.readline())  # type: ignore[union-attr]

    def is_usable(self) -> bool:
        """Whether the process runs, and is a child of this process: after a fork it is not."""
        return self._owner == os.getpid() and self._process.poll() is None

    def stop(self) -> None:
        """Ends the process. Does nothing to the child of another process."""
        if self._owner != os.getpid():
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


_idle: list[_Child] = []


def _idle_child() -> _Child | None:
    with suppress(IndexError):  # another thread may take the last one
        while _idle:
            child = _idle.pop()
            if child.is_usable():
                return child
    return None


@atexit.register
def _stop_idle() -> None:
    while child := _idle_child():
        child.stop()


# -------------------------------------------------------------------- in the child


def serve() -> None:
    """Answers requests until standard input ends."""
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as file:  # an allocator may have reserved much more than it uses
            most = int(file.read().split()[0]) * resource.getpagesize() + sandbox.MEMORY
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sys.stdout.buffer.write(b"\n")  # it has started
    sys.stdout.buffer.flush()
    for request in sys.stdin.buffer:
        sys.stdout.buffer.write(_answer(request))
        sys.stdout.buffer.flush()


class _OutOfTime(Exception):
    pass


def _answer(request: bytes) -> bytes:
    answer: dict[str, Any]
    try:
        task, seconds, size, *arguments = json.loads(request)
        _set_alarm(seconds)
        try:
            value = getattr(sandbox, task)(*arguments)
        finally:
            _set_alarm(0)
        if isinstance(value, str) and len(value) > size:
            raise ValueError(f"chat template, line ?: it makes a text of more than {size} characters")
        answer = {"value": value, "reusable": True}
    except ValueError as error:
        answer = {"error": str(error), "reusable": not isinstance(error.__cause__, (_OutOfTime, MemoryError))}
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _set_alarm(seconds: float) -> None:
    """Raises _OutOfTime in this thread after so many seconds; 0 turns it off. Windows has no such alarm."""
    if sys.platform == "win32":
        return

    def ring(*_: Any) -> NoReturn:
        raise _OutOfTime(_too_long(seconds))

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _too_long(seconds: float) -> str:
    return f"it runs for more than {seconds:g} seconds"
