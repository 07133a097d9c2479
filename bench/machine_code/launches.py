"""Compile what an op launches, for a GPU that need not be present.

The op's own Python runs on tensors with a shape, strides and a device but no memory. Its launches are compiled instead
of run, with the signature, constants, alignments and options that the launcher chose, so there is no second list of
configurations to maintain.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .targets import TARGETS, Target


class Launch(NamedTuple):
    kernel: str
    arguments: list[str]  # the names of the run-time arguments, in order
    constants: dict[str, Any]  # the compile-time arguments
    compiled: CompiledKernel
    programs: int


class _Absent(torch.Tensor):
    """A tensor without memory that reports the GPU as its device."""

    device = property(lambda self: torch.device("cuda", torch.cuda.current_device()))
    is_cuda = property(lambda self: True)


class _AbsentMode(TorchFunctionMode):
    """Makes every tensor created inside absent, by creating it on PyTorch's meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(_Absent, lambda x: x.as_subclass(torch.Tensor), (args, kwargs or {}))
        if "device" in kwargs:
            kwargs["device"] = "meta"
        result = func(*args, **kwargs)
        if isinstance(result, torch.Size):  # tree_map would make it a plain tuple
            return result
        return tree_map_only(torch.Tensor, lambda x: x.as_subclass(_Absent), result)


class _Pointer:
    """What Triton specialises a tensor argument on: dtype, alignment and extent. Storages count as aligned."""

    def __init__(self, x: torch.Tensor) -> None:
        self.dtype = x.dtype
        self._offset = int(x.storage_offset()) * x.element_size()
        self._bytes = int(x.untyped_storage().nbytes())

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        return self._bytes


@contextlib.contextmanager
def _acting_as(target: Target) -> Iterator[list[Launch]]:
    """Makes torch and Triton see this GPU. Launches are compiled instead of run, and listed."""
    # Launchers and Triton cache by device index, so each target gets its own.
    index = list(TARGETS.values()).index(target)
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        args = tuple(_Pointer(x) if isinstance(x, torch.Tensor) else x for x in args)
        kwargs = {name: _Pointer(x) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled is None:  # refused by `compilations`
            return
        signature = compiled.src.signature
        arguments = [name for name, kind in signature.items() if kind != "constexpr"]
        constants = {list(signature)[path[0]]: value for path, value in compiled.src.constants.items()}
        launches.append(Launch(self.__name__, arguments, constants, compiled, math.prod(grid)))

    properties = SimpleNamespace(
        major=target.capability[0], minor=target.capability[1], multi_processor_count=target.multiprocessors
    )
    driver = SimpleNamespace(
        get_current_target=lambda: target.gpu,
        get_current_device=lambda: index,
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(torch.cuda, "current_device", lambda: index),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: target.capability),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        mock.patch.object(torch.version, "hip", None if target.is_cuda else "6.0"),
        _AbsentMode(),
    ):
        yield launches


def compile_launches(
    op: Callable[..., Any], arguments: Callable[[torch.device], dict[str, Any]], target: Target
) -> list[Launch]:
    """The compiled launches of op(**arguments(device)) on this target, in order."""
    with _acting_as(target) as launches:
        op(**arguments(torch.device("cuda", torch.cuda.current_device())))
    return launches


def compilations(calls: Callable[[torch.device], None], target: Target) -> set[str]:
    """The keys of what the launches of calls(device) would compile on this target; nothing is compiled."""
    wanted: set[str] = set()

    def refuse(*, key: str, fn: Any, **_: Any) -> bool:
        wanted.add(f"{fn.name}: {key}")
        return True

    with _acting_as(target), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = refuse
        calls(torch.device("cuda", torch.cuda.current_device()))
    return wanted
