"""Triton kernels that read everything once and write next to nothing: they measure a GPU's read bandwidth."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .timing import Call

KIB = (8, 16, 32, 64)  # of a program
WARPS = (4, 8)
POLICIES = {"": "", ", evict first": "evict_first"}


@triton.jit
def _read(x_ptr, y_ptr, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + program * BLOCK + tl.arange(0, BLOCK), eviction_policy=POLICY)
    tl.store(y_ptr + program, tl.sum(x, 0))


def read_all(x: Tensor, y: Tensor, block: int, warps: int, policy: str) -> None:
    """y[i] = the sum of the i-th block of x, whose size is a multiple of `block`. policy: of eviction from caches."""
    _read[(x.numel() // block,)](x, y, block, policy, num_warps=warps)


def variants(x: Tensor) -> dict[str, list[Call]]:
    """By name, the call of each variant that reads x, a vector in float32 of a multiple of 64 KiB."""
    y = torch.empty(x.numel() * 4 // (min(KIB) << 10), device=x.device)
    return {
        f"{kib} KB and {warps} warps per program{name}": [partial(read_all, x, y, kib << 8, warps, policy)]
        for kib in KIB
        for warps in WARPS
        for name, policy in POLICIES.items()
    }
