"""The harness of the kernels' tests: fresh inputs amid garbage, poisoned outputs between guard bands, error bounds.

A test draws shapes and a seed by hypothesis, runs `call(kernels.op, ...)` and `reference.op(...)`, computes the same in
float64 in its own words, and holds both to `assert_near`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
GUARD = 4096  # elements on either side of a poisoned tensor: more than a block overruns; keeps 16-byte alignment

# tests/fuzz.py may ask for one alone.
DTYPES = [getattr(torch, name) for name in os.environ.get("INTERNLM3_DTYPES", "bfloat16,float16,float32").split(",")]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
# Zeros, tiny, ordinary and large values; squares of the largest still fit float32, its sums of two still fit float16.
scales = st.sampled_from([0.0, 1e-8, 1.0, 1.0, 1.0, 3e3])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(rng: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normally distributed values times scale, on the tests' device."""
    return (torch.randn(shape, generator=rng) * scale).to(DEVICE, dtype)


def poison(numel: int, dtype: torch.dtype) -> Tensor:
    """Memory of 0xFF bytes: a NaN in every floating-point dtype, -1 in every integer."""
    return torch.full((numel * dtype.itemsize,), 0xFF, dtype=torch.uint8, device=DEVICE).view(dtype)


def embedded(x: Tensor, padding: int = 0) -> Tensor:
    """A copy of x in poisoned memory: guards on both ends, `padding` elements after each row of the last dimension."""
    *lead, width = x.shape
    rows = x.numel() // width if width else 0
    memory = poison(2 * GUARD + rows * (width + padding), x.dtype)
    view = memory[GUARD : memory.numel() - GUARD].view(*lead, width + padding)[..., :width]
    return view.copy_(x)


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Inside, torch.empty and torch.empty_like return poison between guard bands, which must be whole at the end."""
    memories: list[Tensor] = []

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        memory = poison(shape.numel() + 2 * GUARD, dtype or torch.get_default_dtype())
        memories.append(memory)
        return memory[GUARD : memory.numel() - GUARD].view(shape)

    def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return empty(x.shape, dtype=dtype or x.dtype)

    with mock.patch.object(torch, "empty", empty), mock.patch.object(torch, "empty_like", empty_like):
        yield
    assert all(guarded(memory) for memory in memories), "the kernel wrote outside its output"


def guarded(x: Tensor) -> bool:
    """Whether x's memory begins and ends with whole guards."""
    memory = torch.tensor([], dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return all(bool((guard.view(torch.uint8) == 0xFF).all()) for guard in (memory[:GUARD], memory[-GUARD:]))


def call(op: Callable[..., Any], *args: Any, writes: Sequence[Tensor] = ()) -> Any:
    """op(*args) with poisoned outputs; fails where it changed an argument that is not among `writes`.

    Nor may it write beside one of these, where they were made by `embedded`.
    """
    kept = [x for x in args if isinstance(x, Tensor) and not any(x is written for written in writes)]
    before = [x.clone() for x in kept]
    within = [x for x in writes if guarded(x)]
    # The interpreter is numpy, which warns where a GPU quietly overflows.
    with poisoned_outputs(), np.errstate(all="ignore"):
        result = op(*args)
    for x, copy in zip(kept, before, strict=True):
        assert torch.equal(x.view(torch.uint8), copy.view(torch.uint8)), "the kernel changed an input"
    assert all(guarded(x) for x in within), "the kernel wrote outside its argument"
    return result


def assert_near(exact: Tensor, ulps: float, magnitude: Tensor | float = 0.0, **results: Tensor) -> None:
    """Every result within ulps * eps(its dtype) * (|exact| + magnitude) of the float64 truth, element by element.

    `magnitude` is the size of what was added up on the way, for results that cancel. Beyond the dtype's range truth and
    results count as one step past its maximum, so that infinity is right there and nowhere else.
    """
    for name, result in results.items():
        assert result.shape == exact.shape, f"{name} has shape {list(result.shape)}, not {list(exact.shape)}"
        info = torch.finfo(result.dtype)
        limit = info.max * (1 + info.eps)
        truth = exact.clamp(-limit, limit)
        bound = ulps * (info.eps * (truth.abs() + magnitude) + info.smallest_normal * info.eps)
        error = (result.double().clamp(-limit, limit) - truth).abs()
        good = error <= bound
        if not good.all():
            worst = torch.where(good, 0.0, (error / bound).nan_to_num(torch.inf)).argmax()
            at = [int(i) for i in torch.unravel_index(worst, exact.shape)]
            raise AssertionError(
                f"{name} ({result.dtype}) is wrong at {int((~good).sum())} of {good.numel()} places, worst at {at}: "
                f"{result.flatten()[worst].item()} instead of {exact.flatten()[worst].item()}, "
                f"off by {error.flatten()[worst].item():.3g} where {bound.flatten()[worst].item():.3g} is allowed"
            )


class PagedCache(NamedTuple):
    """One layer's cache of some sequences; see kernels.reference for the meaning."""

    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor


def paged_cache(
    rng: torch.Generator, lengths: Sequence[int], kv_heads: int, dim: int, page_size: int, dtype: torch.dtype
) -> PagedCache:
    """Sequences of these lengths on shuffled pages of random keys and values.

    Everything that no sequence holds is NaN: pages in between, the tail of a last page. Entries of the table behind a
    sequence's pages name pages of nobody. k and v alternate in one buffer, so pages are not adjacent in memory.
    """
    needed = [-(-length // page_size) for length in lengths]
    columns = max(needed, default=0) + int(torch.randint(1, 4, (), generator=rng))
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
