"""Worker processes that measure, from this checkout or another one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from . import ROOT


class Worker:
    """Runs `module`, which answers each question with one line of JSON (see `serve`), until the `with` block ends.

    checkout: another checkout of this project, whose `internlm3` the worker imports instead of this one's.
    If the worker fails, this process exits.
    """

    def __init__(self, module: str, *arguments: str, checkout: str | None = None):
        self._name = checkout or module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | ({"INTERNLM3_CHECKOUT": os.path.abspath(checkout)} if checkout else {}),
        )  # fmt: skip

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes stdin, which ends the worker

    def ask(self, question: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the worker has ended: there is no answer
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"{self._name} failed: see its output above")
        return json.loads(answer)


def serve(answer: Callable[[Any], Any]) -> None:
    """Answers questions from stdin until it closes. Anything else that is printed goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for question in sys.stdin:
        print(json.dumps(answer(json.loads(question))), file=answers, flush=True)
