"""The end of a decode step: the sampled tokens, as far as drafts were right, enter the state of the next step.

One program per sequence reads and writes a few words: tokens, the length, their counts and the report to the host. In
the step in which a sequence reaches `min_len`, the program also copies its mask of permitted tokens (16 KiB at
InternLM3-8B's V = 128512). Operations: none. It is one launch, so that no op of PyTorch interrupts the chain of kernels
that wait for one another on the device.
"""

import torch
import triton.language as tl
from torch import Tensor

from .launch import check, check_activation, jit, next_power_of_2, options

BLOCK = 1024
# The loads of one warp are all issued before its first store, so that nothing is read that this launch has written.
NUM_WARPS = 1


@jit()
def _advance(
    sampled_ptr, logprob_ptr, drafts_ptr, token_ptr, lens_ptr, history_ptr, max_len_ptr, end_mask_ptr, report_ptr,
    counts_ptr, min_len_ptr, permitted_ptr, allowed_ptr,
    drafts_stride, history_stride, end_mask_stride, report_stride, counts_stride, permitted_stride, allowed_stride,
    K, M, width, words, LANES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Lane j has the token of row j."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    length = tl.load(lens_ptr + row)
    at = tl.arange(0, LANES)
    report_ptr += row * report_stride
    if length > 0:
        inside = at < K
        sampled = tl.load(sampled_ptr + row * K + at, mask=inside, other=0)
        token = tl.maximum(sampled, 0)
        logprob = tl.load(logprob_ptr + row * K + at, mask=inside, other=0.0)
        word = tl.load(end_mask_ptr + row * end_mask_stride + token // 32, mask=inside, other=0)
        stopped = (word >> (token % 32).to(tl.int32)) & 1
        full = (length + at + 1 >= tl.load(max_len_ptr + row)).to(tl.int32)
        end = tl.where(stopped != 0, 1, 2 * full)
        end = tl.where(logprob != logprob, 3, tl.where(sampled < 0, 4, end))
        last = 0
        if drafts_ptr is not None:
            # The token of the first row that no other follows: its draft is missing or wrong, or the sequence ends.
            drafted = tl.load(report_ptr + 3 * M)
            follows = tl.load(drafts_ptr + row * drafts_stride + at + 1, mask=at + 1 < K, other=-1)
            right = (at < drafted) & (sampled == follows) & (end == 0)
            last = tl.min(tl.where(right, LANES - 1, at), axis=0)
        new_length = length + last + 1
        last_token = tl.sum(tl.where(at == last, token, 0), axis=0)
        last_end = tl.sum(tl.where(at == last, end, 0), axis=0)
        min_len = tl.load(min_len_ptr + row)
        new = at <= last
        tl.store(report_ptr + 3 * at, tl.where(new, token, -1).to(tl.int32), mask=at < M)
        tl.store(report_ptr + 3 * at + 1, end, mask=new)
        tl.store(report_ptr + 3 * at + 2, logprob.to(tl.int32, bitcast=True), mask=new)
        tl.store(token_ptr + row, last_token)
        tl.store(lens_ptr + row, tl.where(last_end != 0, 0, new_length))
        tl.store(history_ptr + row * history_stride + length + at, token.to(tl.int32), mask=new & (length + at < width))
        tl.atomic_add(counts_ptr + row * counts_stride + token, 1, mask=new, sem="relaxed")
        if (length < min_len) & (min_len <= new_length):
            for start in range(0, words, BLOCK):
                part = start + tl.arange(0, BLOCK)
                permitted = tl.load(permitted_ptr + row * permitted_stride + part, mask=part < words, other=0)
                tl.store(allowed_ptr + row * allowed_stride + part, permitted, mask=part < words)
    else:
        tl.store(report_ptr + 3 * at, tl.full((LANES,), -1, tl.int32), mask=at < M)


def advance(
    sampled: Tensor,
    logprob: Tensor,
    *,
    token: Tensor,
    seq_lens: Tensor,
    history: Tensor,
    max_len: Tensor,
    end_mask: Tensor,
    report: Tensor,
    output_counts: Tensor,
    min_len: Tensor,
    permitted: Tensor,
    allowed: Tensor,
    drafts: Tensor | None = None,
) -> None:
    """`reference.advance`: the state's tensors change in place.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or stride.
    """
    check_activation("logprob", logprob, -1)
    device, rows = logprob.device, 1 if drafts is None else drafts.shape[-1]
    batch = logprob.shape[0] // rows
    check("end_mask", end_mask, torch.int32, device, batch, -1)
    words = end_mask.shape[1]
    for name, x, dtype, shape in (
        ("sampled", sampled, torch.int64, (batch * rows,)),
        ("logprob", logprob, torch.float32, (batch * rows,)),
        ("token", token, torch.int64, (batch,)),
        ("seq_lens", seq_lens, torch.int32, (batch,)),
        ("history", history, torch.int32, (batch, -1)),
        ("max_len", max_len, torch.int32, (batch,)),
        ("report", report, torch.int32, (batch, -1)),
        ("output_counts", output_counts, torch.int32, (batch, -1)),
        ("min_len", min_len, torch.int32, (batch,)),
        ("permitted", permitted, torch.int32, (batch, words)),
        ("allowed", allowed, torch.int32, (batch, words)),
    ):
        check(name, x, dtype, device, *shape)
    if drafts is not None:
        check("drafts", drafts, torch.int64, device, batch, rows)
    most = report.shape[1] // 3
    if report.shape[1] != 3 * most + 1 or most < rows:
        raise ValueError(f"report has shape {list(report.shape)}, must have [{batch}, 3 M + 1] with M >= {rows}")

    _advance[(batch,)](
        sampled, logprob, drafts, token, seq_lens, history, max_len, end_mask, report,
        output_counts, min_len, permitted, allowed,
        0 if drafts is None else drafts.stride(0), history.stride(0), end_mask.stride(0), report.stride(0),
        output_counts.stride(0), permitted.stride(0), allowed.stride(0),
        rows, most, history.shape[1], words, LANES=next_power_of_2(most), BLOCK=BLOCK, num_warps=NUM_WARPS,
        **options(device),
    )  # fmt: skip
