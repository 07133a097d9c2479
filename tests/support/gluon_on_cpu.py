"""Runs the Python source of the ring in bench/candidates on a CPU, program by program, with a stand-in for Gluon.

It shows what the source says: offsets, masks, slots of the rings, which groups of copies are waited for, the epilogue.
It can't show what a compiler and a GPU make of it: layouts, barriers between threads, the order of sums.

Copies happen as late as the waits allow, or as early as possible. So a chunk that is multiplied before its copy is
waited for is NaN, and one that is overwritten before it is multiplied is another chunk.
"""

from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.candidates import ring


class Block(Tensor):
    """A tensor of a program, whose `split` is Gluon's: of the last dimension, of size 2."""

    def split(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self[..., 0], self[..., 1]


class Pointer:
    """Addresses in a tensor's memory, in elements."""

    def __init__(self, tensor: Tensor, offsets: Tensor | int = 0):
        self.tensor, self.offsets = tensor, offsets
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offsets: Tensor | int) -> "Pointer":
        return Pointer(self.tensor, self.offsets + offsets)

    def places(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The offsets, and which of them are accessed: those must be inside."""
        offsets: Any = self.offsets
        inside = torch.ones_like(offsets, dtype=torch.bool) if mask is None else mask.expand(offsets.shape)
        assert ((offsets >= 0) & (offsets < self.tensor.numel()))[inside].all(), "an access outside of a tensor"
        return offsets, inside

    def load(self, mask: Tensor | None) -> Tensor:
        offsets, inside = self.places(mask)
        return torch.where(inside, self.tensor.view(-1)[torch.where(inside, offsets, 0)], 0)

    def store(self, value: Tensor, mask: Tensor) -> None:
        offsets, inside = self.places(mask)
        self.tensor.view(-1)[offsets[inside]] = value.expand(offsets.shape)[inside].to(self.tensor.dtype)


class Copies:
    """Asynchronous copies to shared memory, in groups that complete in order."""

    def __init__(self, early: bool):
        self.early, self.group, self.groups, self.waited = early, [], [], False
        self.before_wait: set[int] = set()  # the tensors that were read before the wait for the predecessor

    def load(self, slot: Tensor, pointer: Pointer, mask: Tensor | None = None) -> None:
        if not self.waited:
            self.before_wait.add(pointer.tensor.data_ptr())
        if self.early:
            slot.copy_(pointer.load(mask))
        self.group.append((slot, pointer, mask))

    def commit_group(self) -> None:
        self.groups.append(self.group)
        self.group = []

    def wait_group(self, newest: int) -> None:
        done = len(self.groups) - newest
        for slot, pointer, mask in [copy for group in self.groups[: max(done, 0)] for copy in group]:
            if not self.early:
                slot.copy_(pointer.load(mask))
        self.groups = self.groups[max(done, 0) :]

    def wait(self) -> None:
        self.waited = True


def anything(*_: Any, **__: Any) -> None:
    """In place of what has no meaning on a CPU."""


class Slots:
    """A ring in shared memory."""

    def __init__(self, dtype: torch.dtype, shape: list[int], layout: None):
        self.memory = torch.full(shape, float("nan"), dtype=dtype)

    def index(self, slot: int) -> Tensor:
        return self.memory[slot]


def run_program(
    source: Callable[..., Any], program: tuple[int, int], early: bool, arguments: tuple, named: dict
) -> set:
    """Runs one program. Returns the addresses of the tensors that it read before the wait."""
    copies = Copies(early)
    language = SimpleNamespace(
        program_id=lambda axis: program[axis],
        arange=lambda begin, end, layout: torch.arange(begin, end),
        num_warps=lambda: named["num_warps"],
        static_range=range,
        float32=torch.float32,
        exp=torch.exp,
        allocate_shared_memory=Slots,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype).as_subclass(Block),
        convert_layout=lambda x, layout: x,
        store=lambda pointer, value, mask: pointer.store(value, mask),
        static_assert=lambda holds: holds or (_ for _ in ()).throw(AssertionError("a static_assert fails")),
        NVMMASharedLayout=SimpleNamespace(get_default_for=anything),
        **dict.fromkeys(("BlockedLayout", "SliceLayout", "NVMMADistributedLayout"), anything),
    )
    names = {
        "gl": language,
        "async_copy": copies,
        "_load": copies.load,
        "_trigger": anything,
        "_wait": copies.wait,
        "_silu": lambda x: x / (1 + torch.exp(-x)),
        "fence_async_shared": anything,
        "warpgroup_mma": lambda a, b, y, is_async: y + a.float() @ b.float(),
        "warpgroup_mma_wait": lambda pending, deps: deps[0],
        "range": range,
    }
    options = {"num_warps", "launch_pdl", "enable_fp_fusion"}
    pointers = [Pointer(each) if isinstance(each, Tensor) else each for each in arguments]
    FunctionType(source.__code__, names)(*pointers, **{name: x for name, x in named.items() if name not in options})
    return copies.before_wait


class OnCPU:
    """In place of the kernel `_ring`: `OnCPU(early)[grid](arguments)`."""

    def __init__(self, early: bool):
        self.early = early
        self.source: Callable[..., Any] = ring._ring.fn

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            for program in [(i, j) for i in range(grid[0]) for j in range(grid[1])]:
                read = run_program(self.source, program, self.early, arguments, named)
                assert read == {arguments[0].data_ptr()}, "before the wait a program reads W, and nothing else"

        return launch
