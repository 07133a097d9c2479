"""Run a kernel so that its faults show: poisoned outputs, guards around memory, differences with their place.

The tests of kernels/ and the check of a user's kernel (python -m bench.ops --kernel) use the same `call`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves_with_path


class Fault(AssertionError):
    """A kernel wrote where it must not."""


# Elements on either side of a poisoned tensor: wider than a block, so that no overrun jumps it. Keeps the alignment.
GUARD = 4096


def poison(numel: int, dtype: torch.dtype, device: Any = None) -> Tensor:
    """Memory of one byte's value: NaN in every floating-point dtype, in every integer a number far from 0."""
    return torch.full((numel * dtype.itemsize,), _byte(dtype), dtype=torch.uint8, device=device).view(dtype)


def _byte(dtype: torch.dtype) -> int:
    return 0xFF if dtype.is_floating_point else 0xA5


def _extent(x: Tensor) -> int:
    """How many elements of memory x spans."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0


def between_guards(x: Tensor) -> Tensor:
    """A copy of x with its strides, in poisoned memory with guards at both ends."""
    memory = poison(2 * GUARD + _extent(x), x.dtype, x.device)
    return memory.as_strided(x.shape, x.stride(), GUARD).copy_(x)


def guarded(x: Tensor) -> bool:
    """Whether x's memory begins and ends with intact guards."""
    memory = torch.tensor([], dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return all(bool((guard.view(torch.uint8) == _byte(x.dtype)).all()) for guard in (memory[:GUARD], memory[-GUARD:]))


def scramble(x: Tensor) -> None:
    """Overwrites x with random values of an ordinary size, which no kernel can tell from results."""
    with torch.inference_mode():  # where results of inference mode can be changed too
        if x.is_floating_point():
            x.normal_()
        else:
            x.random_(0, 2)


def _traced() -> bool:
    """Whether torch.compile or another tracer runs a function on tensors without values."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


@contextlib.contextmanager
def poisoned_outputs(ordinary: bool = False) -> Iterator[None]:
    """Makes torch.empty and torch.empty_like return poison between guards. Raises Fault if a guard was overwritten.

    What torch.compile makes of a function allocates by itself, without poison.
    ordinary: between the guards are random values of an ordinary size instead.
    """
    memories: list[Tensor] = []
    allocate = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poisoned(name: str, where: Any, *args: Any, **options: Any) -> Tensor:
        """As the function of this name, which gives shape, dtype and strides."""
        form = allocate[name](*args, **{**options, "device": "meta", "pin_memory": False})
        extent = _extent(form)
        memory = poison(extent + 2 * GUARD, form.dtype, where)
        memories.append(memory)
        if ordinary:
            scramble(memory[GUARD : GUARD + extent])
        return memory.as_strided(form.shape, form.stride(), GUARD)

    def empty(*size: Any, **options: Any) -> Tensor:
        if options.get("out") is not None or _traced():
            return allocate["empty"](*size, **options)
        return poisoned("empty", options.get("device") or torch.get_default_device(), *size, **options)

    def empty_like(input: Tensor, **options: Any) -> Tensor:
        if _traced():
            return allocate["empty_like"](input, **options)
        return poisoned("empty_like", options.get("device") or input.device, input, **options)

    with mock.patch.object(torch, "empty", empty), mock.patch.object(torch, "empty_like", empty_like):
        yield
    if not all(guarded(memory) for memory in memories):
        raise Fault("the kernel wrote outside its output")


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        *(x.contiguous().view(torch.uint8 if x.numel() else x.dtype) for x in (one, other))
    )


def tensors_in(x: Any) -> list[tuple[Any, Tensor]]:
    """The tensors of an argument, which may be a tuple such as a quantised weight, and their places in it."""
    return [(path, leaf) for path, leaf in tree_leaves_with_path(x) if isinstance(leaf, Tensor)]


def call(
    op: Callable[..., Any], *args: Any, writes: Sequence[Tensor] = (), ordinary: bool = False, **kwargs: Any
) -> Any:
    """Returns op(*args, **kwargs), run with poisoned outputs (see `poisoned_outputs`).

    Raises Fault if the op changed an argument that is not in `writes`, or wrote into the guards around an output or an
    argument that has guards.
    """
    given = {f"argument {i + 1}": x for i, x in enumerate(args)} | kwargs
    tensors = {name + keystr(path): x for name, arg in given.items() for path, x in tensors_in(arg)}
    before = {name: x.clone() for name, x in tensors.items() if not any(x is written for written in writes)}
    within = {name: x for name, x in tensors.items() if x.numel() and guarded(x)}
    # Triton's interpreter runs on numpy, which warns of overflows that a GPU ignores.
    with poisoned_outputs(ordinary), np.errstate(all="ignore"):
        result = op(*args, **kwargs)
    for name, copy in before.items():
        if not same_bits(tensors[name], copy):
            raise Fault(f"the kernel changed its input {name}")
    for name, x in within.items():
        if not guarded(x):
            raise Fault(f"the kernel wrote outside its {name}")
    return result


def difference(name: str, result: Tensor, expected: Tensor, bound: Tensor | None = None, reason: str = "") -> str:
    """A sentence about the elements at which `result` differs from `expected`; "" if there are none.

    bound: the largest difference allowed, element by element; without it every bit counts. `reason` explains it.
    The sentence has the number of wrong elements and the worst of them (without a bound the first). With a bound,
    values beyond the dtype's range count as one step past its maximum, so that infinity is right only there.
    """
    if bound is None:
        bad = result != expected
        if result.is_floating_point():
            bad &= ~(result.isnan() & expected.isnan())
    else:
        info = torch.finfo(result.dtype)
        limit = info.max * (1 + info.eps)
        error = (result.double().clamp(-limit, limit) - expected.double().clamp(-limit, limit)).abs()
        bad = ~(error <= bound)
    if not bad.any():
        return ""
    if bound is None:
        worst = bad.to(torch.uint8).argmax()
        allowed = "where every bit counts"
    else:
        worst = torch.where(bad, (error / bound).nan_to_num(torch.inf), 0.0).argmax()
        allowed = f"off by {error.flatten()[worst].item():.3g} where {bound.flatten()[worst].item():.3g} is allowed"
    place = [int(i) for i in torch.unravel_index(worst, result.shape)]
    found, wanted = (x.flatten()[worst].item() for x in (result, expected))
    return (
        f"{name} ({str(result.dtype).removeprefix('torch.')} {list(result.shape)}) is wrong at {int(bad.sum())} of "
        f"{bad.numel()} places, {'first' if bound is None else 'worst'} at {place}: {found} instead of {wanted}, "
        f"{allowed}" + f" ({reason})" * bool(reason)
    )
