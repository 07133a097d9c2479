"""Sampling: one token per row of logits. What each stage means stands in `sampling_reference`, and holds bit by bit.

The chain of launches, each over all rows at once:

    _penalize     [B, blocks]   bias, penalties, mask -> x; per block its maximum, and the logits' softmax statistics
    _collect      [B, blocks]   the candidates: tokens that may stand at a threshold
    _narrow       [B, chunks]   eight for each of top-k, top-p and typical-p: four bits of its threshold each
    _add_up       [B, blocks]   mass of the kept tokens per block                       (not in a greedy batch)
    _pick         [B]           the block that holds the random point, the token in it, its log-probability

Masses are integers, so neither the order of additions nor that of the candidates, which an atomic counter gives out,
can change a result. The only arithmetic that decides is float32 rounded once per operation; division is `div_rn`.

InternLM3-8B (V = 128512, 126 blocks), per row: the logits once (251 KiB in 16 bits), x written once and read up to
three times (502 KiB each, from the L2 cache); about 60 operations per token. Most of the time is spent waiting, so
every kernel asks for all it needs before it computes. A top-k of up to `FEW_TOKENS` leaves about a hundred candidates,
which `_narrow_few` searches for top-k and top-p in one launch; top-p alone leaves some thousands, typical-p alone all.
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
# Candidates of one program of a search: of one of many, and of the only one that a row has.
CHUNK = 1024
CHUNK_WARPS = 4
FEW = 128
# A search settles the threshold's 32 bits from the highest on: so many in a pass.
DIGIT_BITS = 4
PASSES = 8
SEARCHES = ("top_k", "top_p", "typical_p")

_UNIT = tl.constexpr(2**UNIT_BITS)
_UNIT_EXPONENT = tl.constexpr(127 + UNIT_BITS)  # of a float32
_SHARE_BITS = tl.constexpr(SHARE_BITS)
_WHOLE = tl.constexpr(2**SHARE_BITS)
_FLOAT32_MAX = tl.constexpr(FLOAT32_MAX)
_LOG2_E = tl.constexpr(LOG2_E)
_MASK32 = tl.constexpr(MASK32)
_C5, _C4, _C3, _C2, _C1, _C0 = (tl.constexpr(c) for c in EXP2_COEFFICIENTS)
_INF = tl.constexpr(float("inf"))

TOP_K, TOP_P, TYPICAL_P = (tl.constexpr(search) for search in range(len(SEARCHES)))
_PASSES = tl.constexpr(PASSES)
_DIGIT_BITS = tl.constexpr(DIGIT_BITS)
_DIGITS = tl.constexpr(2**DIGIT_BITS)
_HALF_BITS = tl.constexpr(UNIT_BITS // 2)
_HALF = tl.constexpr(2 ** (UNIT_BITS // 2) - 1)
# A row's numbers, int64: by search and pass the mass of each digit, and the bits and the target that the pass began
# with; how many candidates there are; what they weigh, and the moment, for typical-p.
_MASSES = len(SEARCHES) * PASSES * 2**DIGIT_BITS
_BEGUN = tl.constexpr(_MASSES)
_COUNT = tl.constexpr(_MASSES + 2 * len(SEARCHES) * PASSES)
_TOTAL = tl.constexpr(_COUNT.value + 1)
_MOMENT = tl.constexpr(_COUNT.value + 2)
NUMBERS = _COUNT.value + 3
_NUMBERS = tl.constexpr(NUMBERS)
_NUMBERS_PADDED = tl.constexpr(next_power_of_2(NUMBERS))


@triton.jit
def _first_mass(search, step):
    return (search * _PASSES + step) * _DIGITS


@triton.jit
def _begun(search, step):
    return _BEGUN + 2 * (search * _PASSES + step)


@triton.jit
def _shift(step):
    """Where a pass' digit stands in a key."""
    return (_PASSES - 1 - step) * _DIGIT_BITS


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
def _maxima(best_ptr, row, blocks, BLOCKS: tl.constexpr):
    """The largest x of each block."""
    block = tl.arange(0, BLOCKS)
    return tl.load(best_ptr + row * blocks + block, mask=block < blocks, other=-_INF)


@triton.jit
def _best(maxima):
    """The row's largest x, made finite."""
    return tl.maximum(tl.max(maxima, axis=0), -_FLOAT32_MAX)


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
def _typical_key(x, best, sharpness, mean):
    """Keys that fall as the distance from the mean surprise grows."""
    return _order_key(tl.abs((x - best) * sharpness - mean)) ^ _MASK32


@triton.jit
def _kept(x, best, sharpness, floor, least_weight):
    """Weights of a tile of x, 0 where top-k, top-p or min-p drops the token."""
    weight = _weight((x - best) * sharpness)
    return tl.where((_order_key(x) >= floor) & (weight >= least_weight), weight, 0)


@jit(
    "logits_ptr bias_ptr prompt_counts_ptr output_counts_ptr x_ptr V logits_stride bias_stride "
    "prompt_counts_stride output_counts_stride"
)
def _penalize(
    logits_ptr, bias_ptr, repetition_ptr, frequency_ptr, presence_ptr, prompt_counts_ptr, output_counts_ptr,
    allowed_ptr, x_ptr, best_ptr, first_ptr, peak_ptr, spread_ptr, search_ptr,
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
    if search_ptr is not None and block == 0:
        at = tl.arange(0, _NUMBERS_PADDED)
        tl.store(search_ptr + row * _NUMBERS + at, tl.zeros_like(at).to(tl.int64), mask=at < _NUMBERS)


@jit("x_ptr V")
def _collect(
    x_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, typical_p_ptr, candidate_ptr, search_ptr,
    V, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copies the tokens among which the thresholds lie.

    A top-k threshold is at least the k-th largest of the blocks' maxima. A top-p threshold leaves out a mass of
    (1 - p) * 2^40 at least, more than all tokens under (1 - p) * 2^40 / 2V together; what they weigh counts among the
    smallest candidates, since the whole is what p is a part of.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    search_ptr += row * _NUMBERS
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < V
    x = tl.load(x_ptr + row * V + token, mask=inside, other=-_INF)
    maxima = _maxima(best_ptr, row, blocks, BLOCKS)
    sharpness = _sharpness(temperature_ptr, row)
    k, share = _goal(top_k_ptr, row, V, TOP_K), _goal(top_p_ptr, row, V, TOP_P)
    typical = _goal(typical_p_ptr, row, V, TYPICAL_P)
    weight = _weight((x - _best(maxima)) * sharpness)
    least_x = tl.where((share >= 0) | (typical >= 0), -_INF, _INF)
    least_weight = tl.where(share >= 0, (_WHOLE - share) * (_UNIT // _WHOLE) // (2 * V), 0)
    if top_k_ptr is not None:
        # Again from memory, in a second layout.
        at = tl.arange(0, BLOCKS)
        others = tl.load(best_ptr + row * blocks + at, mask=at < blocks, other=-_INF)
        rank = tl.sum((others[None, :] >= others[:, None]).to(tl.int32), axis=1)
        # -inf where there are fewer blocks than k.
        of_k = tl.max(tl.where((rank >= k) & (rank <= blocks), others, -_INF), axis=0)
        least_x = tl.where(k >= 0, of_k, least_x)
        least_weight = tl.where(k >= 0, 0, least_weight)
    chosen = inside & (x >= least_x) & (weight >= least_weight)
    count = tl.sum(chosen.to(tl.int64), axis=0)
    if count > 0:
        start = tl.atomic_add(search_ptr + _COUNT, count, sem="relaxed")
        slot = start + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(candidate_ptr + row * V + slot, x, mask=chosen)
    if (share >= 0) & (k < 0):
        tl.atomic_add(search_ptr + _first_mass(TOP_P, 0), tl.sum(tl.where(chosen, 0, weight), axis=0), sem="relaxed")


@triton.jit
def _goal(setting_ptr, row, V, SEARCH: tl.constexpr):
    """What a row's search goes by: the tokens, or the fraction, that are to be kept; -1 where it keeps all."""
    goal = tl.full((), -1, tl.int64)
    if setting_ptr is not None:
        if SEARCH == TOP_K:
            k = tl.load(setting_ptr + row)
            goal = tl.where((k > 0) & (k < V), k, -1)
        else:
            share = tl.maximum(_fraction(tl.load(setting_ptr + row)), 0)
            goal = tl.where(share < _WHOLE, share, -1)
    return goal


@triton.jit
def _read(search_ptr, setting_ptr, row, V, SEARCH: tl.constexpr, step):
    """For `_settled`: a row's goal; of pass `step` the mass by digit, the bits and the target that it began with."""
    at = search_ptr + _first_mass(SEARCH, step) + tl.arange(0, _DIGITS)
    begun = search_ptr + _begun(SEARCH, step)
    return _goal(setting_ptr, row, V, SEARCH), tl.load(at), tl.load(begun), tl.load(begun + 1)


@triton.jit
def _settled(goal, mass, bits, target, step, SEARCH: tl.constexpr):
    """What pass `step` has found: the leading bits of the threshold, and what the tokens of these bits must weigh.

    The threshold is the largest key t such that the tokens of keys >= t weigh what they must at least.
    """
    total = tl.sum(mass, axis=0)
    aim = goal
    if SEARCH != TOP_K:
        aim = tl.maximum(_share(total, goal), 1)
    target = tl.where(step == 0, aim, target)
    # The mass of a digit and all above falls as the digit rises, and suffices at digit 0.
    least = total - tl.cumsum(mass, axis=0) + mass
    digit = tl.maximum(tl.sum((least >= target).to(tl.int32), axis=0) - 1, 0)
    target -= tl.sum(tl.where(tl.arange(0, _DIGITS) > digit, mass, 0), axis=0)
    return bits + (digit.to(tl.int64) << _shift(step)), target


@triton.jit
def _thresholds(search_ptr, top_k_ptr, top_p_ptr, typical_p_ptr, row, V):
    """The least keys that a row keeps, 0 where it keeps all: of x by top-k and top-p, and by typical-p."""
    last: tl.constexpr = _PASSES - 1
    # Asked for together.
    if top_k_ptr is not None:
        k_goal, k_mass, k_bits, k_target = _read(search_ptr, top_k_ptr, row, V, TOP_K, last)
    if top_p_ptr is not None:
        p_goal, p_mass, p_bits, p_target = _read(search_ptr, top_p_ptr, row, V, TOP_P, last)
    if typical_p_ptr is not None:
        t_goal, t_mass, t_bits, t_target = _read(search_ptr, typical_p_ptr, row, V, TYPICAL_P, last)
    floor = tl.full((), 0, tl.int64)
    typical_floor = floor
    if top_k_ptr is not None:
        key, _ = _settled(k_goal, k_mass, k_bits, k_target, last, TOP_K)
        floor = tl.where(k_goal >= 0, key, floor)
    if top_p_ptr is not None:
        key, _ = _settled(p_goal, p_mass, p_bits, p_target, last, TOP_P)
        floor = tl.where(p_goal >= 0, tl.maximum(key, floor), floor)
    if typical_p_ptr is not None:
        key, _ = _settled(t_goal, t_mass, t_bits, t_target, last, TYPICAL_P)
        typical_floor = tl.where(t_goal >= 0, key, typical_floor)
    return floor, typical_floor


@triton.jit
def _mean(total, moment):
    """The mean of the kept tokens' distances from the best one, in bits: minus their surprise, for typical-p."""
    return tl.div_rn(moment.to(tl.float32), tl.maximum(total, 1).to(tl.float32))


@jit("candidate_ptr V")
def _weigh(
    candidate_ptr, search_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr,
    V, blocks, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What the mean follows from: the weights that the other filters keep, and their moment."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK
    if PDL:
        tl.extra.cuda.gdc_wait()
    search_ptr += row * _NUMBERS
    goal, count = _goal(typical_p_ptr, row, V, TYPICAL_P), tl.load(search_ptr + _COUNT)
    maxima = _maxima(best_ptr, row, blocks, BLOCKS)
    sharpness, least_weight = _sharpness(temperature_ptr, row), _least_weight(min_p_ptr, row)
    if (goal >= 0) & (start < count):
        at = start + tl.arange(0, CHUNK)
        x = tl.load(candidate_ptr + row * V + at, mask=at < count, other=-_INF)
        floor, _ = _thresholds(search_ptr, top_k_ptr, top_p_ptr, None, row, V)
        best = _best(maxima)
        weight = _kept(x, best, sharpness, floor, least_weight)
        scaled = tl.maximum((x - best) * sharpness, -63.0)
        tl.atomic_add(search_ptr + _TOTAL, tl.sum(weight, axis=0), sem="relaxed")
        moment = tl.sum((scaled * weight.to(tl.float32)).to(tl.int64), axis=0)
        tl.atomic_add(search_ptr + _MOMENT, moment, sem="relaxed")


@triton.jit
def _begins(key, bits, step):
    """Whether keys begin with the bits that are settled before pass `step`."""
    return (key ^ bits) >> _shift(step) < _DIGITS


@triton.jit
def _by_digit(key, weight, step):
    """What tokens of these keys weigh, by the digit of pass `step`: int64 [_DIGITS]."""
    digit = ((key >> _shift(step)) & (_DIGITS - 1)).to(tl.int32)
    here = digit[None, :] == tl.arange(0, _DIGITS)[:, None]
    # In two halves, whose sums over a chunk are 32 bits: a warp has an instruction for those.
    low = tl.sum(tl.where(here, (weight & _HALF).to(tl.int32)[None, :], 0), axis=1)
    high = tl.sum(tl.where(here, (weight >> _HALF_BITS).to(tl.int32)[None, :], 0), axis=1)
    return (high.to(tl.int64) << _HALF_BITS) + low


@triton.jit
def _weights(x, real, best, sharpness, floor, SEARCH: tl.constexpr):
    """What the candidates weigh in the search for top-k or for top-p."""
    if SEARCH == TOP_K:
        return real.to(tl.int64)
    else:
        return _kept(x, best, sharpness, floor, 0)


@jit("candidate_ptr V")
def _narrow(
    candidate_ptr, search_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr,
    step, V, blocks, SEARCH: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One pass of a search: of the candidates with the bits that are settled, the mass by their next digit."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    search_ptr += row * _NUMBERS
    setting_ptr = top_k_ptr if SEARCH == TOP_K else (top_p_ptr if SEARCH == TOP_P else typical_p_ptr)
    count = tl.load(search_ptr + _COUNT)
    goal, mass, bits, target = _read(search_ptr, setting_ptr, row, V, SEARCH, tl.maximum(step - 1, 0))
    if (goal >= 0) & (chunk * CHUNK < count):
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(candidate_ptr + row * V + at, mask=at < count, other=-_INF)
        maxima = _maxima(best_ptr, row, blocks, BLOCKS)
        sharpness = _sharpness(temperature_ptr, row)
        if SEARCH == TYPICAL_P:
            least_weight = _least_weight(min_p_ptr, row)
            total, moment = tl.load(search_ptr + _TOTAL), tl.load(search_ptr + _MOMENT)
            floor, _ = _thresholds(search_ptr, top_k_ptr, top_p_ptr, None, row, V)
            best = _best(maxima)
            key = _typical_key(x, best, sharpness, _mean(total, moment))
            weight = _kept(x, best, sharpness, floor, least_weight)
        else:
            floor, _ = _thresholds(search_ptr, top_k_ptr if SEARCH == TOP_P else None, None, None, row, V)
            key, weight = _order_key(x), _weights(x, at < count, _best(maxima), sharpness, floor, SEARCH)
        if step > 0:
            bits, target = _settled(goal, mass, bits, target, step - 1, SEARCH)
            if chunk == 0:
                tl.store(search_ptr + _begun(SEARCH, step), bits)
                tl.store(search_ptr + _begun(SEARCH, step) + 1, target)
        weight = tl.where(_begins(key, bits, step), weight, 0)
        # Late passes concern few programs.
        if tl.max(weight, axis=0) > 0:
            mass = _by_digit(key, weight, step)
            to = search_ptr + _first_mass(SEARCH, step) + tl.arange(0, _DIGITS)
            tl.atomic_add(to, mass, mask=mass != 0, sem="relaxed")


@triton.jit
def _all_passes(
    candidate_ptr, x, count, search_ptr, goal, best, sharpness, floor, SEARCH: tl.constexpr, CHUNK: tl.constexpr
):
    """The threshold; behind it lies what `_narrow` would leave. `x` is the first chunk of candidates."""
    at, digit = tl.arange(0, CHUNK), tl.arange(0, _DIGITS)
    key, weight = _order_key(x), _weights(x, at < count, best, sharpness, floor, SEARCH)
    bits = tl.full((), 0, tl.int64)
    target, begun_bits, begun_target = bits, bits, bits
    mass = tl.load(search_ptr + _first_mass(SEARCH, 0) + digit)
    for step in range(_PASSES):
        mass = tl.where(step == 0, mass, 0)
        mass += _by_digit(key, tl.where(_begins(key, bits, step), weight, 0), step)
        for start in range(CHUNK, count, CHUNK):
            more = tl.load(candidate_ptr + start + at, mask=start + at < count, other=-_INF)
            their_key, theirs = _order_key(more), _weights(more, start + at < count, best, sharpness, floor, SEARCH)
            mass += _by_digit(their_key, tl.where(_begins(their_key, bits, step), theirs, 0), step)
        begun_bits, begun_target = bits, target
        bits, target = _settled(goal, mass, bits, target, step, SEARCH)
    tl.store(search_ptr + _first_mass(SEARCH, _PASSES - 1) + digit, mass)
    tl.store(search_ptr + _begun(SEARCH, _PASSES - 1), begun_bits)
    tl.store(search_ptr + _begun(SEARCH, _PASSES - 1) + 1, begun_target)
    return bits


@jit("candidate_ptr V")
def _narrow_few(
    candidate_ptr, search_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr,
    V, blocks, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The searches for top-k and top-p by one program, for candidates that one chunk mostly has all of."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    search_ptr += row * _NUMBERS
    candidate_ptr += row * V
    count = tl.load(search_ptr + _COUNT)
    k, share = _goal(top_k_ptr, row, V, TOP_K), _goal(top_p_ptr, row, V, TOP_P)
    maxima = _maxima(best_ptr, row, blocks, BLOCKS)
    sharpness = _sharpness(temperature_ptr, row)
    at = tl.arange(0, CHUNK)
    x = tl.load(candidate_ptr + at, mask=at < count, other=-_INF)
    best = _best(maxima)
    floor = tl.full((), 0, tl.int64)
    if k >= 0:
        floor = _all_passes(candidate_ptr, x, count, search_ptr, k, best, sharpness, floor, TOP_K, CHUNK)
    if share >= 0:
        _all_passes(candidate_ptr, x, count, search_ptr, share, best, sharpness, floor, TOP_P, CHUNK)


@jit("x_ptr V")
def _add_up(
    x_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr, search_ptr, mass_ptr,
    V, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x becomes -inf where a filter drops the token; what the others weigh, by block."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * V + token, mask=token < V, other=-_INF)
    maxima = _maxima(best_ptr, row, blocks, BLOCKS)
    sharpness, least_weight = _sharpness(temperature_ptr, row), _least_weight(min_p_ptr, row)
    floor = tl.full((), 0, tl.int64)
    if search_ptr is not None:
        search_ptr += row * _NUMBERS
        total, moment = tl.load(search_ptr + _TOTAL), tl.load(search_ptr + _MOMENT)
        floor, typical_floor = _thresholds(search_ptr, top_k_ptr, top_p_ptr, typical_p_ptr, row, V)
    best = _best(maxima)
    weight = _kept(x, best, sharpness, floor, least_weight)
    if typical_p_ptr is not None:
        weight = tl.where(_typical_key(x, best, sharpness, _mean(total, moment)) >= typical_floor, weight, 0)
    tl.store(mass_ptr + row * blocks + block, tl.sum(weight, axis=0))
    tl.store(x_ptr + row * V + token, tl.where(weight > 0, x, -_INF), mask=token < V)


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
    maxima = _maxima(best_ptr, row, blocks, BLOCKS)
    firsts = tl.load(first_ptr + row * blocks + at, mask=at < blocks, other=0)
    peaks = tl.load(peak_ptr + row * blocks + at, mask=at < blocks, other=-_INF)
    spread = tl.load(spread_ptr + row * blocks + at, mask=at < blocks, other=0.0)
    if temperature_ptr is not None:
        mass = tl.load(mass_ptr + row * blocks + at, mask=at < blocks, other=0)
        temperature, sharpness = tl.load(temperature_ptr + row), _sharpness(temperature_ptr, row)
        seed, stream = tl.load(seed_ptr + row), tl.load(stream_ptr + row)
        position = tl.load(position_ptr + row).to(tl.int64)
        random, _, _, _ = tl.philox(
            seed,
            (position & _MASK32).to(tl.uint32),
            ((position >> 32) & _MASK32).to(tl.uint32),
            (stream & _MASK32).to(tl.uint32),
            ((stream >> 32) & _MASK32).to(tl.uint32),
        )
        total = tl.sum(mass, axis=0)
        point = _share(total, (random >> 1).to(tl.int64))  # 31 of the 32 bits
        # The block, then the token, at which the running mass first exceeds the point.
        before = tl.cumsum(mass, axis=0) <= point
        block = tl.sum(before.to(tl.int32), axis=0)
        within = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * V + within, mask=within < V, other=-_INF)
        point -= tl.sum(tl.where(before, mass, 0), axis=0)
        weight = _weight((x - _best(maxima)) * sharpness)
        drawn = block * BLOCK + tl.sum((tl.cumsum(weight, axis=0) <= point).to(tl.int32), axis=0)
        greedy = (temperature == 0) | (total == 0)
    _, best_block = tl.max(maxima, axis=0, return_indices=True)
    token = tl.sum(tl.where(at == best_block, firsts, 0), axis=0)
    if temperature_ptr is not None:
        token = tl.where(greedy, token, drawn)
    logit = tl.load(logits_ptr + row * logits_stride + token).to(tl.float32)
    tl.store(token_ptr + row, token.to(tl.int64))
    peak = tl.max(peaks, axis=0)
    log_total = tl.log(tl.sum(spread * tl.exp(peaks - peak), axis=0))
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
    few_candidates: bool = False,
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
    # A stage that is off for the whole batch has no launches.
    filters = (temperature, top_k, top_p, min_p, typical_p)
    searches = [] if temperature is None else [i for i, p in enumerate((top_k, top_p, typical_p)) if p is not None]
    candidate = torch.empty((rows, vocab), dtype=torch.float32, device=device) if searches else None
    search = torch.empty((rows, NUMBERS), dtype=torch.int64, device=device) if searches else None
    mass = torch.empty((rows, blocks), dtype=torch.int64, device=device) if temperature is not None else None

    def stride(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.stride(0)

    per_block = {"BLOCK": BLOCK, "num_warps": BLOCK_WARPS, **options(device)}
    all_blocks = {"BLOCKS": next_power_of_2(blocks)}
    per_chunk = {"CHUNK": CHUNK, "num_warps": CHUNK_WARPS, **all_blocks, **options(device)}
    _penalize[(rows, blocks)](
        logits, logit_bias, repetition_penalty, frequency_penalty, presence_penalty, prompt_counts, output_counts,
        allowed, x, best, first, peak, spread, search,
        vocab, logits.stride(0), stride(logit_bias), stride(prompt_counts), stride(output_counts), stride(allowed),
        **per_block,
    )  # fmt: skip
    if searches:
        _collect[(rows, blocks)](
            x, best, temperature, top_k, top_p, typical_p, candidate, search, vocab, **per_block, **all_blocks
        )
    chunks = (rows, cdiv(vocab, CHUNK))
    if few_candidates and TOP_K in searches:
        _narrow_few[(rows,)](candidate, search, best, *filters[:3], vocab, blocks, **{**per_chunk, "CHUNK": FEW})
        searches = [number for number in searches if number == TYPICAL_P]
    for number in searches:
        if number == TYPICAL_P:
            _weigh[chunks](candidate, search, best, *filters, vocab, blocks, **per_chunk)
        for step in range(PASSES):
            _narrow[chunks](candidate, search, best, *filters, step, vocab, blocks, SEARCH=number, **per_chunk)
    if temperature is not None:
        _add_up[(rows, blocks)](x, best, *filters, search, mass, vocab, **per_block, **all_blocks)
    _pick[(rows,)](
        logits, x, best, first, peak, spread, temperature, mass, seed, stream, position,
        token, logprob, vocab, blocks, logits.stride(0), **per_block, **all_blocks,
    )  # fmt: skip
    return token, logprob
