"""1 to 64 rows times a weight matrix, fused with the ops before and after the product in a block of the model.

    y = x W^T (+ bias)           x [R, C], W [O, C] -> [R, O], float32 sums
    before:  RMSNorm of x
    after:   + residual  |  SwiGLU of gate and up  |  rotation of q and k, and the write of k and v to their pages

W is read once for any R, and reading it takes all the time. At InternLM3-8B's shapes (C = 4096, I = 10240, 16 bits):
    op                        W               MB read   operations     us at 3.0 TB/s
    rms_norm_qkv_rope_cache   4608 x 4096       37.7      38 MFLOP R      12.6
    linear_add (o)            4096 x 4096       33.6      34 MFLOP R      11.2
    rms_norm_swiglu           20480 x 4096     167.8     168 MFLOP R      55.9
    linear_add (down)         4096 x 10240      83.9      84 MFLOP R      28.0
    rms_norm_linear (head)    128512 x 4096   1052.8    1053 MFLOP R     350.9
The first four run once per layer, 48 times; the head once. x and y are kilobytes.

One row: a program owns two whole rows of W. It has issued all of their loads before it waits for the predecessor that
computes x, and it norms x itself. Several rows: the norm is a launch of its own. A program multiplies a tile of W by
x^T, padded to 16, 32 or 64 columns, on the tensor cores, and accumulates over the columns of W in one fixed order
(`parts`), so the bits of a row of y depend on no other row. The tile has many rows of W, since every program reads all
of x. On sm_90 and newer a program loads W's last columns into registers before it waits, and multiplies them last: then
the pipeline over the other columns starts right after the wait.

Compiled for sm_90 (Triton 3.7.1, bfloat16), without spills. One row, then up to 16, 32 and 64: registers of a thread,
programs that fit a multiprocessor (one row), KB of shared memory of a program (several rows):
    op                        registers   programs   KB of W in flight/SM    registers   shared KB
    rms_norm_qkv_rope_cache       96          5               80            229 221 168   160 168 192
    linear_add (o)                56          9              144            230 238 216   160 168 192
    rms_norm_swiglu               95          5               80            218 214 212   100  96  96
    linear_add (down)            126          4              160            232 232 215   160 168 192
    rms_norm_linear (head)        94          5               80            221 218 228   100  96  96
Two programs of 100 KB fit a multiprocessor. Before the wait a program of up to 16 rows has loaded 64 KB of W, of up to
32 rows 48 KB, of up to 64 rows 16 or 32 KB.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, is_hopper, jit, next_power_of_2, options
from .linear_fused import (
    ALIGNED,
    NO_CACHE,
    in_registers,
    prefetch,
    residual_tile,
    row_places,
    store_result,
    weight_rows,
)
from .rms_norm import rms_norm


class Tile(NamedTuple):
    """The tile of a program: rows of W, warps, stages of the pipeline, chunks of W that it loads before it waits."""

    rows: int
    warps: int
    stages: int = 1
    early: int = 0


# Rows of W up to LONG bytes, and longer ones. Those of more than LONGEST bytes do not fit the registers.
ONE_ROW, ONE_ROW_LONG = Tile(2, 4), Tile(2, 8)
LONG, LONGEST = 20480, 40960
ONE_ROW_CHUNK = 4096  # bytes of a row of W that a program of one row multiplies at once
CHUNK = 256  # the same for several rows: 128 columns of 16 bits
# Up to this many rows of x. That 17 to 64 rows are faster here than with cuBLAS is a prediction: a step of 32 rows was
# measured at 6.63 ms with cuBLAS on an H200, where reading everything takes 4.1. bench/predictions.md has more.
FEW_ROWS = 64
# For several rows, by the number of rows of x, padded. Measured, by whole steps of InternLM3-8B on an H200, are the
# tiles of one row, and 64 rows of W with 8 stages and no early chunks: bench/predictions.md. All else is chosen by
# machine code (nothing spills, and a program's shared memory fits) and by a simulation, and has not been measured.
# HOPPER is for sm_90 and newer, whose tensor cores take 64 rows of W from shared memory; HOPPER_WIDE for more rows of W
# than WIDE: two programs fit a multiprocessor. Fewer rows make so few programs that each needs all of its memory.
HOPPER = {16: Tile(64, 4, 8, 4), 32: Tile(64, 4, 7, 3), 64: Tile(64, 4, 6, 1)}
HOPPER_WIDE = {16: Tile(64, 4, 5, 4), 32: Tile(64, 4, 4, 3), 64: Tile(64, 4, 3, 2)}
ROWS = {16: Tile(32, 4, 8), 32: Tile(32, 4, 7), 64: Tile(32, 4, 5)}
ROWS_WIDE = {16: Tile(64, 4, 4), 32: Tile(64, 4, 3), 64: Tile(64, 4, 3)}
WIDE = 16384  # AMD's GPUs always use ROWS_WIDE: ROWS needs more than their 64 KB of shared memory per program
FLOAT32 = {16: Tile(32, 4), 32: Tile(32, 8), 64: Tile(32, 8)}  # for tests: no tensor core multiplies float32 exactly
AHEAD = 8  # cache lines per row of W that a program of several rows prefetches into L2 before it waits


@triton.jit
def _chunks(rows_ptr, C: tl.constexpr, BC: tl.constexpr, POLICY: tl.constexpr):
    """All columns of the rows at rows_ptr, [n, 1] or a scalar, as a tuple of chunks of BC; zeros after the last."""
    chunks = ()
    for c in tl.static_range(0, C, BC):
        columns = c + tl.arange(0, BC)
        # Only a partial chunk needs a mask.
        if c + BC > C:
            chunk = tl.load(rows_ptr + columns, mask=columns < C, other=0.0, eviction_policy=POLICY)
        else:
            chunk = tl.load(rows_ptr + columns, eviction_policy=POLICY)
        chunks += (chunk,)  # type: ignore[assignment]
    return chunks


@triton.jit
def _wide(x, PDL: tl.constexpr):
    """x in float32. The compiler unpacks a pair of bfloat16 in three instructions where two suffice.

    The norm does not use this, since there the compiler multiplies packed pairs.
    """
    if PDL and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def _normed(x, scale, norm):
    """RMSNorm with its roundings: to the dtype before the weight multiplies, and after."""
    return ((x * scale).to(norm.dtype).to(tl.float32) * norm.to(tl.float32)).to(norm.dtype)


@triton.jit
def _one_row(ws, norms, x_ptr, eps, C: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr):
    """The product [BO, 1] of W's rows, in chunks, and one x. norms: the norm's weight in chunks, or empty."""
    xs = _chunks(x_ptr, C, BC, "evict_last")
    scale = 1.0
    if len(norms) > 0:
        squares = tl.zeros((BC,), tl.float32)
        for i in tl.static_range(len(xs)):
            x = xs[i].to(tl.float32)
            squares = tl.fma(x, x, squares)
        scale = tl.rsqrt(tl.sum(squares, 0) / C + eps)
    products = tl.zeros((ws[0].shape[0], BC), tl.float32)
    for i in tl.static_range(len(xs)):
        x = xs[i]
        if len(norms) > 0:
            x = _normed(x.to(tl.float32), scale, norms[i])
        products = tl.fma(_wide(ws[i], PDL), _wide(x, PDL)[None, :], products)
    return tl.sum(products, 1)[:, None]


@triton.jit
def _last_chunks(rows_ptr, mask, C: tl.constexpr, BC: tl.constexpr, N: tl.constexpr, POLICY: tl.constexpr):
    """The last N chunks of the rows at rows_ptr [n, 1], as a tuple. C is a multiple of BC."""
    chunks = ()
    for i in tl.static_range(N):
        columns = (C - (N - i) * BC + tl.arange(0, BC))[None, :]
        chunk = tl.load(rows_ptr + columns, mask=mask, other=0.0, eviction_policy=POLICY)
        chunks += (chunk,)  # type: ignore[assignment]
    return chunks


@triton.jit
def _rows(
    early, w_rows, x_ptr, x_stride, R,
    C: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The product [BO, BR] of W's rows and up to BR rows of x, on the tensor cores, in the order of `parts`.

    early: W's last chunks, which were loaded before the wait.
    """
    row = tl.arange(0, BR)[:, None]
    x_rows = x_ptr + row.to(tl.int64) * x_stride
    xs = _last_chunks(x_rows, row < R, C, BC, len(early), "evict_last")
    zero = tl.zeros((BO, BR), tl.float32)
    y = zero
    part = zero
    for first in tl.range(0, C - len(early) * BC, BC, num_stages=STAGES):  # over all parts: the pipeline stays full
        columns = (first + tl.arange(0, BC))[None, :]
        inside = (columns < C) if C % BC else tl.full((1, BC), True, tl.int1)
        w = tl.load(w_rows + columns, mask=inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_rows + columns, mask=(row < R) & inside, other=0.0, eviction_policy="evict_last")
        if PARTS > 1:
            total = y + part  # before the branch: then it is a selection, which the pipeline of sm_100 can have
            if first % (C // PARTS) == 0:
                y = total
                part = zero
        part = tl.dot(w, x.trans(), part, input_precision="ieee")
    for i in tl.static_range(len(early)):
        x = in_registers(xs[i], PDL)
        part = tl.dot(in_registers(early[i], PDL), x.trans(), part, input_precision="ieee")
    return y + part if PARTS > 1 else part


@jit(f"norm_ptr {ALIGNED}")
def _linear_few_rows(
    x_ptr, x_stride, norm_ptr, eps, w_ptr, bias_ptr, residual_ptr, residual_stride, y_ptr, R,
    inv_freq_ptr, inv_freq_stride, k_cache_ptr, k_page_stride, k_head_stride, k_token_stride,
    v_cache_ptr, v_page_stride, v_head_stride, v_token_stride,
    block_table_ptr, table_stride, seq_lens_ptr, positions_ptr, tokens, pages, slots,
    OUT: tl.constexpr, C: tl.constexpr, W_STRIDE: tl.constexpr, HALF: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    BO: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Pointers are None for inputs that the op does not have. BR is 1 for one row, else R padded."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    dtype = y_ptr.dtype.element_ty
    tile = tl.program_id(0)
    rows = weight_rows(tile, OUT, HALF, BO)
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * W_STRIDE
    if BR == 1:
        ws = _chunks(w_rows, C, BC, "evict_first")
        norms = ()
        if norm_ptr is not None:
            norms = _chunks(norm_ptr, C, BC, "")
    else:
        early = _last_chunks(w_rows, tl.full((1, 1), True, tl.int1), C, BC, EARLY, "evict_first")
    if PDL and BR > 1:
        LINE: tl.constexpr = 1024 // dtype.primitive_bitwidth
        lines = w_rows + tl.minimum(tl.arange(0, AHEAD) * LINE, C - 1)[None, :]
        prefetch(lines)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    if PDL:
        tl.extra.cuda.gdc_wait()

    row = tl.arange(0, BR)[None, :]
    residual = None
    places = None
    if residual_ptr is not None:
        residual = residual_tile(tile, row, residual_ptr, residual_stride, R, OUT, BO)
    if inv_freq_ptr is not None:
        places = row_places(
            tile, row, R, inv_freq_ptr, inv_freq_stride, block_table_ptr, table_stride, seq_lens_ptr, positions_ptr,
            tokens, pages, slots, S, HALF, BO,
        )  # fmt: skip
    if BR == 1:
        y = _one_row(ws, norms, x_ptr, eps, C, BC, PDL)
    else:
        y = _rows(early, w_rows, x_ptr, x_stride, R, C, BO, BC, BR, PARTS, STAGES, PDL)

    store_result(
        tile, row, y, bias, residual, places, R, y_ptr, k_cache_ptr, k_page_stride, k_head_stride, k_token_stride,
        v_cache_ptr, v_page_stride, v_head_stride, v_token_stride, OUT, HALF, H, K, BO,
    )  # fmt: skip


def parts(outputs: int, columns: int) -> int:
    """The number of parts in which a product with W [outputs, columns] sums its columns, for 2 and more rows of x.

    This is the order of the sum, all in float32:
        - part p is the columns from p * columns / parts on; it is summed by itself, from zero
        - within a part, chunks of CHUNK bytes in ascending order, and within a chunk the tensor core's steps (16
          columns on NVIDIA's GPUs) in ascending order
        - y = part 0 + part 1 + ..., in this order
    then y is rounded once: y + bias to the dtype, and the residual is added.

    Several parts are for weights of so few rows that 64 of them per program leave half of an H200 idle: a kernel may
    give the parts of a row to several programs, with the same bits. The number of rows of x changes nothing.
    """
    return 4 if outputs <= 4096 and columns % (4 * 128) == 0 else 1


def padded_rows(rows: int) -> int:
    """The rows of x, with padding, in a tile of several: 16, 32 or 64. A kernel is compiled for each."""
    return max(16, next_power_of_2(rows))


def multiply(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    batch_invariant: bool,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    half: int = 0,
    **cache: Any,
) -> None:
    """Write the result for x's 1 to FEW_ROWS rows to y.

    half: the distance between paired rows of W, or 0. cache: the arguments of rotation and cache, by name.

    The caller has checked the arguments. With batch_invariant one row uses the kernel of several.
    """
    rows, columns = x.shape
    outputs = weight.shape[0]
    size = weight.element_size()
    alone = rows == 1 and not batch_invariant and columns * size <= LONGEST
    padded = padded_rows(rows)
    if alone:
        tile, padded = ONE_ROW if columns * size <= LONG else ONE_ROW_LONG, 1
    elif x.dtype == torch.float32:
        tile = FLOAT32[padded]
    elif is_hopper(x.device):
        tile = (HOPPER_WIDE if outputs > WIDE else HOPPER)[padded]
    else:
        tile = (ROWS_WIDE if outputs > WIDE or torch.version.hip else ROWS)[padded]
    options_of_amd = {"matrix_instr_nonkdim": 16} if torch.version.hip else {}  # by default it depends on the rows of x
    chunk = min((ONE_ROW_CHUNK if alone else CHUNK) // size, max(next_power_of_2(columns), 16))
    order = parts(outputs, columns)
    if norm is not None and not alone:  # one launch for all programs
        x, norm = rms_norm(x, norm, eps), None
    _linear_few_rows[(cdiv(outputs, tile.rows),)](
        x, x.stride(0), norm, eps, weight, bias, residual, residual.stride(0) if residual is not None else None,
        y, rows, **(cache or NO_CACHE),
        OUT=outputs, C=columns, W_STRIDE=weight.stride(0), HALF=half,
        BO=tile.rows, BC=chunk, BR=padded, PARTS=order, STAGES=tile.stages,
        EARLY=0 if columns % chunk else min(tile.early, columns // order // chunk), AHEAD=AHEAD,
        num_warps=tile.warps, **options_of_amd, **options(x.device),
    )  # fmt: skip
