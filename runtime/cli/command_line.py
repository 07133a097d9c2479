"""A parser of command lines whose errors are one line that names what to write instead."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ..common.keywords import nearest
from ..common.other_libraries import LLM_COUNTERPARTS, SAMPLING_COUNTERPARTS
from ..sampling.settings import ALIASES

_OTHER_WORDS = {**LLM_COUNTERPARTS, **SAMPLING_COUNTERPARTS, **ALIASES}


class CommandParser(argparse.ArgumentParser):
    """argparse's, but for errors: usage before them would be 30 lines, and a wrong switch would have no hint."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help shows the usage)\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """What a command does not know is an error of that command, not of the program."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hint = self._hint(unknown[0])
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {hint}?" if hint else ""))
        return found, unknown

    def _hint(self, argument: str) -> str | None:
        """The switch that someone who wrote this may have meant: misspelt, with underscores, or of another program."""
        if not argument.startswith("-"):
            return None
        name = argument.partition("=")[0].lstrip("-").replace("-", "_")
        switches = [switch for action in self._actions for switch in action.option_strings]
        other = "--" + _OTHER_WORDS.get(name, name).replace("_", "-")
        return other if other in switches else nearest(other, switches)


def text(given: str) -> str:
    """Text of a command line. What is not in the locale's encoding cannot be read as text: an error that says so."""
    try:
        given.encode()
    except UnicodeEncodeError:
        shown = given.encode(errors="surrogateescape").decode(errors="replace")
        raise argparse.ArgumentTypeError(f"{shown!r} is not text in this terminal's encoding") from None
    return given
