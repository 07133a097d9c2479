"""Runs commands of the command line in this process."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from internlm3 import LLM
from internlm3.runtime.cli.main import main

FIGURES = re.compile(
    r"\[prompt (\d+) tokens, [\d.]+ tokens/s; answer (\d+) tokens, [\d.]+ tokens/s; peak memory [\d.]+ GB\]"
)


@dataclass
class Done:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str


def run_command(
    load: Callable[..., LLM], *args: object, stdin: str | bytes = "", expect: int = 0, encoding: str = "utf-8"
) -> Done:
    """Runs `internlm3 ARGS`, with standard streams of this encoding that are as strict as those of a process.

    `load` takes the place of LLM. Fails unless the exit status is `expect`.
    """
    given = io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin)
    out, err = io.BytesIO(), io.BytesIO()

    def stream(buffer: io.BytesIO, **options: Any) -> io.TextIOWrapper:
        return io.TextIOWrapper(buffer, encoding=encoding, write_through=True, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOMP_SPINCOUNT", "20000")  # a command sets it, if it is not set
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("internlm3.runtime.api.llm.LLM", load)
        patch.setattr("sys.stdin", stream(given))
        patch.setattr("sys.stdout", stream(out))
        patch.setattr("sys.stderr", stream(err, errors="backslashreplace"))
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as stop:  # argparse's
            status = int(stop.code or 0)
        # Before the streams are dropped, which closes the buffers.
        done = Done(status, out.getvalue().decode(encoding), err.getvalue().decode(encoding))
    assert status == expect, done
    return done
