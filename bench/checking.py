"""Is an engine's result right? It is compared with kernels.reference on the same inputs before any time counts."""

from collections.abc import Callable
from typing import Any

from . import harness
import torch
from .cases import Arguments
from internlm3.kernels import reference
from torch import Tensor

# Steps of the dtype that a result may be off, of its own size and its row's: an op rounds a handful of times on the
# way, and float32 has sums of thousands, in any order.
STEPS = {torch.bfloat16: 4.0, torch.float16: 4.0, torch.float32: 256.0}


def _copies(arguments: Arguments, copy: Callable[[Tensor], Tensor]) -> Arguments:
    return {name: copy(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def _laid_out(x: Tensor) -> Tensor:
    """A copy with x's strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _difference(name: str, found: Tensor, plain: Tensor, wide: Tensor) -> str:
    """`plain` is the reference's, `wide` the same from float32 inputs."""
    if not plain.is_floating_point():
        return harness.difference(name, found, plain)
    exact = wide.double()
    steps = STEPS[plain.dtype]
    size = exact.abs() + (exact.square().mean(-1, keepdim=True).sqrt() if exact.dim() else 0)
    return harness.difference(
        name, found, exact, steps * torch.finfo(plain.dtype).eps * size, f"{steps:.0f} steps of the dtype"
    )


def error_of(op: str, arguments: Arguments, run: Callable[[Arguments], Any], own: bool = False) -> str:
    """What is wrong with run(a copy of the arguments), in a sentence; "" where it does what the op does.

    Arguments must end as the reference leaves them: those that it does not write, to the bit. A peer's result may come
    in another shape, as a view would give it; somebody's `own` kernel has the op's very shapes and dtypes, runs amid
    guards, and writes nowhere else. Whatever `run` raises comes through.
    """
    plain = _copies(arguments, _laid_out)
    expected = _tuple(getattr(reference, op)(**plain))
    wide = _copies(arguments, lambda x: x.float() if x.is_floating_point() else x.clone())
    exact = _tuple(getattr(reference, op)(**wide))
    written = [name for name, x in arguments.items() if isinstance(x, Tensor) and not harness.same_bits(x, plain[name])]

    given = _copies(arguments, harness.amid_guards if own else _laid_out)
    try:
        writes = [given[name] for name in written]
        result = harness.call(lambda **kwargs: run(kwargs), writes=writes, **given) if own else run(given)
    except harness.Fault as fault:
        return str(fault)
    results = _tuple(result)

    kinds = [", ".join("a tensor" if isinstance(x, Tensor) else repr(x) for x in xs) for xs in (results, expected)]
    if kinds[0] != kinds[1]:
        return f"it returns {kinds[0]}, and the op {kinds[1]}"
    for i, (found, want, truth) in enumerate(zip(results, expected, exact, strict=True)):
        if not isinstance(want, Tensor):
            continue
        name = f"result {i + 1}" if len(expected) > 1 else "the result"
        if found.dtype != want.dtype:
            return f"{name} is {found.dtype}, must be {want.dtype}"
        if own and found.shape != want.shape:
            return f"{name} has shape {list(found.shape)}, must have {list(want.shape)}"
        if found.numel() != want.numel():
            return f"{name} has {found.numel()} elements, must have {want.numel()}"
        wrong = _difference(name, found.reshape(want.shape), want, truth)
        if wrong:
            return wrong
    for name in written:
        wrong = _difference(name, given[name], plain[name], wide[name])
        if wrong:
            return wrong
    for name, x in arguments.items():
        if isinstance(x, Tensor) and name not in written and not harness.same_bits(given[name], x):
            return f"it changes {name}, which the op only reads"
    return ""
