"""Random inputs and error bounds for the tests of kernels/; bench/harness.py has the guards.

A typical test draws shapes and a seed by hypothesis, runs the op with every backend and with the reference (`run_all`),
computes the result in float64 on its own, and checks all of them by `assert_near`, with the same bound.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from bench import harness, verify
from bench.harness import GUARD, difference, poison
from internlm3 import kernels
from internlm3.kernels import cpu, reference
from internlm3.kernels.triton.launch import INTERPRETED
from internlm3.tests.support.strict_launches import strict_launches

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
# tests/fuzz.py may choose among them.
DTYPES = [getattr(torch, name) for name in os.environ.get("INTERNLM3_DTYPES", "bfloat16,float16,float32").split(",")]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
# Zeros, tiny, ordinary and large values. Squares of the largest fit float32, and sums of two of them fit float16.
scales = st.sampled_from([0.0, 1e-8, 1.0, 1.0, 1.0, 3e3])


def module_of(op: Any) -> ModuleType:
    """The file of a Triton op. An import by name gives the op, which has the file's name."""
    return sys.modules[op.__module__]


def generator(seed: int) -> torch.Generator:
    """The random numbers of a case. A failure reports the seed, wherever it was drawn."""
    if hypothesis.currently_in_test_context():
        hypothesis.note(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def normal(rng: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normally distributed values times scale, on the tests' device."""
    return (torch.randn(shape, generator=rng) * scale).to(DEVICE, dtype)


def embedded(x: Tensor, padding: int = 0) -> Tensor:
    """A copy of x in poisoned memory: guards on both ends, `padding` elements after each row of the last dimension."""
    *lead, width = x.shape
    rows = x.numel() // width if width else 0
    memory = poison(2 * GUARD + rows * (width + padding), x.dtype, DEVICE)
    view = memory[GUARD : memory.numel() - GUARD].view(*lead, width + padding)[..., :width]
    return view.copy_(x)


def call(op: Any, *args: Any, **options: Any) -> Any:
    """`harness.call`. In the interpreter a launch may only touch its tensors, and programs run in any order."""
    with strict_launches() if INTERPRETED else contextlib.nullcontext():
        return harness.call(op, *args, **options)


MODULES = {"triton": kernels, "cpu": cpu, "reference": reference}
# A user's file, whose functions are in the place of Triton's: tests/fuzz.py --kernel.
USERS = Path(os.environ.get("INTERNLM3_KERNEL", "")).name
NAMES = {"triton": USERS or "triton"}  # of results, in messages; any other name is itself
# The two backends of an op.
backends = pytest.mark.parametrize("backend", ["triton", "cpu"], ids=NAMES.get)


def run(backend: str, op: str, *args: Any, writes: Sequence[Tensor] = (), **options: Any) -> Any:
    """The op of a backend, or of the reference, by `call`: with poisoned outputs, and inputs that must not change.

    The arguments are on the tests' device, and so is the result. All but Triton run on a CPU.
    """
    function = getattr(MODULES[backend], op)
    if backend == "triton":
        return call(function, *args, writes=writes, **options)
    on_cpu = {id(x): x.cpu() for x in tree_leaves((args, options)) if isinstance(x, Tensor)}
    moved, keywords = tree_map_only(Tensor, lambda x: on_cpu[id(x)], (args, options))
    result = call(function, *moved, writes=[on_cpu[id(x)] for x in writes], **keywords)
    for x in writes:
        x.copy_(on_cpu[id(x)])
    if isinstance(result, tuple):
        return tuple(x.to(DEVICE) for x in result)
    return None if result is None else result.to(DEVICE)


def run_all(op: str, *args: Any, **options: Any) -> dict[str, Any]:
    """The results of both backends and of the reference, by name."""
    return {backend: run(backend, op, *args, **options) for backend in MODULES}


def assert_near(exact: Tensor, ulps: float, magnitude: Tensor | float = 0.0, **results: Tensor) -> None:
    """Every result is within ulps * eps(its dtype) * (|exact| + magnitude) of the float64 result, element by element.

    `magnitude` is the size of the terms that were added up, for results that cancel. Beyond the dtype's range, all
    values count as one step past its maximum, so that infinity is correct there and nowhere else. A user's kernel may
    round in another order than ours: it is also allowed what `bench.ops --kernel` allows.
    """
    for key, result in results.items():
        name = NAMES.get(key, key)
        assert result.shape == exact.shape, f"{name} has shape {list(result.shape)}, not {list(exact.shape)}"
        info = torch.finfo(result.dtype)
        limit = info.max * (1 + info.eps)
        bound = ulps * (info.eps * (exact.clamp(-limit, limit).abs() + magnitude) + info.smallest_normal * info.eps)
        why = f"{ulps} steps of {str(result.dtype).removeprefix('torch.')}: see ULPS in this test's file"
        if USERS and key == "triton":
            steps = verify.STEPS[result.dtype]
            bound = torch.maximum(bound, verify.allowed(exact.clamp(-limit, limit), result.dtype, steps))
            why = f"{steps:.0f} steps of the dtype, as bench.ops --kernel allows"
        wrong = difference(name, result, exact, bound, why)
        if wrong:
            raise AssertionError(wrong)


def assert_same(expected: Tensor, **results: Tensor) -> None:
    """Every result has the shape, dtype and bits of `expected`. Zeros of both signs are equal, and so are all NaNs."""
    for key, result in results.items():
        name = NAMES.get(key, key)
        described = [f"{x.dtype} {list(x.shape)}" for x in (result, expected)]
        assert described[0] == described[1], f"{name} is {described[0]}, not {described[1]}"
        wrong = difference(name, result, expected)
        if wrong:
            raise AssertionError(wrong)


def assert_rounded_alike(expected: Tensor, share: float = 1e-3, **results: Tensor) -> None:
    """Every result equals `expected` except in a `share` of its elements, where the last float32 bit decides a tie.

    A missing rounding, or an additional one, changes a tenth of the elements or more.
    """
    for key, result in results.items():
        name = NAMES.get(key, key)
        off = (result != expected).double().mean().item()
        if not off < share:
            wrong = difference(name, result, expected)
            raise AssertionError(f"{wrong}: {off:.2%} of the elements, where {share:.2%} may be rounded differently")


class PagedCache(NamedTuple):
    """One layer's cache of some sequences; kernels.reference explains it."""

    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor


def paged_cache(
    rng: torch.Generator, lengths: Sequence[int], kv_heads: int, dim: int, page_size: int, dtype: torch.dtype
) -> PagedCache:
    """Sequences of these lengths on shuffled pages of random keys and values.

    Every slot without a token is NaN: in unused pages, and in the rest of a last page. Entries of the block table after
    a sequence's pages are unused pages. k and v alternate in one buffer, so pages are not adjacent in memory.
    """
    needed = [-(-length // page_size) for length in lengths]
    columns = max(needed, default=0) + int(torch.randint(3, (), generator=rng)) or 1
    spare = int(torch.randint(1, 4, (), generator=rng))
    pages = torch.randperm(sum(needed) + spare, generator=rng, dtype=torch.int32)
    unused = pages[sum(needed) :]
    block_table = unused[torch.randint(spare, (len(lengths), columns), generator=rng)]
    kv = torch.full((len(pages), 2, kv_heads, page_size, dim), torch.nan, dtype=dtype)
    first = 0
    for b, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        block_table[b, :count] = pages[first : first + count]
        first += count
        for position in range(length):
            page = int(block_table[b, position // page_size])
            kv[page, :, :, position % page_size] = torch.randn(2, kv_heads, dim, generator=rng).to(dtype)
    kv = embedded(kv.to(DEVICE))
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return PagedCache(kv[:, 0], kv[:, 1], block_table.to(DEVICE), seq_lens)
