"""Paged flash-decoding attention: softmax(scale * q k^T) v of each sequence's last T tokens over its pages.

Shapes (letters as in reference.py): q [B*T, H, D], caches [P, K, S, D] -> [B*T, H * D]. One kernel serves a decode
step, the verification of drafted tokens and the chunks of a prompt. A program owns a tile of query rows: the T tokens
of the G = H / K query heads that share a key/value head, token-major, so that keys are read once for the group and even
one token fills a tensor-core tile. It loops over the keys in tiles of consecutive tokens:

            tile of keys   0    1    2    3    4    5  ...
            split          0    1    2    3    0    1  ...          (4 splits; the lengths live on the device)

Tile j belongs to split j mod SPLITS, for any length. A split writes its normalised sum, its largest score and its total
weight in float32; `_combine` joins the splits in the order of their numbers. SPLITS and the tiles depend on T, G, D,
the dtype, and whether the launch is a decode step of one sequence. So for given T, G and D, in a decode step or not,
alone or not, the bits of a row depend only on its query and the keys and values that it attends to: not on the other
sequences, the other rows of its tile, the page size, the order of the pages, or the width of the block table.
Dao et al. 2022 (online softmax), Dao et al. 2023 (split keys), Kwon et al. 2023 (pages).

At InternLM3-8B's shapes (48 layers, H 32, K 2, D 128, bfloat16) a token's keys and values are 1 KiB a layer, 48 KiB in
all. Per layer, one decode step of one sequence reads and computes:
    1k tokens     1 MiB    16.8 MFLOP     0.35 us at 3.0 TB/s: bound by latency, not bandwidth
    32k tokens   32 MiB     537 MFLOP    11.2  us at 3.0 TB/s
plus 16.5 KB of float32 partial sums for each active split, 2.1 MB with all 128, written and read once (in L2). In a
decode step a program loads its first tile into registers before it waits for the launch that writes q (EARLY). Where a
split has more tiles, they are copied to shared memory while those before them are computed.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, check, check_activation, is_hopper, jit, next_power_of_2, options

MAX_HEAD_DIM = 256
# Programs that share the work of one key/value head. InternLM3-8B has two heads, so 128 programs fill 132 SMs.
_PROGRAMS = 64
# Rows in a tile -> keys in a tile, warps, stages. With n stages n - 1 tiles are in flight. None spills on sm_80 to
# sm_100, and all fit the 99 KB of sm_86. For 16 rows, in a decode step of several sequences, three programs have 96 KB
# in flight on an H200's multiprocessor. For 64 rows one tile in flight leaves room for two more programs; with eight
# warps it spills on sm_86 and 89 with Triton 3.8. All were chosen by their machine code.
_TILES = {16: (64, 8, 2), 32: (64, 4, 3), 64: (32, 4, 2), 128: (32, 8, 3)}
# For a decode step of a single sequence, on a GPU with 227 KB of shared memory. At 32k tokens a multiprocessor has two
# programs, which with two tiles each in flight ask for 128 KB at a time; with one, 64 KB, of which each waits for all.
_PROGRAMS_ALONE = 128
_TILE_ALONE = (64, 8, 3)
# Hopper's tensor cores read both factors from shared memory, which leaves registers for more keys.
_TALL_ON_HOPPER = (64, 8, 2)
# Where the attention of a decode step lets its successor start: after its own loads, since the 19.5 MB of weights that
# o_proj asks for at once would precede them in memory's queue. See `_attend`.
_TRIGGER = 2
# `_combine`: dims of a program's slice, and splits that it takes at a time. In a decode step of one sequence, whose
# programs leave most of a GPU idle, it takes all at once: at 32k tokens there are 128, and it would wait eight times.
# Slices of 16 dims would not halve what a multiprocessor reads then, since two programs would share each.
_SLICE = 32
_SPLITS_AT_A_TIME = 16


class Tiling(NamedTuple):
    """The tiles of a launch, by T, G, D, the dtype, the device, and whether it is a decode step of one sequence."""

    rows: int
    keys: int
    dims: int
    splits: int
    warps: int
    stages: int


@lru_cache
def tiling(T: int, G: int, D: int, dtype: torch.dtype, hopper: bool, alone: bool) -> Tiling:
    dims, programs = next_power_of_2(D), _PROGRAMS
    rows = min(max(next_power_of_2(T * G), 16), 128 if dims <= 128 else 64)
    keys, warps, stages = _TALL_ON_HOPPER if rows == 128 and hopper else _TILES[rows]
    if rows == 16 and alone:
        programs = _PROGRAMS_ALONE
        keys, warps, stages = _TILE_ALONE if hopper else _TILES[rows]
    if dims > 128:
        keys //= 2
    if dtype == torch.float32:
        # Not for speed: exact products use no tensor cores, and need both factors in registers.
        rows, keys, warps, stages = 16, 16, 4, 3
    splits = max(programs // next_power_of_2(cdiv(T * G, rows)), 1)
    return Tiling(rows, keys, dims, splits, warps, stages)


@triton.jit
def _load_pages(pages_ptr, tokens, inside, P, S: tl.constexpr, CACHE: tl.constexpr):
    """The pages of the tokens that are inside, 0 for the others."""
    pages = tl.load(pages_ptr + tokens // S, mask=inside, other=0, cache_modifier=CACHE)
    tl.device_assert((pages >= 0) & (pages < P), "block_table has a page that is not in the cache")
    return pages


@triton.jit
def _cells(pages, tokens, page_stride, slot_stride, P, S: tl.constexpr):
    """The offsets of tokens in a cache, int64. A page that is not in the cache counts as its nearest."""
    pages = tl.minimum(tl.maximum(pages, 0), P - 1)
    return pages.to(tl.int64) * page_stride + (tokens % S).to(tl.int64) * slot_stride


@triton.jit
def _weigh_keys(q, k, best, total, tokens, positions, qk_scale, MASKED: tl.constexpr):
    """The weights of a tile of keys, the factor for what was summed before it, and the new maximum and total weight.

    The maximum is that of the products before the (positive) scale, and is subtracted before they are scaled. So the
    weight of the maximum is exactly 1, and the sums do not change while the maximum stays the same.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    # The maximum of a row without keys stays -inf; 0 is subtracted instead, so its weights are 2^-inf = 0.
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2((scores - shift[:, None]) * qk_scale)
    decay = tl.exp2((best - shift) * qk_scale)
    return weights, decay, new_best, total * decay + tl.sum(weights, 1)


@triton.jit
def _fold(
    q, best, total, acc, k_ptr, v_ptr, pages_ptr, pages, page_stride, slot_stride, positions, end, qk_scale,
    first, last, step, P, S: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold key tiles first, first + step, ... < last into the running maximum, weight and weighted sum of each row.

    `pages` are those of the first tile. Returns them for the tile after the last one, too.
    """
    dims = tl.arange(0, BD)
    for tile in range(first, last, step):
        tokens = tile * BN + tl.arange(0, BN)
        inside = tokens < end
        cells = _cells(pages, tokens, page_stride, slot_stride, P, S)[:, None] + dims[None, :]
        following = tokens + step * BN
        pages = _load_pages(pages_ptr, following, following < end, P, S, "")
        # An unused slot may contain NaN, and 0 * NaN is NaN: values are masked too.
        mask = (inside[:, None] if MASKED else True) & (dims[None, :] < D)
        k = tl.load(k_ptr + cells, mask=mask, other=0.0)
        weights, decay, best, total = _weigh_keys(q, k, best, total, tokens, positions, qk_scale, MASKED)
        v = tl.load(v_ptr + cells, mask=mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return best, total, acc, pages


@jit("q_ptr k_ptr v_ptr new_k_ptr new_v_ptr out_ptr q_row_stride q_head_stride page_stride head_stride slot_stride")
def _attend(
    q_ptr, k_ptr, v_ptr, new_k_ptr, new_v_ptr, pages_ptr, lens_ptr, out_ptr, best_ptr, total_ptr, q_row_stride,
    q_head_stride, page_stride, head_stride, slot_stride, table_stride, qk_scale, T, P, N, splits,
    G: tl.constexpr, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    EARLY: tl.constexpr, TRIGGER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one sequence and key/value head against one split of its keys. Grid (B * K, tiles, splits).

    Splits are the slowest axis: where not all programs fit the GPU at once, those without keys start last.

    A single split writes the output. One of several (SPLIT) writes its partial sums [B*T, H, SPLITS, D], its largest
    product before the scale and its total weight, [B*T, H, SPLITS] each.

    EARLY, for a decode step: T is 1, and only q and the newest token's key and value are of this step. All else is
    older, and the program loads it for its first tile before the wait. It loads the newest token through new_k_ptr and
    new_v_ptr, the same caches by other names, so that the audit can tell these loads from those before the wait.
    TRIGGER: where the successor may start: at the beginning (0), after the first tile's loads (1), or after all tiles'
    (2). The last is before the wait if the split has at most one tile, as with up to 8k tokens of a single sequence,
    else after the loop.
    """
    if PDL and TRIGGER == 0:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
    split, b, kv_head = tl.program_id(2), tl.program_id(0) // K, tl.program_id(0) % K
    # The last step has changed the length and may have changed the table: .cg does not read them from L1.
    length = tl.load(lens_ptr + b, cache_modifier=".cg")
    # The last rows have the most keys, so their programs start first.
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    last_row = tl.minimum(first_row + BM, T * G) - 1
    rows = first_row + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    heads = kv_head * G + rows % G
    q_rows = (b * T + rows // G).to(tl.int64)
    mask = (rows <= last_row)[:, None] & (dims < D)[None, :]
    q_ptrs = q_ptr + (q_rows * q_row_stride + heads.to(tl.int64) * q_head_stride)[:, None] + dims[None, :]
    if not EARLY:
        # Load q before testing for an empty split, so that it overlaps the load of the length.
        q = tl.load(q_ptrs, mask=mask, other=0.0)
    # The number of keys that the last row of the tile attends to; 0 if all rows are padding.
    end = tl.minimum(tl.maximum(length - T + last_row // G + 1, 0), N * S)
    head_offset = kv_head.to(tl.int64) * head_stride
    k_ptr += head_offset
    v_ptr += head_offset
    pages_ptr += b.to(tl.int64) * table_stride
    first = split
    if EARLY:
        tokens = split * BN + tl.arange(0, BN)
        newest = end - 1
        older = tokens < newest
        pages = _load_pages(pages_ptr, tokens, older, P, S, ".cg")
        # Every program looks up the newest token's page and those of its second tile, so that these loads do not follow
        # those of the keys.
        new_page = _load_pages(pages_ptr, newest, newest >= 0, P, S, ".cg")
        first += splits
        following = tokens + splits * BN
        following_pages = _load_pages(pages_ptr, following, following < end, P, S, ".cg")
        cells = _cells(pages, tokens, page_stride, slot_stride, P, S)[:, None] + dims[None, :]
        new_cell = head_offset + dims + _cells(new_page, newest, page_stride, slot_stride, P, S)
        older_mask = older[:, None] & (dims < D)[None, :]
        k = tl.load(k_ptr + cells, mask=older_mask, other=0.0)
        v = tl.load(v_ptr + cells, mask=older_mask, other=0.0)
        if PDL and TRIGGER == 1:
            tl.extra.cuda.gdc_launch_dependents()
        if PDL and TRIGGER == 2:  # noqa: SIM102 - decided at compile time
            if first * BN >= end:
                tl.extra.cuda.gdc_launch_dependents()
        if PDL:
            tl.extra.cuda.gdc_wait()
    if SPLIT & (split * BN >= end):
        return

    positions = tl.minimum(length - T + rows // G, N * S - 1)
    best = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    if EARLY:
        # Before q, which passes through shared memory: with Triton 3.6 these loads would wait for it.
        new_mask = (newest >= split * BN) & (newest < split * BN + BN) & (dims < D)
        new_k = tl.load(new_k_ptr + new_cell, mask=new_mask, other=0.0, cache_modifier=".cg")
        new_v = tl.load(new_v_ptr + new_cell, mask=new_mask, other=0.0, cache_modifier=".cg")
        q = tl.load(q_ptrs, mask=mask, other=0.0)
        is_newest = (tokens == newest)[:, None]
        k = tl.where(is_newest, new_k[None, :], k)
        v = tl.where(is_newest, new_v[None, :], v)
        weights, _, best, total = _weigh_keys(q, k, best, total, tokens, positions, qk_scale, True)
        acc = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        pages = following_pages
    else:
        tokens = first * BN + tl.arange(0, BN)
        pages = _load_pages(pages_ptr, tokens, tokens < end, P, S, "")
    if BM == 128:
        # A tall tile is bound by arithmetic, so key tiles that all of its rows attend to are not masked.
        whole = tl.minimum(tl.maximum(length - T + first_row // G + 1, 0), end) // BN
        best, total, acc, pages = _fold(
            q, best, total, acc, k_ptr, v_ptr, pages_ptr, pages, page_stride, slot_stride, positions, end, qk_scale,
            first, whole, splits, P, S, D, BN, BD, False,
        )  # fmt: skip
        first += tl.cdiv(tl.maximum(whole - first, 0), splits) * splits
    best, total, acc, _ = _fold(
        q, best, total, acc, k_ptr, v_ptr, pages_ptr, pages, page_stride, slot_stride, positions, end, qk_scale,
        first, tl.cdiv(end, BN), splits, P, S, D, BN, BD, True,
    )  # fmt: skip
    if PDL and TRIGGER == 2:
        tl.extra.cuda.gdc_launch_dependents()

    acc /= tl.where(total > 0, total, 1.0)[:, None]
    places = (q_rows * (K * G) + heads) * splits + split
    tl.store(out_ptr + places[:, None] * D + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    if SPLIT:
        tl.store(best_ptr + places, best, mask=rows <= last_row)
        tl.store(total_ptr + places, total, mask=rows <= last_row)


@jit("partial_ptr out_ptr")
def _combine(
    partial_ptr, best_ptr, total_ptr, lens_ptr, out_ptr, qk_scale, T, tokens, tile, splits,
    H: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Join the splits that have keys of this program's row and head, in BD of its dims. Grid (B*T, H, slices of D).

    It takes BS splits at a time, as many as there are: the others wrote nothing, so their memory must not be read.
    tokens: N * S of a block table; tile: keys in a tile of `_attend`. EARLY: the lengths are older than the step, and
    are loaded before the wait.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lens_ptr + row // T, cache_modifier=".cg")
    keys = tl.maximum(tl.minimum(length - T + row % T + 1, tokens), 0)
    written = tl.minimum(tl.cdiv(keys, tile), splits)
    dims = tl.program_id(2) * BD + tl.arange(0, BD)
    first_place = (row * H + head).to(tl.int64) * splits
    best = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    out = tl.zeros((BD,), tl.float32)
    if PDL and EARLY:
        tl.extra.cuda.gdc_wait()
    for first in range(0, written, BS):
        numbers = first + tl.arange(0, BS)
        there = numbers < written
        places = first_place + numbers
        partial_ptrs = partial_ptr + places[:, None] * D + dims[None, :]
        partial = tl.load(partial_ptrs, mask=there[:, None] & (dims < D)[None, :], other=0.0)
        bests = tl.load(best_ptr + places, mask=there, other=float("-inf"))
        weights = tl.load(total_ptr + places, mask=there, other=0.0)
        new_best = tl.maximum(best, tl.max(bests, 0))
        weights *= tl.where(there, tl.exp2((bests - new_best) * qk_scale), 0.0)
        decay = tl.exp2((best - new_best) * qk_scale)
        total = total * decay + tl.sum(weights, 0)
        out = out * decay + tl.sum(partial * weights[:, None], 0)
        best = new_best
    out /= tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + (row * H + head).to(tl.int64) * D + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    batch_invariant: bool = False,
    decode_step: bool = False,
) -> Tensor:
    """Causal attention of each sequence's last T tokens over its pages. q [B*T, H, D] -> [B*T, H*D].

    `decode_step`, for T = 1, states that `embed` began this step and that since then only q and the newest token's key
    and value have been written, not seq_lens, the block table or any other token. A GPU with programmatic dependent
    launch then loads those before the launch that writes q has finished. The last row of a longer chunk, whose other
    keys are new too, is no decode step.

    In a decode step a single sequence has tiles of its own. With `batch_invariant` it uses the tiles of several, so it
    is bit-identical alone and in a batch.

    k_cache and v_cache [P, K, S, D] of q's dtype, with equal strides; block_table [B, N] and seq_lens [B] int32; D a
    multiple of 16 up to 256. Tokens at negative positions are padding, and their results are zero. Slots after a
    sequence's length may contain anything. Raises TypeError for a wrong dtype, ValueError for a wrong shape, stride or
    device.
    """
    check_activation("q", q, -1, -1, -1)
    (rows, H, D), device = q.shape, q.device
    check("k_cache", k_cache, q.dtype, device, -1, -1, -1, D)
    P, K, S, _ = k_cache.shape
    check("v_cache", v_cache, q.dtype, device, P, K, S, D)
    check("block_table", block_table, torch.int32, device, -1, -1)
    B, N = block_table.shape
    check("seq_lens", seq_lens, torch.int32, device, B)
    if 0 in (q.numel(), k_cache.numel(), block_table.numel()):
        shapes = f"{list(q.shape)}, {list(k_cache.shape)} and {list(block_table.shape)}"
        raise ValueError(f"q, k_cache and block_table have shapes {shapes}; none may be empty")
    if v_cache.stride() != k_cache.stride():
        raise ValueError(f"v_cache has strides {v_cache.stride()}, must have those of k_cache, {k_cache.stride()}")
    if D % 16 or D > MAX_HEAD_DIM:
        raise ValueError(f"q has head_dim {D}, must be a multiple of 16 up to {MAX_HEAD_DIM}")
    if H % K:
        raise ValueError(f"q has {H} heads, must be a multiple of the {K} of k_cache")
    if rows % B:
        raise ValueError(f"q has {rows} rows, must be a multiple of the {B} sequences of block_table")
    if not scale > 0:
        raise ValueError(f"scale is {scale}, must be positive")

    if decode_step and rows != B:
        raise ValueError(f"q has {rows // B} rows for each sequence; a decode_step has 1")

    T, G = rows // B, H // K
    alone = decode_step and B == 1 and not batch_invariant
    BM, BN, BD, SPLITS, warps, stages = tiling(T, G, D, q.dtype, is_hopper(device), alone)
    out = torch.empty((rows, H * D), dtype=q.dtype, device=device)
    partial, best, total = out, out, out
    if SPLITS > 1:
        partial = torch.empty((rows, H, SPLITS, D), dtype=torch.float32, device=device)
        best, total = torch.empty((2, rows, H, SPLITS), dtype=torch.float32, device=device)
    log2_scale = scale * math.log2(math.e)
    # Splits after the last tile of the widest sequence are not launched.
    grid = (B * K, cdiv(T * G, BM), min(SPLITS, cdiv(N * S, BN)))
    _attend[grid](
        q, k_cache, v_cache, k_cache, v_cache, block_table, seq_lens, partial, best, total, q.stride(0), q.stride(1),
        *k_cache.stride()[:3], block_table.stride(0), log2_scale, T, P, N, SPLITS,
        G, K, S, D, SPLITS > 1, BM, BN, BD, decode_step, _TRIGGER if decode_step else 0,
        num_warps=warps, num_stages=stages, **options(device),
    )  # fmt: skip
    if SPLITS > 1:
        joined, dims = _PROGRAMS_ALONE if alone else _SPLITS_AT_A_TIME, min(BD, _SLICE)
        _combine[(rows, H, cdiv(D, dims))](
            partial, best, total, seq_lens, out, log2_scale, T, N * S, BN, SPLITS,
            H, D, joined, dims, decode_step, num_warps=4, **options(device),
        )  # fmt: skip
    return out
