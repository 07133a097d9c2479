"""Sampling: one token per row of logits. What each stage means stands in `sampling_reference`, and holds bit by bit.

The chain of launches, each over all rows at once:

    _penalize     [B, blocks]   bias, penalties, mask -> x; per block its maximum, and the logits' softmax statistics
    _collect      [B, blocks]   the candidates: tokens that may stand at a threshold    } only where top-k, top-p
    _find_floors  [B]           radix search of the thresholds among the candidates     } or typical-p is on
    _add_up       [B, blocks]   mass of the kept tokens per block                       (not in a greedy batch)
    _pick         [B]           the block that holds the random point, the token in it, its log-probability

Masses are integers, so neither the order of additions nor that of the candidates, which an atomic counter gives out,
can change a result. The only arithmetic that decides is float32 rounded once per operation; division is `div_rn`.

InternLM3-8B (V = 128512, 126 blocks), per row: the logits once (251 KiB in 16 bits), x written once and read up to
three times (502 KiB each, from the L2 cache); about 60 operations per token. A top-k of at most as many tokens as there
are blocks, or a top-p alone, leaves few candidates; a larger top-k or typical-p alone searches the whole row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, check, check_activation, jit, next_power_of_2, options
from .sampling_reference import EXP2_COEFFICIENTS, FLOAT32_MAX, LOG2_E, MASK32, SHARE_BITS, UNIT_BITS, check_counts

# Tokens of one program: 8 a thread.
BLOCK = 1024
BLOCK_WARPS = 4
# The search reads so many candidates at once and compares each with 16 thresholds.
CHUNK = 1024
SEARCH_WARPS = 8

_UNIT = tl.constexpr(2**UNIT_BITS)
_UNIT_EXPONENT = tl.constexpr(127 + UNIT_BITS)  # of a float32
_SHARE_BITS = tl.constexpr(SHARE_BITS)
_WHOLE = tl.constexpr(2**SHARE_BITS)
_FLOAT32_MAX = tl.constexpr(FLOAT32_MAX)
_LOG2_E = tl.constexpr(LOG2_E)
_MASK32 = tl.constexpr(MASK32)
_C5, _C4, _C3, _C2, _C1, _C0 = (tl.constexpr(c) for c in EXP2_COEFFICIENTS)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _order_key(x):
    """int64 in [0, 2^32) that order as float32 does; -0.0 is 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def _share(total, share):
    """floor(total * share / 2^31) of int64."""
    low = total & (_WHOLE - 1)
    return (total >> _SHARE_BITS) * share + ((low * share) >> _SHARE_BITS)


@triton.jit
def _fraction(value):
    """A fraction in [0, 1] as a multiple of 2^-31."""
    return (value * _WHOLE).to(tl.int64)


@triton.jit
def _weight(scaled):
    """floor(2^40 * 2^scaled), int64."""
    scaled = tl.maximum(scaled, -63.0)
    whole = tl.floor(scaled)
    f = scaled - whole
    power = ((((f * _C5 + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _C0
    scale = ((whole.to(tl.int32) + _UNIT_EXPONENT) << 23).to(tl.float32, bitcast=True)
    return (power * scale).to(tl.int64)


@triton.jit
def _best(best_ptr, row, blocks, BLOCKS: tl.constexpr):
    """The row's largest x, made finite, and its first token."""
    block = tl.arange(0, BLOCKS)
    maxima = tl.load(best_ptr + row * blocks + block, mask=block < blocks, other=-_INF)
    best, index = tl.max(maxima, axis=0, return_indices=True)
    return tl.maximum(best, -_FLOAT32_MAX), index


@triton.jit
def _sharpness(temperature_ptr, row):
    """Bits of weight per unit of logit; at temperature 0 so many that the maxima alone have any."""
    return tl.minimum(tl.div_rn(1.0, tl.load(temperature_ptr + row)) * _LOG2_E, _FLOAT32_MAX)


@triton.jit
def _least_weight(min_p_ptr, row):
    if min_p_ptr is None:
        return tl.full((), 0, tl.int64)
    else:
        return (tl.load(min_p_ptr + row) * _UNIT).to(tl.int64)


@triton.jit
def _kept(x, best, sharpness, floor, least_weight, mean, typical_floor, TYPICAL: tl.constexpr):
    """Weights of a tile of x, 0 where a filter drops the token."""
    scaled = (x - best) * sharpness
    weight = _weight(scaled)
    keep = (_order_key(x) >= floor) & (weight >= least_weight)
    if TYPICAL:
        keep = keep & (_MASK32 - _order_key(tl.abs(scaled - mean)) >= typical_floor)
    return tl.where(keep, weight, 0)


@jit(
    "logits_ptr bias_ptr prompt_counts_ptr output_counts_ptr x_ptr V logits_stride bias_stride "
    "prompt_counts_stride output_counts_stride"
)
def _penalize(
    logits_ptr, bias_ptr, repetition_ptr, frequency_ptr, presence_ptr, prompt_counts_ptr, output_counts_ptr,
    allowed_ptr, x_ptr, best_ptr, first_ptr, peak_ptr, spread_ptr, candidate_count_ptr,
    V, logits_stride, bias_stride, prompt_counts_stride, output_counts_stride, allowed_stride,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < V
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=-_INF).to(tl.float32)
    partial = row * blocks + block
    peak = tl.maximum(tl.max(x, axis=0), -_FLOAT32_MAX)
    tl.store(peak_ptr + partial, peak)
    tl.store(spread_ptr + partial, tl.sum(tl.exp(x - peak), axis=0))
    if bias_ptr is not None:
        x += tl.load(bias_ptr + row * bias_stride + token, mask=inside, other=0.0)
    generated = tl.zeros_like(token)
    if output_counts_ptr is not None:
        generated = tl.load(output_counts_ptr + row * output_counts_stride + token, mask=inside, other=0)
    if repetition_ptr is not None:
        seen = generated > 0
        if prompt_counts_ptr is not None:
            prompt = tl.load(prompt_counts_ptr + row * prompt_counts_stride + token, mask=inside, other=0)
            seen = seen | (prompt > 0)
        penalty = tl.load(repetition_ptr + row)
        x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + penalty), x * penalty), x)
    if frequency_ptr is not None:
        x -= tl.load(frequency_ptr + row) * generated.to(tl.float32)
    if presence_ptr is not None:
        x -= tl.load(presence_ptr + row) * (generated > 0).to(tl.float32)
    x = tl.minimum(tl.where(x == x, x, -_INF), _FLOAT32_MAX)
    if allowed_ptr is not None:
        word = tl.load(allowed_ptr + row * allowed_stride + token // 32, mask=inside, other=0)
        x = tl.where(((word >> (token % 32)) & 1) != 0, x, -_INF)
    tl.store(x_ptr + row * V + token, x, mask=inside)
    best, first = tl.max(x, axis=0, return_indices=True)
    tl.store(best_ptr + partial, best)
    tl.store(first_ptr + partial, block * BLOCK + first)
    if candidate_count_ptr is not None and block == 0:
        tl.store(candidate_count_ptr + row, 0)


@jit("x_ptr V")
def _collect(
    x_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, typical_p_ptr, candidate_ptr, candidate_count_ptr, mass_ptr,
    V, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copies the tokens among which the thresholds lie, and adds up all weights of each block.

    A top-k threshold is at least the k-th largest of the blocks' maxima. A top-p threshold leaves out a mass of
    (1 - p) * 2^40 at least, more than all tokens under (1 - p) * 2^40 / 2V together.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    best, _ = _best(best_ptr, row, blocks, BLOCKS)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < V
    x = tl.load(x_ptr + row * V + token, mask=inside, other=-_INF)
    weight = _weight((x - best) * _sharpness(temperature_ptr, row))
    tl.store(mass_ptr + row * blocks + block, tl.sum(weight, axis=0))
    least_x = _INF
    least_weight = tl.full((), 0, tl.int64)
    if typical_p_ptr is not None:
        least_x = tl.where(tl.load(typical_p_ptr + row) < 1, -_INF, _INF)
    if top_p_ptr is not None:
        share = _fraction(tl.load(top_p_ptr + row))
        if share < _WHOLE:
            least_x = -_INF
            least_weight = (_WHOLE - share) * (_UNIT // _WHOLE) // (2 * V)
    if top_k_ptr is not None:
        k = tl.load(top_k_ptr + row)
        if (k > 0) & (k < V):
            at = tl.arange(0, BLOCKS)
            maxima = tl.load(best_ptr + row * blocks + at, mask=at < blocks, other=-_INF)
            rank = tl.sum((maxima[None, :] >= maxima[:, None]).to(tl.int32), axis=1)
            # -inf where there are fewer blocks than k.
            least_x = tl.max(tl.where((rank >= k) & (rank <= blocks), maxima, -_INF), axis=0)
            least_weight = tl.full((), 0, tl.int64)
    chosen = inside & (x >= least_x) & (weight >= least_weight)
    count = tl.sum(chosen.to(tl.int32), axis=0)
    if count > 0:
        start = tl.atomic_add(candidate_count_ptr + row, count, sem="relaxed")
        slot = start + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(candidate_ptr + row * V + slot, x, mask=chosen)


@triton.jit
def _search(
    x_ptr, count, target, best, sharpness, floor, least_weight, mean,
    WEIGHTED: tl.constexpr, TYPICAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The largest key t such that the tokens of keys >= t weigh `target` at least; four bits of t in a pass."""
    prefix = tl.full((), 0, tl.int64)
    digits = tl.arange(0, 16).to(tl.int64)
    for step in range(8):
        shift = 28 - 4 * step
        bounds = prefix + (digits << shift)
        mass = tl.zeros_like(bounds)
        for start in range(0, count, CHUNK):
            at = start + tl.arange(0, CHUNK)
            x = tl.load(x_ptr + at, mask=at < count, other=-_INF)
            if WEIGHTED:
                weight = _kept(x, best, sharpness, floor, least_weight, 0.0, 0, TYPICAL=False)
            else:
                weight = (at < count).to(tl.int64)
            if TYPICAL:
                key = _MASK32 - _order_key(tl.abs((x - best) * sharpness - mean))
            else:
                key = _order_key(x)
            mass += tl.sum(tl.where(key[None, :] >= bounds[:, None], weight[None, :], 0), axis=1)
        # The mass falls as the digit rises, and suffices at digit 0.
        digit = tl.sum((mass >= target).to(tl.int32), axis=0) - 1
        prefix += tl.maximum(digit, 0).to(tl.int64) << shift
    return prefix


@jit("candidate_ptr V")
def _find_floors(
    best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr,
    candidate_ptr, candidate_count_ptr, mass_ptr, floor_ptr, mean_ptr,
    V, blocks, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Per row the keys that a kept token reaches: of x, and of its distance from the mean surprise (typical-p)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    best, _ = _best(best_ptr, row, blocks, BLOCKS)
    sharpness = _sharpness(temperature_ptr, row)
    count = tl.load(candidate_count_ptr + row)
    x_ptr = candidate_ptr + row * V
    zero = tl.full((), 0, tl.int64)
    floor = zero
    block = tl.arange(0, BLOCKS)
    total = tl.sum(tl.load(mass_ptr + row * blocks + block, mask=block < blocks, other=0), axis=0)
    if top_k_ptr is not None:
        k = tl.load(top_k_ptr + row)
        if (k > 0) & (k < V):
            floor = _search(x_ptr, count, k, best, sharpness, zero, zero, 0.0, False, False, CHUNK)
            total = zero
            for start in range(0, count, CHUNK):
                at = start + tl.arange(0, CHUNK)
                x = tl.load(x_ptr + at, mask=at < count, other=-_INF)
                total += tl.sum(_kept(x, best, sharpness, floor, zero, 0.0, zero, TYPICAL=False), axis=0)
    if top_p_ptr is not None:
        share = _fraction(tl.load(top_p_ptr + row))
        if share < _WHOLE:
            target = tl.maximum(_share(total, share), 1)
            floor = _search(x_ptr, count, target, best, sharpness, floor, zero, 0.0, True, False, CHUNK)
    tl.store(floor_ptr + row * 2, floor)
    if typical_p_ptr is not None:
        share = _fraction(tl.load(typical_p_ptr + row))
        mean = 0.0
        typical_floor = zero
        if share < _WHOLE:
            least_weight = _least_weight(min_p_ptr, row)
            total = zero
            moment = zero
            for start in range(0, count, CHUNK):
                at = start + tl.arange(0, CHUNK)
                x = tl.load(x_ptr + at, mask=at < count, other=-_INF)
                weight = _kept(x, best, sharpness, floor, least_weight, 0.0, zero, TYPICAL=False)
                scaled = tl.maximum((x - best) * sharpness, -63.0)
                total += tl.sum(weight, axis=0)
                moment += tl.sum((scaled * weight.to(tl.float32)).to(tl.int64), axis=0)
            mean = tl.div_rn(moment.to(tl.float32), tl.maximum(total, 1).to(tl.float32))
            target = tl.maximum(_share(total, share), 1)
            typical_floor = _search(x_ptr, count, target, best, sharpness, floor, least_weight, mean, True, True, CHUNK)
        tl.store(floor_ptr + row * 2 + 1, typical_floor)
        tl.store(mean_ptr + row, mean)


@triton.jit
def _block_weights(
    x_ptr, best, temperature_ptr, min_p_ptr, floor_ptr, mean_ptr, row, block, V,
    BLOCK: tl.constexpr, TYPICAL: tl.constexpr,
):  # fmt: skip
    """The kept weights of one block."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * V + token, mask=token < V, other=-_INF)
    floor = tl.full((), 0, tl.int64)
    typical_floor = floor
    mean = 0.0
    if floor_ptr is not None:
        floor = tl.load(floor_ptr + row * 2)
    if TYPICAL:
        typical_floor = tl.load(floor_ptr + row * 2 + 1)
        mean = tl.load(mean_ptr + row)
    sharpness, least_weight = _sharpness(temperature_ptr, row), _least_weight(min_p_ptr, row)
    return _kept(x, best, sharpness, floor, least_weight, mean, typical_floor, TYPICAL)


@jit("x_ptr V")
def _add_up(
    x_ptr, best_ptr, temperature_ptr, min_p_ptr, floor_ptr, mean_ptr, mass_ptr,
    V, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TYPICAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    best, _ = _best(best_ptr, row, blocks, BLOCKS)
    weight = _block_weights(x_ptr, best, temperature_ptr, min_p_ptr, floor_ptr, mean_ptr, row, block, V, BLOCK, TYPICAL)
    tl.store(mass_ptr + row * blocks + block, tl.sum(weight, axis=0))


@jit("x_ptr V")
def _pick(
    logits_ptr, x_ptr, best_ptr, first_ptr, peak_ptr, spread_ptr, temperature_ptr, min_p_ptr, floor_ptr, mean_ptr,
    mass_ptr, seed_ptr, stream_ptr, position_ptr, token_ptr, logprob_ptr,
    V, blocks, logits_stride, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TYPICAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    best, best_block = _best(best_ptr, row, blocks, BLOCKS)
    token = tl.load(first_ptr + row * blocks + best_block)
    at = tl.arange(0, BLOCKS)
    if temperature_ptr is not None:
        mass = tl.load(mass_ptr + row * blocks + at, mask=at < blocks, other=0)
        total = tl.sum(mass, axis=0)
        if (tl.load(temperature_ptr + row) != 0) & (total > 0):
            seed, stream = tl.load(seed_ptr + row), tl.load(stream_ptr + row)
            position = tl.load(position_ptr + row).to(tl.int64)
            random, _, _, _ = tl.philox(
                seed,
                (position & _MASK32).to(tl.uint32),
                ((position >> 32) & _MASK32).to(tl.uint32),
                (stream & _MASK32).to(tl.uint32),
                ((stream >> 32) & _MASK32).to(tl.uint32),
            )
            point = _share(total, (random >> 1).to(tl.int64))  # 31 of the 32 bits
            # The block, then the token, at which the running mass first exceeds the point.
            before = tl.cumsum(mass, axis=0) <= point
            block = tl.sum(before.to(tl.int32), axis=0)
            point -= tl.sum(tl.where(before, mass, 0), axis=0)
            weight = _block_weights(
                x_ptr, best, temperature_ptr, min_p_ptr, floor_ptr, mean_ptr, row, block, V, BLOCK, TYPICAL
            )
            token = block * BLOCK + tl.sum((tl.cumsum(weight, axis=0) <= point).to(tl.int32), axis=0)
    tl.store(token_ptr + row, token.to(tl.int64))
    peaks = tl.load(peak_ptr + row * blocks + at, mask=at < blocks, other=-_INF)
    peak = tl.max(peaks, axis=0)
    spread = tl.load(spread_ptr + row * blocks + at, mask=at < blocks, other=0.0)
    log_total = tl.log(tl.sum(spread * tl.exp(peaks - peak), axis=0))
    logit = tl.load(logits_ptr + row * logits_stride + token).to(tl.float32)
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
    seed: Tensor,
    stream: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """`sampling_reference.sample`: the same tokens; log-probabilities to a few units of float32's last place.

    Raises TypeError for a dtype, ValueError for a shape, device or stride that the kernels cannot take.
    """
    check_activation("logits", logits, -1, -1)
    rows, vocab = logits.shape
    device = logits.device
    words = cdiv(vocab, 32)
    for name, x, dtype, shape in (
        ("temperature", temperature, torch.float32, (rows,)),
        ("top_k", top_k, torch.int64, (rows,)),
        ("top_p", top_p, torch.float32, (rows,)),
        ("min_p", min_p, torch.float32, (rows,)),
        ("typical_p", typical_p, torch.float32, (rows,)),
        ("repetition_penalty", repetition_penalty, torch.float32, (rows,)),
        ("presence_penalty", presence_penalty, torch.float32, (rows,)),
        ("frequency_penalty", frequency_penalty, torch.float32, (rows,)),
        ("prompt_counts", prompt_counts, torch.int32, (rows, vocab)),
        ("output_counts", output_counts, torch.int32, (rows, vocab)),
        ("logit_bias", logit_bias, torch.float32, (rows, vocab)),
        ("allowed", allowed, torch.int32, (rows, words)),
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
    # Per block: the largest x, the logits' maximum and the sum of their exponentials; the first token of the largest x.
    best, peak, spread = torch.empty((3, rows, blocks), dtype=torch.float32, device=device)
    first = torch.empty((rows, blocks), dtype=torch.int32, device=device)
    searches = temperature is not None and any(p is not None for p in (top_k, top_p, typical_p))
    candidate = torch.empty((rows, vocab), dtype=torch.float32, device=device) if searches else None
    candidate_count = torch.empty(rows, dtype=torch.int32, device=device) if searches else None
    floor = torch.empty((rows, 2), dtype=torch.int64, device=device) if searches else None
    mean = torch.empty(rows, dtype=torch.float32, device=device) if searches else None
    mass = torch.empty((rows, blocks), dtype=torch.int64, device=device) if temperature is not None else None

    def stride(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.stride(0)

    per_block = {"BLOCK": BLOCK, "num_warps": BLOCK_WARPS, **options(device)}
    per_row = {"BLOCKS": next_power_of_2(blocks), **options(device)}
    typical = {"TYPICAL": searches and typical_p is not None}
    _penalize[(rows, blocks)](
        logits, logit_bias, repetition_penalty, frequency_penalty, presence_penalty, prompt_counts, output_counts,
        allowed, x, best, first, peak, spread, candidate_count,
        vocab, logits.stride(0), stride(logit_bias), stride(prompt_counts), stride(output_counts), stride(allowed),
        **per_block,
    )  # fmt: skip
    if searches:
        _collect[(rows, blocks)](
            x, best, temperature, top_k, top_p, typical_p, candidate, candidate_count, mass,
            vocab, **per_block | per_row,
        )  # fmt: skip
        _find_floors[(rows,)](
            best, temperature, top_k, top_p, min_p, typical_p, candidate, candidate_count, mass, floor, mean,
            vocab, blocks, CHUNK=CHUNK, num_warps=SEARCH_WARPS, **per_row,
        )  # fmt: skip
    if temperature is not None:
        _add_up[(rows, blocks)](
            x, best, temperature, min_p, floor, mean, mass, vocab, **per_block | per_row | typical
        )  # fmt: skip
    _pick[(rows,)](
        logits, x, best, first, peak, spread, temperature, min_p, floor, mean, mass, seed, stream, position,
        token, logprob, vocab, blocks, logits.stride(0), **per_block | per_row | typical,
    )  # fmt: skip
    return token, logprob
