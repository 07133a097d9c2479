"""Triton's interpreter reads and writes any address. Here a launch may only touch the tensors that it was given."""

import contextlib
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
def only_arguments() -> Iterator[None]:
    """Raises Fault if an interpreted kernel reads or writes outside every tensor of its launch.

    A GPU might end the process there, or read what lies beside. A value that is read and not used shows nowhere else.
    """
    spans: list[range] = []
    launch, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def checked_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        given = (getattr(x, "base", x) for x in tree_leaves((args, kwargs)))  # of a descriptor, its tensor
        spans[:] = [span(x) for x in given if isinstance(x, torch.Tensor)]
        launch(self, *args, **kwargs)

    def check(verb: str, pointers: Any, mask: Any) -> None:
        used = pointers.data[mask.data]
        if used.size:
            first, end = int(used.min()), int(used.max()) + max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
            if not any(x.start <= first and end <= x.stop for x in spans):
                raise Fault(f"the kernel {verb} outside the tensors of its launch")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check("reads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(GridExecutor, "__call__", checked_launch),
        mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", checked_store),
    ):
        yield
