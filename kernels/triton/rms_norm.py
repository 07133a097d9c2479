"""RMSNorm. Zhang and Sennrich 2019.

    y = cast(x * rsqrt(mean(x^2) + eps)) * weight        [R, C], one program per row

float32 up to the cast to the activation dtype; the weight multiplies after it. Bytes at InternLM3-8B's shapes
(C = 4096, 16 bits): 8 KiB read and 8 KiB written per row, and 8 KiB of weight once. Operations: 4 C per row.
"""

import torch
import triton.language as tl
from torch import Tensor

from .launch import check, check_activation, jit, next_power_of_2, options


def _num_warps(block: int) -> int:
    """16 elements per thread: two 16-byte loads of a 16-bit dtype in flight, and few threads to reduce across."""
    return min(max(block // 512, 1), 16)


@jit("x_ptr weight_ptr y_ptr x_stride")
def _rms_norm(
    x_ptr, weight_ptr, y_ptr, x_stride, eps, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    dtype = y_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / C + eps)
    y = (x * scale).to(dtype).to(tl.float32) * weight
    tl.store(y_ptr + row * C + columns, y.to(dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """cast(x * rsqrt(mean(x^2) + eps)) * weight. x [..., C], weight [C] of x's dtype -> [..., C], contiguous.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or stride.
    """
    width = x.shape[-1]
    check_activation("x", x, *x.shape)
    check("weight", weight, x.dtype, x.device, width)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.reshape(-1, width)
    block = next_power_of_2(width)
    _rms_norm[(rows.shape[0],)](
        rows, weight, y, rows.stride(0), eps, C=width, BLOCK=block, num_warps=_num_warps(block), **options(x.device)
    )  # fmt: skip
    return y
