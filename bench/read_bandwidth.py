"""A Triton kernel that reads everything once and writes next to nothing: an accelerator's read floor."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


@triton.jit
def _read(x_ptr, y_ptr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    tl.store(y_ptr + program, tl.sum(tl.load(x_ptr + program * BLOCK + tl.arange(0, BLOCK)), 0))


def read(x: Tensor, y: Tensor) -> None:
    """y[i] = the sum of x's block i; x has a multiple of BLOCK elements."""
    _read[(x.numel() // BLOCK,)](x, y, BLOCK, num_warps=8)
