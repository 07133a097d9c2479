"""The long part of a new request's state: its prompt's tokens, their counts, and its biases.

Each program clears a part of the vocabulary, then reads the whole request and writes what falls into its part. So no
program waits for another, and the lengths stay on the device. Counts are sums of integers: exact in any order. Each
program also copies some blocks of the prompt.

Bytes at InternLM3-8B's shapes (V = 128512): 1.5 MB written; the request is read by 126 programs, from the L2 cache.
Operations: none.
"""

import torch
import triton.language as tl
from torch import Tensor

from .launch import cdiv, check, check_first, jit, options

# Tokens of the vocabulary per program, and words of the request per iteration.
BLOCK = 1024
NUM_WARPS = 4


@jit()
def _count_prompt(
    request_ptr, lengths_ptr, history_ptr, prompt_counts_ptr, output_counts_ptr, bias_ptr, V,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * BLOCK
    end = tl.minimum(first + BLOCK, V)
    part = first + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    tl.store(prompt_counts_ptr + part, 0, mask=part < end)
    tl.store(output_counts_ptr + part, 0, mask=part < end)
    tl.store(bias_ptr + part, 0.0, mask=part < end)
    tl.debug_barrier()  # other threads of the program write below
    tokens, biases = tl.load(lengths_ptr), tl.load(lengths_ptr + 1)
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(request_ptr + at, mask=at < tokens, other=-1)
        mine = (token >= first) & (token < end)
        tl.atomic_add(prompt_counts_ptr + token, 1, mask=mine, sem="relaxed")
        copies = (at < tokens) & (start // BLOCK % tl.num_programs(0) == tl.program_id(0))
        tl.store(history_ptr + at, token, mask=copies)
    for start in range(0, biases, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(request_ptr + tokens + at, mask=at < biases, other=-1)
        bias = tl.load(request_ptr + tokens + biases + at, mask=at < biases, other=0)
        mine = (token >= first) & (token < end)
        tl.store(bias_ptr + token, bias.to(tl.float32, bitcast=True), mask=mine)


def count_prompt(
    request: Tensor,
    lengths: Tensor,
    *,
    history: Tensor,
    prompt_counts: Tensor,
    output_counts: Tensor,
    logit_bias: Tensor,
) -> None:
    """`reference.count_prompt`: the history, counts and biases change in place.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or stride.
    """
    check_first("request", request, torch.int32, -1)
    (vocab,) = prompt_counts.shape
    for name, x, dtype, size in (
        ("lengths", lengths, torch.int32, 2),
        ("history", history, torch.int32, -1),
        ("prompt_counts", prompt_counts, torch.int32, vocab),
        ("output_counts", output_counts, torch.int32, vocab),
        ("logit_bias", logit_bias, torch.float32, vocab),
    ):
        check(name, x, dtype, request.device, size)
    _count_prompt[(cdiv(vocab, BLOCK),)](
        request, lengths, history, prompt_counts, output_counts, logit_bias, vocab,
        BLOCK=BLOCK, num_warps=NUM_WARPS, **options(request.device),
    )  # fmt: skip
