"""A user's kernels: a Python file with functions named like ops, which take and return what the ops do.

Linear ops get quantised weights too if the file imports QuantisedWeight, by which it says that it knows them.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from internlm3 import kernels
from internlm3.kernels.quantised import QuantisedWeight

from .integrity import Watch
from .options import unknown


class UserFile(NamedTuple):
    """The ops of a file by name, and what looks at a call of one (see `Watch.calls`)."""

    ops: dict[str, Callable[..., Any]]
    watching: Callable[[bool], AbstractContextManager[list[str]]]


def watched(path: str, watch: Watch) -> UserFile:
    """As `load`. What the file changes when it is loaded is put back, and every call of its ops reports it."""
    ops = load(path)
    return UserFile(ops, watching(watch, [os.path.abspath(path)]))


def watching(watch: Watch, paths: Collection[str]) -> Callable[[bool], AbstractContextManager[list[str]]]:
    """To be called after files were loaded: puts back what they changed, and returns what looks at a call of them."""
    changed = watch.mend()

    @contextlib.contextmanager
    def watched(first: bool) -> Iterator[list[str]]:
        with watch.calls(paths, first) as found:
            yield found
        found[:0] = [changed] * bool(changed)

    return watched


class NotPython(Exception):
    """A file whose name does not end in .py."""


def run_file(path: str | Path, name: str) -> ModuleType:
    """Runs a file as a module of this name. Raises NotPython, or whatever the file raises."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise NotPython(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton looks there for a kernel's source
    spec.loader.exec_module(module)
    return module


def load(path: str) -> dict[str, Callable[..., Any]]:
    """Runs the file and returns its ops by name. Raises ValueError if it can't be run or defines no op."""
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist: name a Python file with a function named like an op")
    try:
        module = run_file(path, f"user_{Path(path).stem}")
    except NotPython:
        raise ValueError(f"{path} is not a Python file: its name must end in .py") from None
    except Exception as error:
        raise ValueError(f"{path} raises {type(error).__name__} when it is run: {error}") from None
    functions = [
        name for name, x in vars(module).items() if callable(x) and getattr(x, "__module__", "") == module.__name__
    ]
    ops = {name: getattr(module, name) for name in functions if name in kernels.__all__}
    if not ops:
        public = [name for name in functions if not name.startswith("_")]
        hint = f"; {unknown('op', public[0], kernels.__all__)}" if public else ""
        raise ValueError(f"{path} has no function named like an op{hint}")
    return ops


def takes_quantised(op: Callable[..., Any]) -> bool:
    """Whether the file of a user's op imports QuantisedWeight."""
    return any(x is QuantisedWeight for x in vars(sys.modules[op.__module__]).values())
