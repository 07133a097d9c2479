"""The end of a decode step: what was drawn enters the state from which the next step begins.

One program a row reads a few words and writes a few: token, length, the count of the token, and what the host is told.
In the one step with which a row may end at last (`min_tokens`), it also copies its mask of permitted tokens (16 KiB at
InternLM3-8B's V = 128512). Operations: none. It is one launch so that no op of PyTorch breaks the chain of kernels that
wait for one another on the device.
"""

import torch
import triton.language as tl
from torch import Tensor

from .launch import check, check_activation, jit, options

BLOCK = 1024
# The loads of one warp are all issued before its first store, so that nothing is read that this launch has written.
NUM_WARPS = 1


@jit()
def _advance(
    drawn_ptr, logprob_ptr, token_ptr, lens_ptr, limit_ptr, ends_ptr, said_ptr,
    counts_ptr, free_from_ptr, permitted_ptr, allowed_ptr,
    ends_stride, counts_stride, said_stride, permitted_stride, allowed_stride, words,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    length = tl.load(lens_ptr + row)
    if length > 0:
        token = tl.load(drawn_ptr + row)
        logprob = tl.load(logprob_ptr + row)
        word = tl.load(ends_ptr + row * ends_stride + token // 32)
        stopped = (word >> (token % 32).to(tl.int32)) & 1
        full = (length + 1 >= tl.load(limit_ptr + row)).to(tl.int32)
        end = tl.where(logprob != logprob, 3, tl.where(stopped != 0, 1, 2 * full))
        count_ptr = counts_ptr + row * counts_stride + token
        count = tl.load(count_ptr)
        opens = length + 1 == tl.load(free_from_ptr + row)
        tl.store(said_ptr + row * said_stride, token.to(tl.int32))
        tl.store(said_ptr + row * said_stride + 1, end)
        tl.store(said_ptr + row * said_stride + 2, logprob.to(tl.int32, bitcast=True))
        tl.store(token_ptr + row, token)
        tl.store(lens_ptr + row, tl.where(end != 0, 0, length + 1))
        tl.store(count_ptr, count + 1)
        if opens:
            for start in range(0, words, BLOCK):
                at = start + tl.arange(0, BLOCK)
                permitted = tl.load(permitted_ptr + row * permitted_stride + at, mask=at < words, other=0)
                tl.store(allowed_ptr + row * allowed_stride + at, permitted, mask=at < words)
    else:
        tl.store(said_ptr + row * said_stride, -1)


def advance(
    drawn: Tensor,
    logprob: Tensor,
    *,
    token: Tensor,
    seq_lens: Tensor,
    limit: Tensor,
    ends: Tensor,
    said: Tensor,
    output_counts: Tensor,
    free_from: Tensor,
    permitted: Tensor,
    allowed: Tensor,
) -> None:
    """`reference.advance`: the state's tensors change in place.

    Raises TypeError for a dtype, ValueError for a shape, device or stride that the kernel cannot take.
    """
    check_activation("logprob", logprob, -1)
    rows, device = logprob.shape[0], logprob.device
    check("ends", ends, torch.int32, device, rows, -1)
    words = ends.shape[1]
    for name, x, dtype, shape in (
        ("drawn", drawn, torch.int64, (rows,)),
        ("logprob", logprob, torch.float32, (rows,)),
        ("token", token, torch.int64, (rows,)),
        ("seq_lens", seq_lens, torch.int32, (rows,)),
        ("limit", limit, torch.int32, (rows,)),
        ("said", said, torch.int32, (rows, 3)),
        ("output_counts", output_counts, torch.int32, (rows, -1)),
        ("free_from", free_from, torch.int32, (rows,)),
        ("permitted", permitted, torch.int32, (rows, words)),
        ("allowed", allowed, torch.int32, (rows, words)),
    ):
        check(name, x, dtype, device, *shape)

    _advance[(rows,)](
        drawn, logprob, token, seq_lens, limit, ends, said, output_counts, free_from, permitted, allowed,
        ends.stride(0), output_counts.stride(0), said.stride(0), permitted.stride(0), allowed.stride(0), words,
        BLOCK=BLOCK, num_warps=NUM_WARPS, **options(device),
    )  # fmt: skip
