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
registers, 16-bit floats that are exactly q - zero. A warp converts numbers at a fraction of the rate at which memory
delivers them, and W's rows alone are enough for two warps of a multiprocessor. So the warps of a program share the
columns, block by block of words (the slices of all fields: `Form`). This is the order of a sum, all in float32:
    - part p of PARTS has blocks p, p + PARTS, ... in ascending order; y = ((part 0 + part 1) + part 2) + part 3
    - slices of a block (16 to 128 columns: `Form.width`) in ascending order of their columns
    - within a slice the tensor core's steps of 16 columns in ascending order
    - with groups, a slice is summed by itself, from zero, and part = fma(slice, scale, part)
    - with minima, then part = fma(minimum, sum of the slice of x, part); sums of x are a launch before
    - with one scale for all columns, slices are summed in sequence, and the scale multiplies y
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantised import Form, QuantisedWeight
from .fields import constants, field_of, scale_and_zero
from .launch import cdiv, is_hopper, jit, options
from .linear_fused import ALIGNED, NO_CACHE, prefetch, residual_tile, row_places, store_result, weight_rows
from .rms_norm import rms_norm


class Tile(NamedTuple):
    """The tile of a program: rows of W, stages of the pipeline."""

    rows: int
    stages: int


PARTS = 4  # of a row's columns; each has a warp, which converts the numbers of no other
NARROW = 4096  # rows of W, up to which at most one or two programs run on a multiprocessor, whatever their stages
WIDE = 16384  # rows of W, above which all multiprocessors have several programs
WIDEST = 65536  # and above which there are so many that a last wave takes little of the time
FLOAT32 = Tile(16, 1)  # for tests: no tensor core multiplies float32 exactly
TILE_OF_AMD = Tile(16, 1)
SUMS = 32  # slices of a row of x that a program sums
AHEAD = 16  # cache lines per row of W that a program prefetches into L2 before it waits


@triton.jit
def _block(
    y, words, b, scale_rows, minimum_rows, x_rows, sums_ptr, row, R,
    OUT: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, KIND: tl.constexpr, L: tl.constexpr,
    PTX: tl.constexpr, OFFSET: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """y [PARTS, BO, BR] + the products of W's blocks b [PARTS, 1, 1], words [PARTS, BO, L], and their columns of x."""
    dtype = x_rows.dtype.element_ty
    FIELDS: tl.constexpr = 4 if KIND == "int4" else 2
    for i in tl.static_range(FIELDS):
        slice_ = b * FIELDS + i
        zero = None
        if GROUP:
            # Padding may be a group of its own, which has no scale.
            group = tl.minimum(slice_, (C - 1) // L) * L // GROUP
            scale, zero = scale_and_zero(scale_rows + group * OUT, ZERO)
        numbers = field_of(words, zero, i, KIND, PTX, OFFSET, ZERO, dtype)
        columns = slice_ * L + tl.arange(0, L)[None, None, :]
        mask = row < R
        if C % (PARTS * FIELDS * L):
            mask &= columns < C
        x = tl.load(x_rows + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        if GROUP:
            summed = tl.dot(numbers, x.permute(0, 2, 1), tl.zeros_like(y), input_precision="ieee")
            y = tl.fma(summed, scale, y)
            if minimum_rows is not None:
                of_rows = row.permute(0, 2, 1)
                sums = tl.load(sums_ptr + slice_ * R + of_rows, mask=of_rows < R, other=0.0)
                y = tl.fma(tl.load(minimum_rows + group * OUT), sums, y)
        else:
            y = tl.dot(numbers, x.permute(0, 2, 1), y, input_precision="ieee")
    return y


@triton.jit
def _sum_of_parts(y):
    """[4, BO, BR] -> [BO, BR], in ascending order."""
    even, odd = y.permute(1, 2, 0).reshape(y.shape[1], y.shape[2], 2, 2).split()
    part_0, part_2 = even.split()
    part_1, part_3 = odd.split()
    return ((part_0 + part_1) + part_2) + part_3


@jit(f"scale_ptr minimum_ptr sums_ptr {ALIGNED}")
def _linear_quantised(
    x_ptr, x_stride, w_ptr, scale_ptr, minimum_ptr, sums_ptr, bias_ptr, residual_ptr, residual_stride, y_ptr, R,
    inv_freq_ptr, inv_freq_stride, k_cache_ptr, k_page_stride, k_head_stride, k_token_stride,
    v_cache_ptr, v_page_stride, v_head_stride, v_token_stride,
    block_table_ptr, table_stride, seq_lens_ptr, positions_ptr, tokens, pages, slots,
    OUT: tl.constexpr, C: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    KIND: tl.constexpr, L: tl.constexpr, PTX: tl.constexpr, OFFSET: tl.constexpr,
    HALF: tl.constexpr, H: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    BO: tl.constexpr, BR: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Pointers are None for inputs that the op does not have. L: the columns of a slice. BR: R padded."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row_tile, tile = tl.program_id(0), tl.program_id(1)  # programs of one tile of W are neighbours, and share L2
    rows = weight_rows(tile, OUT, HALF, BO)
    w_rows = w_ptr + rows.to(tl.int64)[None, :, None] * WORDS + tl.arange(0, L)[None, None, :]
    scale_rows = scale_ptr + rows[None, :, None]
    minimum_rows = minimum_ptr + rows[None, :, None] if minimum_ptr is not None else None
    if PDL:
        LINE: tl.constexpr = 64  # words of a cache line
        line = tl.minimum(tl.arange(0, AHEAD), (WORDS - 1) // LINE)[None, :]
        lines = w_ptr + rows.to(tl.int64)[:, None] * WORDS + line * LINE
        prefetch(lines)
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
    PLACES_LATE: tl.constexpr = BR > 8  # the loop needs all registers
    if inv_freq_ptr is not None and not PLACES_LATE:
        places = row_places(
            tile, row, R, inv_freq_ptr, inv_freq_stride, block_table_ptr, table_stride, seq_lens_ptr, positions_ptr,
            tokens, pages, slots, S, HALF, BO,
        )  # fmt: skip
    x_row = row_tile * BR + tl.arange(0, BR)[None, :, None]
    x_rows = x_ptr + x_row.to(tl.int64) * x_stride
    parts = tl.zeros((PARTS, BO, BR), tl.float32)
    for first in tl.range(0, WORDS // L, PARTS, num_stages=STAGES):
        b = first + tl.arange(0, PARTS)[:, None, None]
        if WORDS // L % PARTS:
            words = tl.load(w_rows + b * L, mask=b < WORDS // L, other=0, eviction_policy="evict_first")
        else:
            words = tl.load(w_rows + b * L, eviction_policy="evict_first")
        parts = _block(
            parts, words, b, scale_rows, minimum_rows, x_rows, sums_ptr, x_row, R,
            OUT, C, GROUP, ZERO, KIND, L, PTX, OFFSET, PARTS,
        )  # fmt: skip
    if inv_freq_ptr is not None and PLACES_LATE:
        places = row_places(
            tile, row, R, inv_freq_ptr, inv_freq_stride, block_table_ptr, table_stride, seq_lens_ptr, positions_ptr,
            tokens, pages, slots, S, HALF, BO,
        )  # fmt: skip
    y = _sum_of_parts(parts)
    if GROUP == 0:
        y *= tl.load(scale_ptr + rows[:, None])
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


def tile_of(form: Form, outputs: int, padded: int, hopper: bool) -> Tile:
    """The tile for W [outputs, ...] and `padded` rows of x. hopper: sm_90 and newer have more shared memory.

    The product of all parts at once is HMMA on all of NVIDIA's GPUs, for any tile, which keeps the bits of a row. Tiles
    are chosen by machine code (nothing spills, and a program's shared memory fits) and by a simulation
    (bench/predictions.md). None has been measured.
    """
    # Every program reads all of x: with many rows of x, or a head, programs must be few.
    few = padded == 16 or outputs > (WIDE if form.kind == "int4" else WIDEST)
    iterations = form.words // form.width // PARTS
    return Tile(32 if few else 16, 3 if hopper and iterations >= 4 and outputs <= NARROW else 2)


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
    tile = tile_of(form, outputs, padded, is_hopper(x.device))
    if torch.version.hip or x.dtype == torch.float32:
        tile = TILE_OF_AMD if torch.version.hip else FLOAT32
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    sums = None
    if weight.minimum is not None:
        blocks = cdiv(form.words // form.width, PARTS) * PARTS
        sums = slice_sums(x, form.width, blocks * form.fields)
    _linear_quantised[(cdiv(rows, padded), cdiv(outputs, tile.rows))](
        x, x.stride(0), weight.words, weight.scales, weight.minimum, sums, bias,
        residual, residual.stride(0) if residual is not None else None, y, rows, **(cache or NO_CACHE),
        OUT=outputs, **constants(form, x.dtype), HALF=half, BO=tile.rows, BR=padded, PARTS=PARTS,
        STAGES=tile.stages, AHEAD=AHEAD, num_warps=PARTS, **options(x.device),
    )  # fmt: skip
