"""Launches in Triton's interpreter that show what a GPU would: reads outside of tensors, and programs in any order."""

import contextlib
import random
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from bench.harness import Fault


def span(x: torch.Tensor) -> range:
    """The addresses from the first element of x to its last, whatever its strides leave out."""
    if not x.numel():
        return range(0)
    elements = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return range(x.data_ptr(), x.data_ptr() + elements * x.element_size())


@contextlib.contextmanager
def strict_launches() -> Iterator[None]:
    """Raises Fault if an interpreted kernel reads or writes outside every tensor of its launch.

    A GPU might end the process there, or read what lies beside. A value that is read and not used shows nowhere else.

    The programs of a launch run in a random order, which depends on the values of its first tensor. The interpreter's
    own order would hide that a program overwrites what another should have written.
    """
    spans: list[range] = []
    order: list[int] = []
    launch, enter = GridExecutor.__call__, InterpreterBuilder.set_grid_idx
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    update = InterpreterBuilder.create_atomic_rmw

    def strict_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        given = (getattr(x, "base", x) for x in tree_leaves((args, kwargs)))  # of a descriptor, its tensor
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        spans[:] = map(span, tensors)
        order.clear()
        first = tensors[0].detach().cpu().flatten() if tensors else torch.empty(0)
        values = first.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        random_order = random.Random(zlib.crc32(values.numpy().tobytes()))

        def in_order(builder: Any, x: int, y: int, z: int) -> None:
            columns, layers = builder.grid_dim[1:]
            if not order:
                order.extend(range(builder.grid_dim[0] * columns * layers))
                random_order.shuffle(order)
            place = order[(x * columns + y) * layers + z]
            enter(builder, place // (columns * layers), place // layers % columns, place % layers)

        with mock.patch.object(InterpreterBuilder, "set_grid_idx", in_order):
            launch(self, *args, **kwargs)

    def check(verb: str, pointers: Any, mask: Any) -> None:
        used = pointers.data[mask.data]
        if used.size:
            first, end = int(used.min()), int(used.max()) + max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
            if not any(x.start <= first and end <= x.stop for x in spans):
                raise Fault(f"the kernel {verb} outside the tensors of its launch")

    def strict_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check("reads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def strict_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def strict_update(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("updates", pointers, mask)
        return update(self, operation, pointers, value, mask, *rest)

    with (
        mock.patch.object(GridExecutor, "__call__", strict_launch),
        mock.patch.object(InterpreterBuilder, "create_masked_load", strict_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", strict_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", strict_update),
    ):
        yield
