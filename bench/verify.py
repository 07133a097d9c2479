"""Compare what an engine computes with kernels.reference on the same inputs: only right results are timed."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from internlm3.kernels import reference

from . import harness
from .cases import Arguments

# How far a result may be off, in steps of its dtype relative to the value and to the RMS of its row: an op rounds a
# handful of times, and in float32 sums of thousands of terms come in any order.
STEPS = MappingProxyType({torch.bfloat16: 4.0, torch.float16: 4.0, torch.float32: 256.0})
# By how much more for ops that round several results in sequence, and multiply one by another: a rounded factor counts
# as often as the other factor is larger than the row's RMS. Of ten million honest results a few are off by 7 steps in
# rms_norm_swiglu, by 4 in rms_norm_qkv_rope_cache.
MORE_STEPS = MappingProxyType({"rms_norm_swiglu": 4.0, "rms_norm_qkv_rope_cache": 2.0})
# For a function in place of an op: this many times the largest difference that its own rounding makes.
ROUNDINGS = 2.0

Op = str | Callable[..., Any]  # the name of an op of the reference, or a function that computes what one means


def copies(arguments: Arguments, copy: Callable[[Tensor], Tensor]) -> Arguments:
    return {name: tree_map_only(Tensor, copy, x) for name, x in arguments.items()}


def same_strides(x: Tensor) -> Tensor:
    """A copy of x with its strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def allowed(exact: Tensor, dtype: torch.dtype, steps: float) -> Tensor:
    """The largest error of results in this dtype: so many of its steps, of the value and of the RMS of its row."""
    size = exact.abs() + (exact.square().mean(-1, keepdim=True).sqrt() if exact.dim() else 0)
    return steps * torch.finfo(dtype).eps * size


def _difference(op: Op, name: str, found: Tensor, expected: Tensor, exact: Tensor) -> str:
    """expected: the reference's result; exact: its result from float32 inputs."""
    if not expected.is_floating_point():
        return harness.difference(name, found, expected)
    exact = exact.double()
    steps = STEPS[expected.dtype] * (MORE_STEPS.get(op, 1.0) if isinstance(op, str) else 1.0)
    bound = allowed(exact, expected.dtype, steps)
    if not isinstance(op, str) and exact.numel():
        own = ((expected.double() - exact).abs() / allowed(exact, expected.dtype, 1.0)).nan_to_num(0, 0, 0).max()
        bound = torch.maximum(bound, allowed(exact, expected.dtype, ROUNDINGS * own.item()))
    return harness.difference(name, found, exact, bound, f"{steps:.0f} steps of the dtype")


def error_of(
    op: Op, arguments: Arguments, run: Callable[[Arguments], Any], strict: bool = False, ordinary: bool = False
) -> str:
    """What is wrong with run(a copy of the arguments), in one sentence; "" if it does what the op does.

    strict: for a user's kernel, which runs with guards around its memory; see `judge`.
    ordinary: with `strict`, outputs begin with random values of an ordinary size, not with NaN.
    Exceptions of `run` are passed on.
    """
    if not strict:
        given = copies(arguments, same_strides)
        return judge(op, arguments, given, run({**given}))
    given = copies(arguments, harness.between_guards)
    everything = [x for _, x in harness.tensors_in(given)]  # `judge` compares what was changed
    try:
        results = harness.call(lambda **kwargs: run(kwargs), writes=everything, ordinary=ordinary, **given)
    except harness.Fault as fault:
        return str(fault)
    return judge(op, arguments, given, results, strict=True)


def judge(op: Op, before: Arguments, given: Arguments, results: Any, strict: bool = False) -> str:
    """What is wrong with the results of a call and with what it left of its arguments; "" if nothing is.

    before: the arguments as they were before the call. given: those of the call.
    Arguments that the op writes must end as the reference leaves them, all others unchanged to the bit. A result may
    have another shape with the same elements; with `strict` it must have the op's shape, and be a plain tensor.
    The reference runs only here, after the call: while it lasts, no expected value is in memory.
    """
    meaning = getattr(reference, op) if isinstance(op, str) else op
    after = copies(before, same_strides)
    expected = _tuple(meaning(**after))
    after_exact = copies(before, lambda x: x.to(torch.float32 if x.is_floating_point() else x.dtype, copy=True))
    exact = _tuple(meaning(**after_exact))
    written = [name for name, x in before.items() if isinstance(x, Tensor) and not harness.same_bits(x, after[name])]

    for name, x in before.items():
        pairs = zip(harness.tensors_in(given[name]), harness.tensors_in(x), strict=True)
        if name not in written and not all(harness.same_bits(one, other) for (_, one), (_, other) in pairs):
            return f"the kernel changed its input {name}, which the op only reads"

    results = _tuple(results)
    if strict:
        for x in results:
            if isinstance(x, Tensor) and type(x) is not Tensor:
                return f"it returns a {type(x).__name__}, a subclass that may compute later, and must return a Tensor"
    kinds = [", ".join("a tensor" if isinstance(x, Tensor) else repr(x) for x in xs) for xs in (results, expected)]
    if kinds[0] != kinds[1]:
        return f"it returns {kinds[0]}, and the op {kinds[1]}"
    for i, (found, want, precise) in enumerate(zip(results, expected, exact, strict=True)):
        if not isinstance(want, Tensor):
            continue
        name = f"result {i + 1}" if len(expected) > 1 else "the result"
        if found.dtype != want.dtype:
            return f"{name} is {found.dtype}, must be {want.dtype}"
        if found.device != want.device:
            return f"{name} is on {found.device}, must be on {want.device}"
        if strict and found.shape != want.shape:
            return f"{name} has shape {list(found.shape)}, must have {list(want.shape)}"
        if found.numel() != want.numel():
            return f"{name} has {found.numel()} elements, must have {want.numel()}"
        error = _difference(op, name, found.reshape(want.shape), want, precise)
        if error:
            return error
    for name in written:
        error = _difference(op, name, given[name], after[name], after_exact[name])
        if error:
            return error
    return ""
