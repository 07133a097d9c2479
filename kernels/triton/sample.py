"""Sampling: one token per row of logits. `reference_sampling` defines each stage; the tokens are the same, bit by bit.

The launches, each over all rows at once:

    _penalize     [B, blocks]   bias, penalties, mask -> x; the maximum and softmax statistics of each block
    (a search)                  the thresholds of top-k, top-p and typical-p: `sample_search`
    _add_up       [B, blocks]   the mass of the kept tokens of each block               (not in a greedy batch)
    _pick         [B]           the block that contains the random point, its token, the log-probability

Masses are integers, so the result depends neither on the order of additions nor on the order of the candidates, which
an atomic counter determines. Every float32 operation that affects a token is rounded once; division is `div_rn`.

InternLM3-8B (V = 128512, 126 blocks), per row: the logits once (251 KiB in 16 bits), x written twice and read up to
three times (502 KiB each, from the L2 cache); about 60 operations per token. Most of the time is spent waiting for
memory, so every kernel issues all of its loads before it computes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_sampling import check_counts
from .launch import cdiv, check, check_activation, jit, next_power_of_2, options
from .sample_search import NUMBERS, clear_search, find_thresholds, mean_of, of_row, read_moments, read_thresholds
from .sample_weights import (
    INF,
    LARGEST,
    LOW32,
    UNIT,
    best_of,
    kept_weight,
    read_least_weight,
    read_maxima,
    read_sharpness,
    share_of,
    typical_key,
    weight_of,
)

# Tokens per program: 8 per thread.
BLOCK = 1024
BLOCK_WARPS = 4


@triton.jit
def _sum_of(x):
    """The sum of x >= 0, in units of 2^-40, as float32; NaN if x has one.

    It sums integers, since the order of a sum of floats would depend on the layout that the compiler chooses for x.
    """
    total = tl.sum((x * UNIT).to(tl.int64), axis=0).to(tl.float32) / UNIT
    return tl.where(tl.max((x != x).to(tl.int32), axis=0) > 0, float("nan"), total)


@jit(
    "logits_ptr bias_ptr prompt_counts_ptr output_counts_ptr x_ptr V logits_stride bias_stride "
    "prompt_counts_stride output_counts_stride"
)
def _penalize(
    logits_ptr, bias_ptr, repetition_ptr, frequency_ptr, presence_ptr, prompt_counts_ptr, output_counts_ptr,
    allowed_ptr, drafts_ptr, x_ptr, best_ptr, first_ptr, peak_ptr, spread_ptr, search_ptr,
    V, K, logits_stride, bias_stride, prompt_counts_stride, output_counts_stride, allowed_stride, drafts_stride,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < V
    sequence = row if drafts_ptr is None else (tl.program_id(0) // K).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=-INF).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + sequence * bias_stride + token, mask=inside, other=0.0)
    generated = tl.zeros_like(token)
    if output_counts_ptr is not None:
        generated = tl.load(output_counts_ptr + sequence * output_counts_stride + token, mask=inside, other=0)
    if drafts_ptr is not None:
        for draft in range(1, tl.program_id(0) % K + 1):
            drafted = tl.load(drafts_ptr + sequence * drafts_stride + draft)
            generated += (token == drafted).to(tl.int32)
    seen = generated
    if repetition_ptr is not None:
        penalty = tl.load(repetition_ptr + row)
        if prompt_counts_ptr is not None:
            seen |= tl.load(prompt_counts_ptr + sequence * prompt_counts_stride + token, mask=inside, other=0)
    if frequency_ptr is not None:
        frequency = tl.load(frequency_ptr + row)
    if presence_ptr is not None:
        presence = tl.load(presence_ptr + row)
    if allowed_ptr is not None:
        word = tl.load(allowed_ptr + sequence * allowed_stride + token // 32, mask=inside, other=0)
    partial = row * blocks + block
    peak = tl.maximum(tl.max(x, axis=0), -LARGEST)
    tl.store(peak_ptr + partial, peak)
    tl.store(spread_ptr + partial, _sum_of(tl.exp(x - peak)))
    if bias_ptr is not None:
        x += bias
    if repetition_ptr is not None:
        x = tl.where(seen > 0, tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + penalty), x * penalty), x)
    if frequency_ptr is not None:
        x -= frequency * generated.to(tl.float32)
    if presence_ptr is not None:
        x -= presence * (generated > 0).to(tl.float32)
    x = tl.minimum(tl.where(x == x, x, -INF), LARGEST)
    if allowed_ptr is not None:
        x = tl.where(((word >> (token % 32)) & 1) != 0, x, -INF)
    tl.store(x_ptr + row * V + token, x, mask=inside)
    best, first = tl.max(x, axis=0, return_indices=True)
    tl.store(best_ptr + partial, best)
    tl.store(first_ptr + partial, block * BLOCK + first)
    if search_ptr is not None and block == 0:
        clear_search(of_row(search_ptr, row))


@jit("x_ptr V")
def _add_up(
    x_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr, search_ptr, mass_ptr,
    V, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sets x to -inf where a filter drops the token, and sums the weights of the other tokens of each block."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * V + token, mask=token < V, other=-INF)
    maxima = read_maxima(best_ptr, row, blocks, BLOCKS)
    sharpness, least_weight = read_sharpness(temperature_ptr, row), read_least_weight(min_p_ptr, row)
    floor = tl.full((), 0, tl.int64)
    if search_ptr is not None:
        search_ptr = of_row(search_ptr, row)
        total, moment = read_moments(search_ptr)
        floor, typical_floor = read_thresholds(search_ptr, top_k_ptr, top_p_ptr, typical_p_ptr, row, V)
    best = best_of(maxima)
    weight = kept_weight(x, best, sharpness, floor, least_weight)
    if typical_p_ptr is not None:
        weight = tl.where(typical_key(x, best, sharpness, mean_of(total, moment)) >= typical_floor, weight, 0)
    tl.store(mass_ptr + row * blocks + block, tl.sum(weight, axis=0))
    tl.store(x_ptr + row * V + token, tl.where(weight > 0, x, -INF), mask=token < V)


@jit("x_ptr V")
def _pick(
    logits_ptr, x_ptr, best_ptr, first_ptr, peak_ptr, spread_ptr, temperature_ptr, mass_ptr,
    seed_ptr, stream_ptr, position_ptr, token_ptr, logprob_ptr,
    V, blocks, logits_stride, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    at = tl.arange(0, BLOCKS)
    maxima = read_maxima(best_ptr, row, blocks, BLOCKS)
    firsts = tl.load(first_ptr + row * blocks + at, mask=at < blocks, other=0)
    peaks = tl.load(peak_ptr + row * blocks + at, mask=at < blocks, other=-INF)
    spread = tl.load(spread_ptr + row * blocks + at, mask=at < blocks, other=0.0)
    if temperature_ptr is not None:
        mass = tl.load(mass_ptr + row * blocks + at, mask=at < blocks, other=0)
        temperature, sharpness = tl.load(temperature_ptr + row), read_sharpness(temperature_ptr, row)
        seed, stream = tl.load(seed_ptr + row), tl.load(stream_ptr + row)
        position = tl.load(position_ptr + row).to(tl.int64)
        random, _, _, _ = tl.philox(
            seed,
            (position & LOW32).to(tl.uint32),
            ((position >> 32) & LOW32).to(tl.uint32),
            (stream & LOW32).to(tl.uint32),
            ((stream >> 32) & LOW32).to(tl.uint32),
        )
        total = tl.sum(mass, axis=0)
        point = share_of(total, (random >> 1).to(tl.int64))  # 31 of the 32 bits
        # The block, then the token, at which the cumulative mass first exceeds the point.
        before = tl.cumsum(mass, axis=0) <= point
        block = tl.sum(before.to(tl.int32), axis=0)
        within = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * V + within, mask=within < V, other=-INF)
        point -= tl.sum(tl.where(before, mass, 0), axis=0)
        weight = weight_of((x - best_of(maxima)) * sharpness)
        sampled = block * BLOCK + tl.sum((tl.cumsum(weight, axis=0) <= point).to(tl.int32), axis=0)
        greedy = (temperature == 0) | (total == 0)
    _, best_block = tl.max(maxima, axis=0, return_indices=True)
    token = tl.sum(tl.where(at == best_block, firsts, 0), axis=0)
    if temperature_ptr is not None:
        token = tl.where(greedy, token, sampled)
    token = tl.where(tl.max(maxima, axis=0) == -INF, -1, token)
    logit = tl.load(logits_ptr + row * logits_stride + token, mask=token >= 0, other=-INF).to(tl.float32)
    tl.store(token_ptr + row, token.to(tl.int64))
    peak = tl.max(peaks, axis=0)
    log_total = tl.log(_sum_of(spread * tl.exp(peaks - peak)))
    tl.store(logprob_ptr + row, logit - peak - log_total)


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    typical_p: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    prompt_counts: Tensor | None = None,
    output_counts: Tensor | None = None,
    logit_bias: Tensor | None = None,
    allowed: Tensor | None = None,
    drafts: Tensor | None = None,
    seed: Tensor,
    stream: Tensor,
    position: Tensor,
    few_candidates: bool = False,
) -> tuple[Tensor, Tensor]:
    """`reference_sampling.sample`: the same tokens, and log-probabilities within a few float32 ulp.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or stride.
    """
    check_activation("logits", logits, -1, -1)
    rows, vocab = logits.shape
    device = logits.device
    words = cdiv(vocab, 32)
    rows_of_each = 1 if drafts is None else drafts.shape[-1]
    sequences = rows // rows_of_each
    for name, x, dtype, shape in (
        ("temperature", temperature, torch.float32, (rows,)),
        ("top_k", top_k, torch.int64, (rows,)),
        ("top_p", top_p, torch.float32, (rows,)),
        ("min_p", min_p, torch.float32, (rows,)),
        ("typical_p", typical_p, torch.float32, (rows,)),
        ("repetition_penalty", repetition_penalty, torch.float32, (rows,)),
        ("presence_penalty", presence_penalty, torch.float32, (rows,)),
        ("frequency_penalty", frequency_penalty, torch.float32, (rows,)),
        ("prompt_counts", prompt_counts, torch.int32, (sequences, vocab)),
        ("output_counts", output_counts, torch.int32, (sequences, vocab)),
        ("logit_bias", logit_bias, torch.float32, (sequences, vocab)),
        ("allowed", allowed, torch.int32, (sequences, words)),
        ("drafts", drafts, torch.int64, (sequences, rows_of_each)),
        ("seed", seed, torch.int64, (rows,)),
        ("stream", stream, torch.int64, (rows,)),
        ("position", position, torch.int32 if position.dtype == torch.int32 else torch.int64, (rows,)),
    ):
        if x is not None:
            check(name, x, dtype, device, *shape)
    check_counts(repetition_penalty, presence_penalty, frequency_penalty, prompt_counts, output_counts)

    blocks = cdiv(vocab, BLOCK)
    token = torch.empty(rows, dtype=torch.int64, device=device)
    logprob = torch.empty(rows, dtype=torch.float32, device=device)
    x = torch.empty((rows, vocab), dtype=torch.float32, device=device)
    # For each block: the largest x, the logits' maximum and sum of exponentials; the first token with the largest x.
    best, peak, spread = torch.empty((3, rows, blocks), dtype=torch.float32, device=device)
    first = torch.empty((rows, blocks), dtype=torch.int32, device=device)
    filters = (temperature, top_k, top_p, min_p, typical_p)
    searches = temperature is not None and any(p is not None for p in (top_k, top_p, typical_p))
    search = torch.empty((rows, NUMBERS), dtype=torch.int64, device=device) if searches else None
    mass = torch.empty((rows, blocks), dtype=torch.int64, device=device) if temperature is not None else None

    def stride(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.stride(0)

    per_block = {"BLOCK": BLOCK, "num_warps": BLOCK_WARPS, **options(device)}
    all_blocks = {"BLOCKS": next_power_of_2(blocks)}
    _penalize[(rows, blocks)](
        logits, logit_bias, repetition_penalty, frequency_penalty, presence_penalty, prompt_counts, output_counts,
        allowed, drafts, x, best, first, peak, spread, search,
        vocab, rows_of_each, logits.stride(0), stride(logit_bias), stride(prompt_counts), stride(output_counts),
        stride(allowed), stride(drafts), **per_block,
    )  # fmt: skip
    if search is not None:
        find_thresholds(x, best, *filters, search, BLOCK, few_candidates)
    if temperature is not None:
        _add_up[(rows, blocks)](x, best, *filters, search, mass, vocab, **per_block, **all_blocks)
    _pick[(rows,)](
        logits, x, best, first, peak, spread, temperature, mass, seed, stream, position,
        token, logprob, vocab, blocks, logits.stride(0), **per_block, **all_blocks,
    )  # fmt: skip
    return token, logprob
