"""Rotary embedding of q and k, and the write of k and v into their pages. Su et al. 2021, half-rotation (NeoX) layout.

    q' = q * cos(a) + rotate_half(q) * sin(a),   a = position * inv_freq        [B*T, (H + 2K) * D] -> q [B*T, H, D]

cos, sin and every product are rounded to the activation dtype, as InternLM3 does. Bytes at InternLM3-8B's shapes
(H = 32, K = 2, D = 128, 16 bits): 9 KiB read and 9 KiB written per row. Operations: 6 per element, 64 angles per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, check, check_activation, jit, next_power_of_2, options

# Heads per program of one warp: with few rows many programs hide latency, with many rows heads share their angles.
FEW_ROWS = 64
HEADS_FOR_FEW_ROWS = 4
HEADS_FOR_MANY_ROWS = 16


@triton.jit
def cos_sin(angle):
    """Cosine and sine of a float32 tensor of angles up to 2^20 * pi / 2, within 2 float32 ulp.

    For large angles tl.cos uses tables in local memory. Here the nearest multiple of pi/2 is subtracted in float64,
    with pi/2 in two parts (the first has 33 bits, so its product with a quadrant of 20 bits is exact: Cody and Waite
    1980). Minimax polynomials, fitted on |r| <= pi/4, compute the rest in float32.
    """
    wide = angle.to(tl.float64)
    quadrant = tl.floor(wide * 0.6366197723675814 + 0.5)
    r = ((wide - quadrant * 1.5707963267341256) - quadrant * 6.077100506506192e-11).to(tl.float32)
    z = r * r
    cos = 1.0 + z * (-0.5 + z * (4.16666468e-02 + z * (-1.38873645e-03 + z * 2.44380909e-05)))
    sin = r + r * (z * (-1.66666549e-01 + z * (8.33217585e-03 + z * -1.95169774e-04)))
    quadrant = quadrant.to(tl.int32)
    swapped = quadrant % 2 != 0
    cos, sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where((quadrant + 1) & 2 != 0, -cos, cos), tl.where(quadrant & 2 != 0, -sin, sin)


@triton.jit
def rotate(first, second, cos, sin, dtype: tl.constexpr):
    """The rotated halves of heads: float32 in and out; cos, sin and every product are rounded to dtype."""
    cos, sin = cos.to(dtype).to(tl.float32), sin.to(dtype).to(tl.float32)
    rotated_first = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    rotated_second = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    return rotated_first, rotated_second


@jit(
    "qkv_ptr inv_freq_ptr q_ptr qkv_stride k_cache_ptr k_page_stride k_head_stride k_token_stride "
    "v_cache_ptr v_page_stride v_head_stride v_token_stride"
)
def _rope_and_cache(
    qkv_ptr, inv_freq_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr, positions_ptr, q_ptr,
    qkv_stride, inv_freq_stride, k_page_stride, k_head_stride, k_token_stride,
    v_page_stride, v_head_stride, v_token_stride, table_stride, tokens, pages, slots,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, HALF)
    dtype = q_ptr.dtype.element_ty
    half: tl.constexpr = D // 2
    inside = (column < half)[None, :]
    is_q = (head < H) & inside
    is_k = (head >= H) & (head < H + K) & inside
    is_v = (head >= H + K) & (head < H + 2 * K) & inside
    sequence, token = (row // tokens).to(tl.int64), row % tokens
    row = row.to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    position = tl.load(seq_lens_ptr + sequence) - tokens + token
    live = position >= 0
    slot = position // S
    placed = live & (slot < slots)
    page = tl.load(block_table_ptr + sequence * table_stride + slot, mask=placed, other=0).to(tl.int64)
    tl.device_assert((page >= 0) & (page < pages), "block_table has a page that is not in the cache")
    placed = placed & (page >= 0) & (page < pages)
    inv_freq = tl.load(inv_freq_ptr + sequence * inv_freq_stride + column, mask=column < half, other=0.0)
    source = qkv_ptr + row * qkv_stride + head * D + column[None, :]
    mask = (is_q | is_k | is_v) & live
    first = tl.load(source, mask=mask, other=0.0)
    second = tl.load(source + half, mask=mask, other=0.0)
    rotation = position
    if positions_ptr is not None:
        rotation = tl.load(positions_ptr + row)
    cos, sin = cos_sin(rotation.to(tl.float32) * inv_freq)
    cos, sin = cos[None, :], sin[None, :]
    rotated_first, rotated_second = rotate(first.to(tl.float32), second.to(tl.float32), cos, sin, dtype)
    rotated_first, rotated_second = rotated_first.to(dtype), rotated_second.to(dtype)

    q_target = q_ptr + (row * H + head) * D + column[None, :]
    tl.store(q_target, rotated_first, mask=is_q)
    tl.store(q_target + half, rotated_second, mask=is_q)
    place = (position % S).to(tl.int64)
    k_target = k_cache_ptr + page * k_page_stride + (head - H).to(tl.int64) * k_head_stride + place * k_token_stride
    tl.store(k_target + column[None, :], rotated_first, mask=is_k & placed)
    tl.store(k_target + half + column[None, :], rotated_second, mask=is_k & placed)
    v_target = v_cache_ptr + page * v_page_stride + (head - H - K).to(tl.int64) * v_head_stride + place * v_token_stride
    tl.store(v_target + column[None, :], first, mask=is_v & placed)
    tl.store(v_target + half + column[None, :], second, mask=is_v & placed)


def rope_and_cache(
    qkv: Tensor,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """Rotate q and k, write k and v into their pages, return q [B*T, H, D], contiguous.

    qkv [B*T, (H + 2K) * D]: the heads of q, then of k, then of v; inv_freq [B, D/2] float32; caches [P, K, S, D] of
    qkv's dtype; block_table [B, N] int32; seq_lens [B] int32, including the tokens of this launch. A token is rotated
    by its position in its sequence, or by `positions` [B*T] int32 where given. Tokens at negative positions are
    padding: their q is zero and nothing is written for them. Nothing is written to a page outside the cache.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or stride.
    """
    check_activation("qkv", qkv, -1, -1)
    rows, width = qkv.shape
    device = qkv.device
    heads = check_heads("qkv", qkv, ("columns", width), inv_freq, k_cache, v_cache, block_table, seq_lens, positions)
    (pages, kv_heads, page_size, dim), (sequences, slots) = k_cache.shape, block_table.shape
    q = torch.empty((rows, heads, dim), dtype=qkv.dtype, device=device)
    group = heads_per_program(rows)
    _rope_and_cache[(rows, cdiv(heads + 2 * kv_heads, group))](
        qkv, inv_freq, k_cache, v_cache, block_table, seq_lens, positions, q,
        qkv.stride(0), inv_freq.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0),
        rows // sequences, pages, slots,
        H=heads, K=kv_heads, D=dim, S=page_size,
        HEADS=group, HALF=next_power_of_2(dim // 2), num_warps=1, **options(device),
    )  # fmt: skip
    return q


def heads_per_program(rows: int) -> int:
    return HEADS_FOR_FEW_ROWS if rows <= FEW_ROWS else HEADS_FOR_MANY_ROWS


def check_heads(
    name: str,
    x: Tensor,
    width: tuple[str, int],
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None,
) -> int:
    """The number of query heads H, from the (H + 2K) * D `width` of `name`. Raises unless the arguments fit."""
    device = x.device
    check("k_cache", k_cache, x.dtype, device, -1, -1, -1, -1)
    _, kv_heads, _, dim = k_cache.shape
    check("v_cache", v_cache, x.dtype, device, *k_cache.shape)
    check("block_table", block_table, torch.int32, device, -1, -1)
    sequences = block_table.shape[0]
    check("seq_lens", seq_lens, torch.int32, device, sequences)
    check("inv_freq", inv_freq, torch.float32, device, sequences, dim // 2)
    if positions is not None:
        check("positions", positions, torch.int32, device, x.shape[0])
    if dim % 16:
        raise ValueError(f"k_cache has head_dim {dim}, must be a multiple of 16")
    axis, size = width
    heads = size // dim - 2 * kv_heads
    if size % dim or heads <= 0:
        raise ValueError(
            f"{name} has {size} {axis}, must have (H + 2 * {kv_heads}) * {dim} for some H > 0 of query heads"
        )
    rows = x.shape[0]
    if sequences == 0 or rows % sequences:
        raise ValueError(
            f"the launch has {rows} rows, must have a multiple of the {sequences} sequences in block_table"
        )
    return heads
