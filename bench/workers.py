"""Measure in processes of their own, of this checkout or another."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any


class Worker:
    """A process of a script that answers each question with one line of JSON, by `serve`, until it is left.

    It imports `checkout`, a folder named internlm3, where one is given. Where it fails this process ends too.
    """

    def __init__(self, script: str, *arguments: str, checkout: str | None = None):
        environment = dict(os.environ)
        if checkout:
            environment["PYTHONPATH"] = os.path.dirname(os.path.abspath(checkout))
        self._name = checkout or script
        self._process = subprocess.Popen(
            [sys.executable, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # it ends when its questions do

    def ask(self, question: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, so that no answer comes
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"{self._name} failed: what it said stands above")
        return json.loads(answer)


def serve(answer: Callable[[Any], Any]) -> None:
    """Answers the questions that come. Whatever else is printed on the way goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for question in sys.stdin:
        print(json.dumps(answer(json.loads(question))), file=answers, flush=True)
