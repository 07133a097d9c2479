"""A request's state, one row, becomes one slot of the batch's state, which is stored field by field.

PARTS programs copy each field; those of a short field have nothing to do.

Bytes at InternLM3-8B's shapes (V = 128512, pages for 32k tokens): 1.6 MB read and 1.6 MB written. Operations: none.
"""

import torch
import triton.language as tl
from torch import Tensor

from .launch import check, check_first, jit, options

PARTS = 32
BLOCK = 1024
NUM_WARPS = 4


@jit()
def _store_row(
    row_ptr, rows_ptr, starts_ptr, index_ptr, B, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    field = tl.program_id(0)
    start, end, index = tl.load(starts_ptr + field), tl.load(starts_ptr + field + 1), tl.load(index_ptr)
    size = end - start
    target_ptr = rows_ptr + start.to(tl.int64) * B + index.to(tl.int64) * size
    for first in range(tl.program_id(1) * BLOCK, size, PARTS * BLOCK):
        at = first + tl.arange(0, BLOCK)
        words = tl.load(row_ptr + start + at, mask=at < size, other=0)
        tl.store(target_ptr + at, words, mask=at < size)


def store_row(row: Tensor, rows: Tensor, starts: Tensor, index: Tensor) -> None:
    """`reference.store_row`: `rows` change in place.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or stride.
    """
    check_first("row", row, torch.int32, -1)
    batch = rows.numel() // row.shape[0]
    check("rows", rows, torch.int32, row.device, batch * row.shape[0])
    check("starts", starts, torch.int32, row.device, -1)
    check("index", index, torch.int32, row.device, 1)
    _store_row[(starts.shape[0] - 1, PARTS)](
        row, rows, starts, index, batch, PARTS=PARTS, BLOCK=BLOCK, num_warps=NUM_WARPS, **options(row.device)
    )
