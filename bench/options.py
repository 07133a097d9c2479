"""Types of command-line arguments. A bad argument is refused with a sentence before any work begins."""

import argparse
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not among the known ones; suggests the nearest."""
    known = list(known)
    low = {x.lower(): x for x in known}
    near = difflib.get_close_matches(name.lower(), low, 1, 0.4)
    return f"there is no {what} {name!r}" + (
        f": did you mean {low[near[0]]!r}?" if near else f": there are {', '.join(known)}"
    )


def one_of(what: str, names: Iterable[str]) -> Callable[[str], str]:
    """An argument that is one of these names, in upper or lower case."""
    known = {name.lower(): name for name in names}

    def choose(text: str) -> str:
        if text.lower() not in known:
            raise argparse.ArgumentTypeError(unknown(what, text, known.values()))
        return known[text.lower()]

    return choose


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def output(text: str) -> str:
    """The path of a file that will be written."""
    if Path(text).is_dir() or not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} can't be written: name a file in a folder that exists")
    return text
