"""What the kernels of a linear layer do besides the product: their tile's rows of W, and the op after the product.

    after:   + residual  |  SwiGLU of gate and up  |  rotation of q and k, and the write of k and v to their pages

SwiGLU combines W's row i with row i + I, and a rotation combines row d of a head with row d + D/2. Both pairs are HALF
rows apart in a group of 2 HALF rows. One program computes both rows of a pair, so that they are in its registers:

    row of a program's tile   0        1         2          3        ...
    row of W                  p    p + HALF    p + 1  p + 1 + HALF   ...      HALF = I or D/2; 0 without pairs
"""

import triton
import triton.language as tl

from .rope_and_cache import cos_sin, rotate
from .swiglu import silu

# The pointers and strides of both kernels that 16-byte loads and stores use.
ALIGNED = (
    "x_ptr x_stride w_ptr bias_ptr residual_ptr residual_stride y_ptr inv_freq_ptr k_cache_ptr "
    "k_page_stride k_head_stride k_token_stride v_cache_ptr v_page_stride v_head_stride v_token_stride"
)
# The arguments of an op without rotation and cache.
NO_CACHE = dict.fromkeys(
    [
        *("inv_freq_ptr", "inv_freq_stride", "k_cache_ptr", "k_page_stride", "k_head_stride", "k_token_stride"),
        *("v_cache_ptr", "v_page_stride", "v_head_stride", "v_token_stride", "block_table_ptr", "table_stride"),
        *("seq_lens_ptr", "positions_ptr", "tokens", "pages", "slots", "H", "K", "S"),
    ]
)


@triton.jit
def weight_rows(tile, OUT: tl.constexpr, HALF: tl.constexpr, BO: tl.constexpr):
    """The rows of W in a tile. Rows past the end repeat the last one; their results are not stored."""
    i = tile * BO + tl.arange(0, BO)
    if HALF == 0:
        return tl.minimum(i, OUT - 1)
    pair = tl.minimum(i // 2, OUT // 2 - 1)
    return pair // HALF * (2 * HALF) + pair % HALF + i % 2 * HALF


@triton.jit
def in_registers(x, PDL: tl.constexpr):
    """x of 16 bits, which stays in registers until here.

    The compiler would write it to shared memory as soon as it is loaded: each load would wait for the one before.
    """
    if PDL:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False, pack=2)
    else:
        return x


@triton.jit
def prefetch(pointers):
    """Requests the cache lines at these pointers into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def residual_tile(tile, row, residual_ptr, residual_stride, R, OUT: tl.constexpr, BO: tl.constexpr):
    """The residual [BO, BR] of a tile and the rows of x in `row` [1, BR]."""
    output = (tile * BO + tl.arange(0, BO))[:, None]
    residual_rows = residual_ptr + row.to(tl.int64) * residual_stride
    return tl.load(residual_rows + output, mask=(row < R) & (output < OUT), other=0.0)


@triton.jit
def row_places(
    tile, row, R, inv_freq_ptr, inv_freq_stride, block_table_ptr, table_stride, seq_lens_ptr, positions_ptr, tokens,
    pages, slots, S: tl.constexpr, HALF: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Cosines and sines [BO / 2, BR] of the rows' tokens. [1, BR] each: not padding, has a page, the page, the slot."""
    sequence = (row // tokens).to(tl.int64)
    position = tl.load(seq_lens_ptr + sequence, mask=row < R, other=0) - tokens + row % tokens
    live = (position >= 0) & (row < R)
    column = ((tile * (BO // 2) + tl.arange(0, BO // 2)) % HALF)[:, None]
    inv_freq = tl.load(inv_freq_ptr + sequence * inv_freq_stride + column, mask=live, other=0.0)
    rotation = position
    if positions_ptr is not None:
        rotation = tl.load(positions_ptr + row, mask=live, other=0)
    cos, sin = cos_sin(rotation.to(tl.float32) * inv_freq)
    paged = live & (position // S < slots)
    page = tl.load(block_table_ptr + sequence * table_stride + position // S, mask=paged, other=0).to(tl.int64)
    tl.device_assert((page >= 0) & (page < pages), "block_table has a page that is not in the cache")
    return cos, sin, live, paged & (page >= 0) & (page < pages), page, (position % S).to(tl.int64)


@triton.jit
def store_result(
    tile, row, y, bias, residual, places, R, y_ptr, k_cache_ptr, k_page_stride, k_head_stride, k_token_stride,
    v_cache_ptr, v_page_stride, v_head_stride, v_token_stride,
    OUT: tl.constexpr, HALF: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Stores what the op makes of a product y [BO, BR] in float32, of a tile of W and the rows of x in `row` [1, BR].

    bias [BO, 1], residual [BO, BR] and places are None for inputs that the op does not have.
    """
    dtype = y_ptr.dtype.element_ty
    output = (tile * BO + tl.arange(0, BO))[:, None]
    if bias is not None:
        y += bias
    y = y.to(dtype).to(tl.float32)
    if HALF == 0:
        if residual is not None:
            y += residual.to(tl.float32)
        tl.store(y_ptr + row * OUT + output, y.to(dtype), mask=(row < R) & (output < OUT))
    else:
        first, second = y.reshape(BO // 2, 2, y.shape[1]).permute(0, 2, 1).split()
        pair = (tile * (BO // 2) + tl.arange(0, BO // 2))[:, None]
        inside = (row < R) & (pair < OUT // 2)
        if places is None:
            y = silu(first).to(dtype).to(tl.float32) * second
            tl.store(y_ptr + row * (OUT // 2) + pair, y.to(dtype), mask=inside)
        else:
            cos, sin, live, paged, page, slot = places
            head, column = pair // HALF, pair % HALF
            turned_first, turned_second = rotate(first, second, cos, sin, dtype)
            is_q = inside & (head < H)
            q = y_ptr + (row * H + head) * (2 * HALF) + column
            tl.store(q, tl.where(live, turned_first, 0.0).to(dtype), mask=is_q)
            tl.store(q + HALF, tl.where(live, turned_second, 0.0).to(dtype), mask=is_q)
            is_k = inside & paged & (head >= H) & (head < H + K)
            place = page * k_page_stride + (head - H).to(tl.int64) * k_head_stride + slot * k_token_stride
            k = k_cache_ptr + place + column
            tl.store(k, turned_first.to(dtype), mask=is_k)
            tl.store(k + HALF, turned_second.to(dtype), mask=is_k)
            is_v = inside & paged & (head >= H + K)
            place = page * v_page_stride + (head - H - K).to(tl.int64) * v_head_stride + slot * v_token_stride
            v = v_cache_ptr + place + column
            tl.store(v, first.to(dtype), mask=is_v)
            tl.store(v + HALF, second.to(dtype), mask=is_v)
