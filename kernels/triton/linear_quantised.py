"""1 to 64 rows times a quantised weight, fused with the ops before and after the product in a block of the model.

    y = x W^T (+ bias)      x [R, C], W [O, C] -> [R, O], float32 sums;  w = (q - zero) * scale: see QuantisedWeight
    before:  RMSNorm of x, as a launch of its own
    after:   as in linear_few_rows.py

MB of W at InternLM3-8B's shapes (C = 4096, I = 10240), and us to read them at 3.0 TB/s:
    op                        W               int4 in groups of 128      int8, float8
    rms_norm_qkv_rope_cache   4608 x 4096       10.0     3.3               18.9     6.3
    linear_add (o)            4096 x 4096        8.9     3.0               16.8     5.6
    rms_norm_swiglu           20480 x 4096      44.6    14.9               83.9    28.0
    linear_add (down)         4096 x 10240      22.3     7.4               42.0    14.0
    rms_norm_linear (head)    128512 x 4096    279.7    93.2              526.9   175.6

Tensor cores multiply 1 to 64 rows alike: a program multiplies a tile of W by up to 16 rows of x, so a row has the same
bits alone and among others. Programs of further rows read the tile from L2. A word's fields become slices of W in
registers, 16-bit floats that are exactly q - zero. This is the order of a sum, all in float32:
    - slices of W (16 to 128 columns: `Form.width`) in ascending order of their columns
    - within a slice the tensor core's steps of 16 columns in ascending order
    - with groups, a slice is summed by itself, from zero, and y = fma(slice, scale, y)
    - with minima, then y = fma(minimum, sum of the slice of x, y); sums of x are a launch before
    - with one scale for all columns, slices are summed in sequence, and the scale multiplies the sum
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantised import QuantisedWeight
from .fields import constants, field_of, scale_and_zero
from .launch import cdiv, jit, options
from .linear_fused import ALIGNED, NO_CACHE, residual_tile, row_places, store_result, weight_rows
from .rms_norm import rms_norm


class Tile(NamedTuple):
    """The tile of a program: rows of W, warps, stages of the pipeline.

    A warp has 16 rows of W: more warps would share rows, and each convert the same numbers.
    """

    rows: int
    warps: int
    stages: int


# By the rows of x of a program, padded. Two warps use the same instruction for 8 and 16 rows, which keeps the bits of a
# row; four would use another one for 16 (sm_90). Chosen by machine code: nothing spills, and a program's shared memory
# fits. None has been measured.
TILES = {8: Tile(32, 2, 6), 16: Tile(32, 2, 4)}
TILE_OF_AMD = Tile(32, 2, 2)
SUMS = 32  # slices of a row of x that a program sums
AHEAD = 16  # cache lines per row of W that a program prefetches into L2 before it waits


@triton.jit
def _block(
    y, words, b, scale_rows, minimum_rows, x_rows, row, sums_ptr, R,
    OUT: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, KIND: tl.constexpr, L: tl.constexpr,
    PTX: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """y [BO, BR] + the product of block b of W, words [BO, L], and its columns of x."""
    dtype = x_rows.dtype.element_ty
    FIELDS: tl.constexpr = 4 if KIND == "int4" else 2
    for i in tl.static_range(FIELDS):
        zero = None
        if GROUP:
            # Padding may be a group of its own, which has no scale.
            group = tl.minimum(b * FIELDS + i, (C - 1) // L) * L // GROUP
            scale, zero = scale_and_zero(scale_rows + group * OUT, ZERO)
        numbers = field_of(words, zero, i, KIND, PTX, OFFSET, ZERO, dtype)
        columns = ((b * FIELDS + i) * L + tl.arange(0, L))[None, :]
        mask = row < R
        if C % (FIELDS * L):
            mask &= columns < C
        x = tl.load(x_rows + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        if GROUP:
            part = tl.dot(numbers, x.trans(), tl.zeros_like(y), input_precision="ieee")
            y = tl.fma(part, scale, y)
            if minimum_rows is not None:
                minimum = tl.load(minimum_rows + group * OUT)
                sums = tl.load(sums_ptr + (b * FIELDS + i) * R + row.trans(), mask=row.trans() < R, other=0.0)
                y = tl.fma(minimum, sums, y)
        else:
            y = tl.dot(numbers, x.trans(), y, input_precision="ieee")
    return y


@jit(f"scale_ptr minimum_ptr sums_ptr {ALIGNED}")
def _linear_quantised(
    x_ptr, x_stride, w_ptr, scale_ptr, minimum_ptr, sums_ptr, bias_ptr, residual_ptr, residual_stride, y_ptr, R,
    inv_freq_ptr, inv_freq_stride, k_cache_ptr, k_page_stride, k_head_stride, k_token_stride,
    v_cache_ptr, v_page_stride, v_head_stride, v_token_stride,
    block_table_ptr, table_stride, seq_lens_ptr, positions_ptr, tokens, pages, slots,
    OUT: tl.constexpr, C: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    KIND: tl.constexpr, L: tl.constexpr, PTX: tl.constexpr, OFFSET: tl.constexpr,
    HALF: tl.constexpr, H: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    BO: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Pointers are None for inputs that the op does not have. L: the columns of a slice. BR: R padded."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row_tile, tile = tl.program_id(0), tl.program_id(1)  # programs of one tile of W are neighbours, and share L2
    rows = weight_rows(tile, OUT, HALF, BO)
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * WORDS + tl.arange(0, L)[None, :]
    scale_rows = scale_ptr + rows[:, None]
    minimum_rows = minimum_ptr + rows[:, None] if minimum_ptr is not None else None
    LINE: tl.constexpr = 64  # words of a cache line
    if PDL:
        line = tl.minimum(tl.arange(0, AHEAD), (WORDS - 1) // LINE)[None, :]
        lines = w_ptr + rows.to(tl.int64)[:, None] * WORDS + line * LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    if PDL:
        tl.extra.cuda.gdc_wait()

    row = row_tile * BR + tl.arange(0, BR)[None, :]
    residual = None
    places = None
    if residual_ptr is not None:
        residual = residual_tile(tile, row, residual_ptr, residual_stride, R, OUT, BO)
    if inv_freq_ptr is not None:
        places = row_places(
            tile, row, R, inv_freq_ptr, inv_freq_stride, block_table_ptr, table_stride, seq_lens_ptr, positions_ptr,
            tokens, pages, slots, S, HALF, BO,
        )  # fmt: skip
    x_row = row_tile * BR + tl.arange(0, BR)[:, None]
    x_rows = x_ptr + x_row.to(tl.int64) * x_stride
    y = tl.zeros((BO, BR), tl.float32)
    for b in tl.range(0, WORDS // L, num_stages=STAGES):
        words = tl.load(w_rows + b * L, eviction_policy="evict_first")
        y = _block(
            y, words, b, scale_rows, minimum_rows, x_rows, x_row, sums_ptr, R, OUT, C, GROUP, ZERO, KIND, L, PTX, OFFSET
        )
    if GROUP == 0:
        y *= tl.load(scale_rows)
    store_result(
        tile, row, y, bias, residual, places, R, y_ptr, k_cache_ptr, k_page_stride, k_head_stride, k_token_stride,
        v_cache_ptr, v_page_stride, v_head_stride, v_token_stride, OUT, HALF, H, K, BO,
    )  # fmt: skip


@jit("x_ptr x_stride")
def _slice_sums(
    x_ptr, x_stride, y_ptr, R, C: tl.constexpr, L: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = index[:, None] * L + tl.arange(0, L)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64) * x_stride + columns, mask=columns < C, other=0.0)
    tl.store(y_ptr + index * R + row, tl.sum(x.to(tl.float32), 1), mask=index < SLICES)


def slice_sums(x: Tensor, width: int, count: int) -> Tensor:
    """The sums of x's columns, `width` at a time; columns after the last are 0. [R, C] -> [count, R] float32."""
    rows, columns = x.shape
    y = torch.empty((count, rows), dtype=torch.float32, device=x.device)
    _slice_sums[(rows, cdiv(count, SUMS))](
        x, x.stride(0), y, rows, C=columns, L=width, SLICES=count, BLOCK=SUMS, num_warps=4, **options(x.device)
    )
    return y


def padded_rows(rows: int) -> int:
    """The rows of x, with padding, of a program. A kernel is compiled for each."""
    return 8 if rows <= 8 and not torch.version.hip else 16  # AMD's matrix instructions take 16 columns


def multiply(
    y: Tensor,
    x: Tensor,
    weight: QuantisedWeight,
    bias: Tensor | None,
    *,
    batch_invariant: bool,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    half: int = 0,
    **cache: Any,
) -> None:
    """Write the result for x's 1 to FEW_ROWS rows to y: arguments as those of linear_few_rows.multiply.

    The number of rows does not change the bits of a row, whatever batch_invariant is.
    """
    rows = x.shape[0]
    form, outputs = weight.form, weight.shape[0]
    padded = padded_rows(rows)
    tile = TILE_OF_AMD if torch.version.hip else TILES[padded]
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    sums = None if weight.minimum is None else slice_sums(x, form.width, form.words // form.width * form.fields)
    _linear_quantised[(cdiv(rows, padded), cdiv(outputs, tile.rows))](
        x, x.stride(0), weight.words, weight.scales, weight.minimum, sums, bias,
        residual, residual.stride(0) if residual is not None else None, y, rows, **(cache or NO_CACHE),
        OUT=outputs, **constants(form, x.dtype), HALF=half, BO=tile.rows, BR=padded, STAGES=tile.stages,
        AHEAD=AHEAD, num_warps=tile.warps, **options(x.device),
    )  # fmt: skip
