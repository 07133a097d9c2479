"""The end of a decode step: the sampled tokens enter the state of the next step.

One program per row reads and writes a few words: the token, the length, the token's count and the report to the host.
In the step in which a row reaches `min_len`, the program also copies the row's mask of permitted tokens (16 KiB at
InternLM3-8B's V = 128512). Operations: none. It is one launch, so that no op of PyTorch interrupts the chain of kernels
that wait for one another on the device.
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
    sampled_ptr, logprob_ptr, token_ptr, lens_ptr, max_len_ptr, end_mask_ptr, report_ptr,
    counts_ptr, min_len_ptr, permitted_ptr, allowed_ptr,
    end_mask_stride, counts_stride, report_stride, permitted_stride, allowed_stride, words,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    length = tl.load(lens_ptr + row)
    if length > 0:
        sampled = tl.load(sampled_ptr + row)
        token = tl.maximum(sampled, 0)
        logprob = tl.load(logprob_ptr + row)
        word = tl.load(end_mask_ptr + row * end_mask_stride + token // 32)
        stopped = (word >> (token % 32).to(tl.int32)) & 1
        full = (length + 1 >= tl.load(max_len_ptr + row)).to(tl.int32)
        end = tl.where(stopped != 0, 1, 2 * full)
        end = tl.where(logprob != logprob, 3, tl.where(sampled < 0, 4, end))
        count_ptr = counts_ptr + row * counts_stride + token
        count = tl.load(count_ptr)
        opens = length + 1 == tl.load(min_len_ptr + row)
        tl.store(report_ptr + row * report_stride, token.to(tl.int32))
        tl.store(report_ptr + row * report_stride + 1, end)
        tl.store(report_ptr + row * report_stride + 2, logprob.to(tl.int32, bitcast=True))
        tl.store(token_ptr + row, token)
        tl.store(lens_ptr + row, tl.where(end != 0, 0, length + 1))
        tl.store(count_ptr, count + 1)
        if opens:
            for start in range(0, words, BLOCK):
                at = start + tl.arange(0, BLOCK)
                permitted = tl.load(permitted_ptr + row * permitted_stride + at, mask=at < words, other=0)
                tl.store(allowed_ptr + row * allowed_stride + at, permitted, mask=at < words)
    else:
        tl.store(report_ptr + row * report_stride, -1)


def advance(
    sampled: Tensor,
    logprob: Tensor,
    *,
    token: Tensor,
    seq_lens: Tensor,
    max_len: Tensor,
    end_mask: Tensor,
    report: Tensor,
    output_counts: Tensor,
    min_len: Tensor,
    permitted: Tensor,
    allowed: Tensor,
) -> None:
    """`reference.advance`: the state's tensors change in place.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or stride.
    """
    check_activation("logprob", logprob, -1)
    rows, device = logprob.shape[0], logprob.device
    check("end_mask", end_mask, torch.int32, device, rows, -1)
    words = end_mask.shape[1]
    for name, x, dtype, shape in (
        ("sampled", sampled, torch.int64, (rows,)),
        ("logprob", logprob, torch.float32, (rows,)),
        ("token", token, torch.int64, (rows,)),
        ("seq_lens", seq_lens, torch.int32, (rows,)),
        ("max_len", max_len, torch.int32, (rows,)),
        ("report", report, torch.int32, (rows, 3)),
        ("output_counts", output_counts, torch.int32, (rows, -1)),
        ("min_len", min_len, torch.int32, (rows,)),
        ("permitted", permitted, torch.int32, (rows, words)),
        ("allowed", allowed, torch.int32, (rows, words)),
    ):
        check(name, x, dtype, device, *shape)

    _advance[(rows,)](
        sampled, logprob, token, seq_lens, max_len, end_mask, report, output_counts, min_len, permitted, allowed,
        end_mask.stride(0), output_counts.stride(0), report.stride(0), permitted.stride(0), allowed.stride(0), words,
        BLOCK=BLOCK, num_warps=NUM_WARPS, **options(device),
    )  # fmt: skip
