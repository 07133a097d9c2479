"""Drafts of the tokens that follow each sequence: what followed its end where that occurs earlier in it.

Two launches:

    _match    [B, blocks]   the longest match of each block of places, as the number (tokens * 2^32 + place)
    _draft    [B]           the longest of all blocks; the drafts and the lengths of the rows that read them

Most blocks have no match of two tokens, and end there.

Bytes at 32768 tokens of a sequence: 128 KB, by 64 programs. A block with a match reads its 2 KB again for each further
token, from the L1 cache. Operations: 2 comparisons for each place.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..reference import LONGEST_MATCH
from .launch import cdiv, check, check_first, jit, next_power_of_2, options

# Places per program: 4 per thread.
BLOCK = 512
NUM_WARPS = 4
# Numbers per iteration, one for each block: those of 32768 tokens. Rows of a sequence, or more if there are.
BLOCKS = 64
LANES = 16


@jit()
def _match(
    history_ptr, lens_ptr, best_ptr, history_stride, blocks,
    LONGEST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lens_ptr + row)
    history_ptr += row * history_stride
    place = block * BLOCK + 1 + tl.arange(0, BLOCK)
    inside = (place >= 2) & (place < length)
    last = tl.load(history_ptr + length - 1, mask=length > 1, other=0)
    before = tl.load(history_ptr + length - 2, mask=length > 1, other=0)
    alive = tl.load(history_ptr + place - 1, mask=inside, other=-1) == last
    alive &= tl.load(history_ptr + place - 2, mask=inside, other=-1) == before
    matched = 2 * alive.to(tl.int32)
    if tl.max(matched, axis=0) > 0:
        for back in range(3, LONGEST + 1):
            before = tl.load(history_ptr + length - back, mask=length >= back, other=0)
            alive &= tl.load(history_ptr + place - back, mask=inside & (place >= back), other=-1) == before
            matched += alive.to(tl.int32)
    tl.store(best_ptr + row * blocks + block, tl.max((matched.to(tl.int64) << 32) + place, axis=0))


@jit()
def _draft(
    history_ptr, lens_ptr, max_len_ptr, min_len_ptr, most_ptr, best_ptr, report_ptr, drafts_ptr, draft_lens_ptr,
    history_stride, report_stride, drafts_stride, draft_lens_stride, last_word, K, blocks,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lens_ptr + row)
    max_len, min_len, most = tl.load(max_len_ptr + row), tl.load(min_len_ptr + row), tl.load(most_ptr + row)
    best = tl.full((), 0, tl.int64)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        found = tl.load(best_ptr + row * blocks + block, mask=block < blocks, other=0)
        best = tl.maximum(best, tl.max(found, axis=0))
    place = (best & 0xFFFFFFFF).to(tl.int32)
    count = tl.minimum(tl.minimum(K - 1, most), max_len - length - 1)
    count = tl.where(length < min_len, tl.minimum(count, min_len - length - 1), count)
    count = tl.where((best >> 32 >= 2) & (length > 0), tl.maximum(count, 0), 0)
    at = tl.arange(0, LANES)
    ahead = tl.maximum(length - place, 1)  # an idle sequence has no place
    source = tl.where(at == 0, length - 1, place + (at - 1) % ahead)
    used = (at <= count) & (length > 0)
    token = tl.load(history_ptr + row * history_stride + source, mask=used, other=0)
    tl.store(drafts_ptr + row * drafts_stride + at, token.to(tl.int64), mask=at < K)
    tl.store(draft_lens_ptr + row * draft_lens_stride + at, tl.where(used, length + at, 0), mask=at < K)
    tl.store(report_ptr + row * report_stride + last_word, count)


def draft(
    history: Tensor,
    seq_lens: Tensor,
    max_len: Tensor,
    min_len: Tensor,
    most_drafts: Tensor,
    *,
    report: Tensor,
    drafts: Tensor,
    draft_lens: Tensor,
) -> None:
    """`reference.draft`: the report, the drafts and their lengths change in place.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or stride.
    """
    check_first("history", history, torch.int32, -1, -1)
    (batch, width), device = history.shape, history.device
    rows = drafts.shape[-1]
    for name, x, dtype, shape in (
        ("seq_lens", seq_lens, torch.int32, (batch,)),
        ("max_len", max_len, torch.int32, (batch,)),
        ("min_len", min_len, torch.int32, (batch,)),
        ("most_drafts", most_drafts, torch.int32, (batch,)),
        ("report", report, torch.int32, (batch, -1)),
        ("drafts", drafts, torch.int64, (batch, rows)),
        ("draft_lens", draft_lens, torch.int32, (batch, rows)),
    ):
        check(name, x, dtype, device, *shape)
    blocks = max(cdiv(width - 1, BLOCK), 1)
    best = torch.empty((batch, blocks), dtype=torch.int64, device=device)
    _match[(batch, blocks)](
        history, seq_lens, best, history.stride(0), blocks,
        LONGEST=LONGEST_MATCH, BLOCK=BLOCK, num_warps=NUM_WARPS, **options(device),
    )  # fmt: skip
    _draft[(batch,)](
        history, seq_lens, max_len, min_len, most_drafts, best, report, drafts, draft_lens,
        history.stride(0), report.stride(0), drafts.stride(0), draft_lens.stride(0), report.shape[1] - 1, rows, blocks,
        BLOCKS=BLOCKS, LANES=max(LANES, next_power_of_2(rows)), num_warps=1, **options(device),
    )  # fmt: skip
