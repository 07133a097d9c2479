"""What the kernels' tests draw, and the bounds they hold results to; bench/harness.py has `call` and the guards.

A test draws shapes and a seed by hypothesis, runs `call(kernels.op, ...)` and `reference.op(...)`, computes the same in
float64 in its own words, and holds both to `assert_near`.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from bench.harness import GUARD, difference, poison
from bench.harness import call as call
from internlm3.kernels import reference

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
# tests/fuzz.py may ask for one alone.
DTYPES = [getattr(torch, name) for name in os.environ.get("INTERNLM3_DTYPES", "bfloat16,float16,float32").split(",")]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
# Zeros, tiny, ordinary and large values; squares of the largest still fit float32, its sums of two still fit float16.
scales = st.sampled_from([0.0, 1e-8, 1.0, 1.0, 1.0, 3e3])


def generator(seed: int) -> torch.Generator:
    """A case's random numbers; a failure names the seed, wherever it was drawn."""
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


def twin(op: str, *args: Any, **options: Any) -> Tensor:
    """What the reference's op of this name gives on a CPU, where it is at home; on the tests' device."""
    given = [arg.cpu() if isinstance(arg, Tensor) else arg for arg in args]
    result: Tensor = getattr(reference, op)(*given, **options)
    return result.to(DEVICE)


def assert_near(exact: Tensor, ulps: float, magnitude: Tensor | float = 0.0, **results: Tensor) -> None:
    """Every result within ulps * eps(its dtype) * (|exact| + magnitude) of the float64 truth, element by element.

    `magnitude` is the size of what was added up on the way, for results that cancel. Beyond the dtype's range truth and
    results count as one step past its maximum, so that infinity is right there and nowhere else.
    """
    for name, result in results.items():
        assert result.shape == exact.shape, f"{name} has shape {list(result.shape)}, not {list(exact.shape)}"
        info = torch.finfo(result.dtype)
        limit = info.max * (1 + info.eps)
        bound = ulps * (info.eps * (exact.clamp(-limit, limit).abs() + magnitude) + info.smallest_normal * info.eps)
        why = f"{ulps} steps of {str(result.dtype).removeprefix('torch.')}: see ULPS in this test's file"
        wrong = difference(name, result, exact, bound, why)
        if wrong:
            raise AssertionError(wrong)


def assert_same(expected: Tensor, **results: Tensor) -> None:
    """Every result has the expected bits (zeros of both signs and NaNs of all kinds are alike), shape and dtype."""
    for name, result in results.items():
        described = [f"{x.dtype} {list(x.shape)}" for x in (result, expected)]
        assert described[0] == described[1], f"{name} is {described[0]}, not {described[1]}"
        wrong = difference(name, result, expected)
        if wrong:
            raise AssertionError(wrong)


def assert_rounded_alike(expected: Tensor, share: float = 1e-3, **results: Tensor) -> None:
    """Every result has the expected bits but for this share of its places, where a last float32 bit decides a tie.

    A rounding that is left out, or one too many, changes a tenth of them or more.
    """
    for name, result in results.items():
        off = (result != expected).double().mean().item()
        if not off < share:
            wrong = difference(name, result, expected)
            raise AssertionError(f"{wrong}: {off:.2%} of the places, where {share:.2%} may be rounded another way")


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
