"""The sum of a product's parts, the residual and the norm that follows, in one launch.

    x = residual + round(part 0 + part 1 + ...)      parts float32 [PARTS, R, C], residual [R, C]
    y = rms_norm(x)                                  one program per row, as in kernels/triton/rms_norm.py

A decode step of 2 to 16 rows has a launch for the norm in any case. This one reads 16 KB more per row and part, which
the launch before has just written. x and y have the bits of `linear_add` and `rms_norm` after it.
"""

import torch
import triton.language as tl
from torch import Tensor

from internlm3.kernels.triton.launch import jit, next_power_of_2, options
from internlm3.kernels.triton.rms_norm import _num_warps


@jit("parts_ptr residual_ptr norm_ptr x_ptr y_ptr")
def _sum_and_norm(
    parts_ptr, residual_ptr, norm_ptr, x_ptr, y_ptr, R, eps,
    C: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    dtype = y_ptr.dtype.element_ty
    norm = tl.load(norm_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    residual = tl.load(residual_ptr + row * C + columns, mask=inside, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    # A pipeline asks for all parts at once. Otherwise the compiler saves registers: it loads a few, adds them, and so
    # waits for memory six times.
    for part in tl.range(0, PARTS, num_stages=PARTS + 1):
        total += tl.load(parts_ptr + (part * R + row) * C + columns, mask=inside, other=0.0)
    x = (residual.to(tl.float32) + total.to(dtype).to(tl.float32)).to(dtype)
    tl.store(x_ptr + row * C + columns, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / C + eps)
    y = (x * scale).to(dtype).to(tl.float32) * norm
    tl.store(y_ptr + row * C + columns, y.to(dtype), mask=inside)


def sum_and_norm(parts: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `reference.sum_and_norm` computes. All tensors are contiguous."""
    count, rows, columns = parts.shape
    x, y = torch.empty_like(residual), torch.empty_like(residual)
    block = next_power_of_2(columns)
    _sum_and_norm[(rows,)](
        parts, residual, norm, x, y, rows, eps, C=columns, PARTS=count, BLOCK=block, num_warps=_num_warps(block),
        **options(residual.device),
    )  # fmt: skip
    return x, y
