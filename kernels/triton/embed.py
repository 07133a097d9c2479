"""Rows of the embedding table.

    y[r] = table[token_ids[r]]        token_ids [R], table [V, C] -> [R, C]

Bytes at InternLM3-8B's shapes (C = 4096, 16 bits): 8 KiB read and 8 KiB written per row. Operations: none.
"""

import torch
import triton.language as tl
from torch import Tensor

from .launch import cdiv, check, check_activation, jit, options

# Columns per program: 8 per thread, one 16-byte load in a 16-bit dtype.
BLOCK = 1024
NUM_WARPS = 4


@jit("table_ptr y_ptr table_stride")
def _embed(token_ids_ptr, table_ptr, y_ptr, V, table_stride, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        # A step begins here, and attention reads lengths and cached tokens before it waits. Since this launch waits for
        # the last step's `_advance` before it lets its successor start, nothing of this step starts before that.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.load(token_ids_ptr + row)
    known = (token >= 0) & (token < V)
    tl.device_assert(known, "token_ids has a token that is not in the table")
    y = tl.load(table_ptr + token * table_stride + columns, mask=(columns < C) & known, other=0.0)
    tl.store(y_ptr + row * C + columns, y, mask=columns < C)


def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """table[token_ids]. token_ids [R] int64, table [V, C] -> [R, C]; an id outside the table gives zeros.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or stride.
    """
    check_activation("table", table, -1, -1)
    vocab, width = table.shape
    check("token_ids", token_ids, torch.int64, table.device, -1)
    rows = token_ids.shape[0]
    y = torch.empty((rows, width), dtype=table.dtype, device=table.device)
    _embed[(rows, cdiv(width, BLOCK))](
        token_ids, table, y, vocab, table.stride(0), C=width, BLOCK=BLOCK, num_warps=NUM_WARPS, **options(table.device)
    )
    return y
