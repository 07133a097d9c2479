"""Worker processes that measure, from this checkout or another one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any


class Ended(SystemExit):
    """A worker has ended instead of answering. `how` says in which way. If it is not caught, this process exits."""

    def __init__(self, name: str, code: int):
        self.how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        super().__init__(f"{name} failed ({self.how}): see its output above")


class Worker:
    """Runs `module`, which answers each question with one line of JSON (see `serve`), until the `with` block ends.

    checkout: another checkout of this project, whose `internlm3` the worker imports instead of this one's.
    """

    def __init__(self, module: str, *arguments: str, checkout: str | None = None):
        self._name = checkout or module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | ({"INTERNLM3_CHECKOUT": os.path.abspath(checkout)} if checkout else {}),
        )  # fmt: skip

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: object = None, *_: object) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()  # closes stdin, which ends the worker

    def ask(self, question: Any) -> Any:
        """The worker's answer. Raises Ended."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the worker has ended: there is no answer
        answer = self._process.stdout.readline()
        if not answer:
            raise Ended(self._name, self._process.wait())
        return json.loads(answer)


class Restarted:
    """A worker that starts when it is first asked, and again after it has ended."""

    def __init__(self, start: Callable[[], Worker]):
        self._start = start
        self._worker: Worker | None = None

    def ask(self, question: Any) -> Any:
        """The worker's answer. Raises Ended."""
        self._worker = self._worker or self._start()
        try:
            return self._worker.ask(question)
        except BaseException as error:  # it has ended, or Ctrl-C ends its work
            self.end(error)
            raise

    def end(self, error: BaseException | None = None) -> None:
        """Ends the worker; at once if there was an error."""
        if self._worker is not None:
            self._worker.__exit__(error)
            self._worker = None


def serve(answer: Callable[[Any], Any]) -> None:
    """Answers questions from stdin until it closes. Whatever else is printed goes to stderr."""
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    for question in questions:
        print(json.dumps(answer(json.loads(question))), file=answers, flush=True)
