"""The mended interpreter computes with bfloat16 as PyTorch does on a CPU: in float32, rounded to the nearest.

And triton.autotune chooses a configuration there, although there is no GPU to time it.
"""

import numpy as np
import pytest
import torch
import triton
from triton import language as tl

SIZE = 4096
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")


@triton.jit
def _numbers(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, x + y)
    tl.store(out + SIZE + at, x - y)
    tl.store(out + 2 * SIZE + at, x * y)
    tl.store(out + 3 * SIZE + at, x * 1.3)
    tl.store(out + 4 * SIZE + at, -x)
    tl.store(out + 5 * SIZE + at, tl.where(x < y, x, y))
    tl.store(out + 6 * SIZE + at, tl.where(x == y, x, tl.full((SIZE,), 0.3, tl.bfloat16)))
    tl.store(out + 7 * SIZE + at, (at * 3).to(tl.bfloat16))
    tl.store(out + 8 * SIZE + at, tl.abs(x).to(tl.float16).to(tl.bfloat16))
    tl.store(out + 9 * SIZE + at, tl.math.fma(x, y, x))


def test_arithmetic_of_bfloat16():
    """Numbers of all sizes, infinities, NaN and subnormal numbers: of 65536 pairs of bits."""
    rng = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**15), 2**15, (2, SIZE), generator=rng).to(torch.int16)
    bits[1, : SIZE // 2] = bits[0, : SIZE // 2] ^ torch.randint(0, 3, (SIZE // 2,), generator=rng).to(torch.int16)
    x, y = bits.view(torch.bfloat16)
    out = torch.empty(10, SIZE, dtype=torch.bfloat16)
    with np.errstate(all="ignore"):
        _numbers[(1,)](x, y, out, SIZE)
    same = torch.where(x == y, x, torch.tensor(0.3).bfloat16())
    fma = (x.double() * y.double() + x.double()).float().bfloat16()
    halves = x.abs().half().bfloat16()
    wanted = [x + y, x - y, x * y, x * torch.tensor(1.3).bfloat16(), 0 - x, torch.where(x < y, x, y), same,
              (3 * torch.arange(SIZE)).bfloat16(), halves, fma]  # fmt: skip
    for found, expected in zip(out, wanted, strict=True):
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@triton.jit
def _sums(a, out, WIDTH: tl.constexpr):
    x = tl.load(a + tl.arange(0, 4)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    tl.store(out + tl.arange(0, 4), tl.sum(x, 1))
    tl.store(out + 4, tl.sum(x))


def test_sums_of_bfloat16_are_rounded_at_each_step():
    x = torch.rand(4, 256, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(2))
    out = torch.empty(5, dtype=torch.bfloat16)
    _sums[(1,)](x, out, 256)

    def tree(numbers):
        while numbers.shape[-1] > 1:
            one, other = numbers.chunk(2, -1)
            numbers = one + other
        return numbers.squeeze(-1)

    expected = torch.cat([tree(x), tree(x.flatten())[None]])
    once = torch.cat([x.float().sum(1), x.float().sum()[None]]).bfloat16()
    assert torch.equal(out, expected) and not torch.equal(out, once)


@triton.autotune([triton.Config({"BLOCK": block}) for block in (8, 16, 32)], key=["n"], reset_to_zero=["out"])
@triton.jit
def _added(x, out, chosen, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(out + at, mask=at < n) + tl.load(x + at, mask=at < n), mask=at < n)
    tl.store(chosen, BLOCK)


def test_autotune_tests_all_configurations_over_many_keys():
    """With the hooks by which it runs a kernel several times that adds to its output."""
    chosen = {}
    for n in (*range(1, 30), 5, 17, 29):
        x, out, block = torch.randn(n), torch.zeros(n), torch.zeros(1, dtype=torch.int32)
        _added[lambda given, n=n: (triton.cdiv(n, given["BLOCK"]),)](x, out, block, n)
        assert torch.equal(out, x)
        assert chosen.setdefault(n, block.item()) == block.item()
    assert {*chosen.values()} == {8, 16, 32}
