"""Whether a user's file leaves alone what checks and times it. bench/README.md says what this can't exclude.

A `Watch` is made before the file runs. It knows the functions by which results are compared and times are taken, and
PyTorch's settings; `mend` says what has changed, and puts it back. `calls` looks at a call while it runs.
"""

import contextlib
import ctypes
import gc
import statistics
import sys
import threading
import time
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from internlm3.kernels import reference

# What a call does besides computing. These are seldom wrong in the first call, which may compile and tune.
LATER = {
    "open": "opens a file",
    "_thread.start_new_thread": "starts a thread",
    "subprocess.Popen": "starts a process",
    "os.fork": "starts a process",
    "socket.connect": "connects to another process",
}
SEARCHES = ("gc.get_objects", "gc.get_referrers", "gc.get_referents")
ORDINARY = (LookupError, AttributeError, StopIteration, GeneratorExit)  # raised and caught as a way to ask
PERSISTING_L2 = 6  # CU_LIMIT_PERSISTING_L2_CACHE_SIZE of the CUDA driver

SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "num_threads": (torch.get_num_threads, torch.set_num_threads),
    "default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
}
_listeners: list[Callable[[str], None]] = []


def _hear(event: str, _: Any) -> None:
    for listener in _listeners:
        listener(event)


_hook_added = False


# PyTorch's functions that compare and time. Of the others it replaces some itself, when torch.compile is imported.
TORCH = ("equal", "where", "full", "unravel_index", "empty_strided")
CUDA = ("synchronize", "Event", "CUDAGraph", "graph", "Stream", "current_stream", "is_available")


def _owners() -> Iterator[tuple[str, Any, Sequence[str]]]:
    """Modules and classes whose functions check, time and compute the expected values, and these functions' names."""
    yield "torch", torch, TORCH
    yield "torch.cuda", torch.cuda, CUDA
    named: dict[str, Any] = {"torch.Tensor": torch.Tensor, "torch.cuda.Event": torch.cuda.Event}
    named |= {"torch.cuda.CUDAGraph": torch.cuda.CUDAGraph, "reference": reference}
    named |= {"time": time, "statistics": statistics}
    for name, module in [*sys.modules.items()]:
        if (name.startswith("bench.") or name == "__main__") and isinstance(module, types.ModuleType):
            named[name] = module
            for key, x in vars(module).items():
                if isinstance(x, type) and x.__module__ == name:
                    named[f"{name}.{key}"] = x
    for name, owner in named.items():
        yield name, owner, tuple(vars(owner))


def _l2_driver() -> Any:
    """NVIDIA's driver, or None without one."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


class Watch:
    """Knows what checks and times a kernel, as it is now."""

    def __init__(self) -> None:
        global _hook_added
        if not _hook_added:
            sys.addaudithook(_hear)  # Python never removes one
            _hook_added = True
        self._functions: list[tuple[str, Any, str, Any, Any]] = []
        for where, owner, names in _owners():
            for name in names:
                x = vars(owner)[name]
                constant = where.startswith("bench.") and not name.startswith("__")
                if constant or callable(x) or isinstance(x, (property, staticmethod, classmethod)):
                    self._functions.append((where, owner, name, x, getattr(x, "__code__", None)))
        self._settings = {name: get() for name, (get, _) in SETTINGS.items()}
        self._frozen = gc.get_freeze_count()
        self._driver = _l2_driver()

    def mend(self) -> str:
        """What was changed since, in one sentence, or "". Puts it back."""
        found = []
        for where, owner, name, x, code in self._functions:
            if vars(owner).get(name) is not x:
                setattr(owner, name, x)
                found.append(f"it replaces {where}.{name}, by which kernels are checked or timed")
            elif getattr(x, "__code__", None) is not code:
                x.__code__ = code
                found.append(f"it rewrites {where}.{name}, by which kernels are checked or timed")
        for name, (get, put) in SETTINGS.items():
            if get() != self._settings[name]:
                found.append(f"it leaves torch's {name} at {get()}: set it within a call, and put it back")
                put(self._settings[name])
        if gc.get_freeze_count() > self._frozen:
            gc.unfreeze()
            found.append("it hides objects by gc.freeze from the search for results that were kept")
        if self._driver is not None:
            size = ctypes.c_size_t()
            if self._driver.cuCtxGetLimit(ctypes.byref(size), PERSISTING_L2) == 0 and size.value:
                self._driver.cuCtxSetLimit(PERSISTING_L2, ctypes.c_size_t(0))
                self._driver.cuCtxResetPersistingL2Cache()
                found.append(f"it sets aside {size.value} bytes of L2 cache, which keep its data between calls")
        return found[0] if found else ""

    @contextlib.contextmanager
    def calls(self, paths: Collection[str], first: bool) -> Iterator[list[str]]:
        """Adds to the list, in sentences, what code of these files does in the block besides computing.

        first: a call that may compile, tune and cache; later ones open no files and start nothing.
        """
        found: list[str] = []
        thread = threading.get_ident()

        def heard(event: str) -> None:
            if threading.get_ident() != thread:
                return
            if event in SEARCHES and sys._getframe(2).f_code.co_filename in paths:
                found.append(f"it searches this process by {event}, where others' values are")
            elif event in LATER and not first:
                found.append(f"it {LATER[event]} in a call that has nothing left to compile")

        def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
            if frame.f_code.co_filename not in paths:
                return None
            if event == "exception" and not issubclass(argument[0], ORDINARY):
                line, name = frame.f_lineno, argument[0].__name__
                found.append(f"it catches {name} in line {line} ({argument[1]}) and computes in another way")
            return trace

        before = sys.gettrace()
        _listeners.append(heard)
        sys.settrace(trace)
        try:
            yield found
        finally:
            sys.settrace(before)
            _listeners.remove(heard)
        if message := self.mend():
            found.append(message)
