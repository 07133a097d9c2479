"""The search for the thresholds of top-k, top-p and typical-p, among the tokens that may be at a threshold.

A threshold is the key of a token (see `order_key`): the largest t such that the tokens with keys >= t have the required
mass. This is a radix search: a pass takes the candidates whose keys begin with the threshold's known leading bits, and
sums their weights by the next digit. The largest digit with enough mass is the threshold's.

    _collect      [B, blocks]   the candidates
    _narrow       [B, chunks]   one pass; there are eight for each filter
    _weigh        [B, chunks]   before the passes of typical-p: the sums from which its mean is computed
    _narrow_few   [B]           instead of `_narrow`, top-k and top-p at once, where there are few candidates

Any kernel reads the results by `read_thresholds`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_sampling import UNIT_BITS
from .launch import cdiv, jit, next_power_of_2, options
from .sample_weights import (
    INF,
    UNIT,
    WHOLE,
    best_of,
    fraction_of,
    kept_weight,
    order_key,
    read_least_weight,
    read_maxima,
    read_sharpness,
    share_of,
    typical_key,
    weight_of,
)

# Candidates per program: of `_narrow`, and of `_narrow_few`, which has one program per row.
CHUNK = 1024
WARPS = 4
FEW = 128
# Maxima of blocks that `_collect` compares with all of them at a time.
_SLICE = tl.constexpr(8)
# Bits of the threshold that a pass determines, from the highest on; a key has 32.
DIGIT_BITS = 4
PASSES = 8

SEARCHES = 3
TOP_K, TOP_P, TYPICAL_P = (tl.constexpr(number) for number in range(SEARCHES))
_PASSES = tl.constexpr(PASSES)
_DIGIT_BITS = tl.constexpr(DIGIT_BITS)
_DIGITS = tl.constexpr(2**DIGIT_BITS)
_HALF_BITS = tl.constexpr(UNIT_BITS // 2)
_HALF = tl.constexpr(2 ** (UNIT_BITS // 2) - 1)
# The mass of FEW candidates, each of weight 2^40 at most, fits these bits of an int64, and their number those above.
_MASS_BITS = tl.constexpr(48)
_MASS = tl.constexpr(2**48 - 1)
# The int64 numbers of a row's search. For each filter and pass: the mass of each digit, then the leading bits and the
# target mass at the beginning of the pass. Then the number of candidates; for typical-p, their total weight and moment.
_MASSES = SEARCHES * PASSES * 2**DIGIT_BITS
_BEGUN = tl.constexpr(_MASSES)
_COUNT = tl.constexpr(_MASSES + 2 * SEARCHES * PASSES)
_TOTAL = tl.constexpr(_COUNT.value + 1)
_MOMENT = tl.constexpr(_COUNT.value + 2)
NUMBERS = _COUNT.value + 3
_NUMBERS = tl.constexpr(NUMBERS)
_NUMBERS_PADDED = tl.constexpr(next_power_of_2(NUMBERS))


@triton.jit
def of_row(search_ptr, row):
    """The address of a row's numbers."""
    return search_ptr + row * _NUMBERS


@triton.jit
def clear_search(search_ptr):
    """Clears a row's numbers before its search."""
    at = tl.arange(0, _NUMBERS_PADDED)
    tl.store(search_ptr + at, tl.zeros_like(at).to(tl.int64), mask=at < _NUMBERS)


@triton.jit
def _first_mass(search, step):
    return (search * _PASSES + step) * _DIGITS


@triton.jit
def _begun(search, step):
    return _BEGUN + 2 * (search * _PASSES + step)


@triton.jit
def _shift(step):
    """The lowest bit of a pass's digit in a key."""
    return (_PASSES - 1 - step) * _DIGIT_BITS


@triton.jit
def _maxima_from(best_ptr, first, blocks):
    """The next _SLICE of a row's maxima."""
    at = first + tl.arange(0, _SLICE)
    return tl.load(best_ptr + at, mask=at < blocks, other=-INF)


@jit("x_ptr V")
def _collect(
    x_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, typical_p_ptr, candidate_ptr, search_ptr,
    V, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copies the tokens that may be at a threshold.

    A top-k threshold is at least the k-th largest of the blocks' maxima. A top-p threshold drops a mass of at least
    (1 - p) * 2^40, which is more than the mass of all tokens of weights below (1 - p) * 2^40 / 2V (V rounded up here).
    The mass of these is added to that of the smallest candidates, since p is a fraction of the total.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    search_ptr = of_row(search_ptr, row)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < V
    x = tl.load(x_ptr + row * V + token, mask=inside, other=-INF)
    maxima = read_maxima(best_ptr, row, blocks, BLOCKS)
    sharpness = read_sharpness(temperature_ptr, row)
    k, share = _goal(top_k_ptr, row, V, TOP_K), _goal(top_p_ptr, row, V, TOP_P)
    typical = _goal(typical_p_ptr, row, V, TYPICAL_P)
    weight = weight_of((x - best_of(maxima)) * sharpness)
    least_x = tl.where((share >= 0) | (typical >= 0), -INF, INF)
    least_weight = tl.where(share >= 0, (WHOLE - share) * (UNIT // WHOLE) // (2 * BLOCK * BLOCKS), 0)
    if top_k_ptr is not None:
        # All at once would take 168 registers, and a multiprocessor three programs instead of ten.
        not_less = tl.zeros((_SLICE, BLOCKS), tl.int32)
        others = _maxima_from(best_ptr + row * blocks, 0, blocks)
        for first in range(_SLICE, BLOCKS + _SLICE, _SLICE):
            # Requested before these are compared: a loop that waits for each slice waits 18 times with Triton 3.6.0.
            following = _maxima_from(best_ptr + row * blocks, first, blocks)
            not_less += (others[:, None] >= maxima[None, :]).to(tl.int32)
            others = following
        rank = tl.sum(not_less, axis=0)
        # -inf where there are fewer blocks than k.
        of_k = tl.max(tl.where((rank >= k) & (rank <= blocks), maxima, -INF), axis=0)
        least_x = tl.where(k >= 0, of_k, least_x)
        least_weight = tl.where(k >= 0, 0, least_weight)
    chosen = inside & (x >= least_x) & (weight >= least_weight)
    if (share >= 0) & (k < 0):
        tl.atomic_add(search_ptr + _first_mass(TOP_P, 0), tl.sum(tl.where(chosen, 0, weight), axis=0), sem="relaxed")
    count = tl.sum(chosen.to(tl.int64), axis=0)
    if count > 0:
        start = tl.atomic_add(search_ptr + _COUNT, count, sem="relaxed")
        slot = start + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(candidate_ptr + row * V + slot, x, mask=chosen)


@triton.jit
def _goal(setting_ptr, row, V, SEARCH: tl.constexpr):
    """The number or the fraction of tokens that a row keeps; -1 where it keeps all."""
    goal = tl.full((), -1, tl.int64)
    if setting_ptr is not None:
        if SEARCH == TOP_K:
            k = tl.load(setting_ptr + row)
            goal = tl.where((k > 0) & (k < V), k, -1)
        else:
            share = tl.maximum(fraction_of(tl.load(setting_ptr + row)), 0)
            goal = tl.where(share < WHOLE, share, -1)
    return goal


@triton.jit
def _read(search_ptr, setting_ptr, row, V, SEARCH: tl.constexpr, step):
    """For `_settled`: a row's goal; the mass by digit of pass `step`, and the bits and target at its beginning."""
    at = search_ptr + _first_mass(SEARCH, step) + tl.arange(0, _DIGITS)
    begun = search_ptr + _begun(SEARCH, step)
    return _goal(setting_ptr, row, V, SEARCH), tl.load(at), tl.load(begun), tl.load(begun + 1)


@triton.jit
def _settled(goal, mass, bits, target, step, SEARCH: tl.constexpr):
    """The result of pass `step`: the threshold's leading bits, and the mass required of the tokens with these bits."""
    total = tl.sum(mass, axis=0)
    aim = goal
    if SEARCH != TOP_K:
        aim = tl.maximum(share_of(total, goal), 1)
    target = tl.where(step == 0, aim, target)
    # The mass of all digits >= d falls as d rises, and is sufficient for d = 0.
    least = total - tl.cumsum(mass, axis=0) + mass
    digit = tl.maximum(tl.sum((least >= target).to(tl.int32), axis=0) - 1, 0)
    target -= tl.sum(tl.where(tl.arange(0, _DIGITS) > digit, mass, 0), axis=0)
    return bits + (digit.to(tl.int64) << _shift(step)), target


@triton.jit
def read_thresholds(search_ptr, top_k_ptr, top_p_ptr, typical_p_ptr, row, V):
    """The smallest keys that a row keeps, by top-k and top-p and by typical-p; 0 where it keeps all."""
    last: tl.constexpr = _PASSES - 1
    # All loads are issued together.
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
def read_moments(search_ptr):
    """For `mean_of`: the total weight and the moment of the candidates of typical-p."""
    return tl.load(search_ptr + _TOTAL), tl.load(search_ptr + _MOMENT)


@triton.jit
def mean_of(total, moment):
    """For typical-p: the weighted mean of the kept tokens' (negative) distances from the best one, in bits."""
    return tl.div_rn(moment.to(tl.float32), tl.maximum(total, 1).to(tl.float32))


@jit("candidate_ptr V")
def _weigh(
    candidate_ptr, search_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr,
    V, blocks, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums the weights that the other filters keep, and their moment, for the mean."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK
    if PDL:
        tl.extra.cuda.gdc_wait()
    search_ptr = of_row(search_ptr, row)
    goal, count = _goal(typical_p_ptr, row, V, TYPICAL_P), tl.load(search_ptr + _COUNT)
    maxima = read_maxima(best_ptr, row, blocks, BLOCKS)
    sharpness, least_weight = read_sharpness(temperature_ptr, row), read_least_weight(min_p_ptr, row)
    if (goal >= 0) & (start < count):
        at = start + tl.arange(0, CHUNK)
        x = tl.load(candidate_ptr + row * V + at, mask=at < count, other=-INF)
        floor, _ = read_thresholds(search_ptr, top_k_ptr, top_p_ptr, None, row, V)
        best = best_of(maxima)
        weight = kept_weight(x, best, sharpness, floor, least_weight)
        scaled = tl.maximum((x - best) * sharpness, -63.0)
        tl.atomic_add(search_ptr + _TOTAL, tl.sum(weight, axis=0), sem="relaxed")
        moment = tl.sum((scaled * weight.to(tl.float32)).to(tl.int64), axis=0)
        tl.atomic_add(search_ptr + _MOMENT, moment, sem="relaxed")


@triton.jit
def _begins(key, bits, step):
    """Whether keys begin with the bits that are known before pass `step`."""
    return (key ^ bits) >> _shift(step) < _DIGITS


@triton.jit
def _by_digit(key, weight, step):
    """The total weight of these keys for each value of the digit of pass `step`: int64 [_DIGITS]."""
    digit = ((key >> _shift(step)) & (_DIGITS - 1)).to(tl.int32)
    here = digit[None, :] == tl.arange(0, _DIGITS)[:, None]
    # In two halves, whose sums over a chunk fit 32 bits: a warp has an instruction for such sums.
    low = tl.sum(tl.where(here, (weight & _HALF).to(tl.int32)[None, :], 0), axis=1)
    high = tl.sum(tl.where(here, (weight >> _HALF_BITS).to(tl.int32)[None, :], 0), axis=1)
    return (high.to(tl.int64) << _HALF_BITS) + low


@triton.jit
def _weights(x, real, best, sharpness, floor, SEARCH: tl.constexpr):
    """The candidates' weights in the search for top-k or for top-p."""
    if SEARCH == TOP_K:
        return real.to(tl.int64)
    else:
        return kept_weight(x, best, sharpness, floor, 0)


@jit("candidate_ptr V")
def _narrow(
    candidate_ptr, search_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr,
    step, V, blocks, SEARCH: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One pass of a search: sums the weights of the candidates with the known leading bits, by their next digit."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    search_ptr = of_row(search_ptr, row)
    setting_ptr = top_k_ptr if SEARCH == TOP_K else (top_p_ptr if SEARCH == TOP_P else typical_p_ptr)
    count = tl.load(search_ptr + _COUNT)
    goal, mass, bits, target = _read(search_ptr, setting_ptr, row, V, SEARCH, tl.maximum(step - 1, 0))
    if (goal >= 0) & (chunk * CHUNK < count):
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(candidate_ptr + row * V + at, mask=at < count, other=-INF)
        maxima = read_maxima(best_ptr, row, blocks, BLOCKS)
        sharpness = read_sharpness(temperature_ptr, row)
        if SEARCH == TYPICAL_P:
            least_weight = read_least_weight(min_p_ptr, row)
            total, moment = read_moments(search_ptr)
            floor, _ = read_thresholds(search_ptr, top_k_ptr, top_p_ptr, None, row, V)
            best = best_of(maxima)
            key = typical_key(x, best, sharpness, mean_of(total, moment))
            weight = kept_weight(x, best, sharpness, floor, least_weight)
        else:
            floor, _ = read_thresholds(search_ptr, top_k_ptr if SEARCH == TOP_P else None, None, None, row, V)
            key, weight = order_key(x), _weights(x, at < count, best_of(maxima), sharpness, floor, SEARCH)
        if step > 0:
            bits, target = _settled(goal, mass, bits, target, step - 1, SEARCH)
            if chunk == 0:
                tl.store(search_ptr + _begun(SEARCH, step), bits)
                tl.store(search_ptr + _begun(SEARCH, step) + 1, target)
        weight = tl.where(_begins(key, bits, step), weight, 0)
        # In late passes few programs have such candidates.
        if tl.max(weight, axis=0) > 0:
            mass = _by_digit(key, weight, step)
            to = search_ptr + _first_mass(SEARCH, step) + tl.arange(0, _DIGITS)
            tl.atomic_add(to, mass, mask=mass != 0, sem="relaxed")


@triton.jit
def _all_passes(
    candidate_ptr, x, count, search_ptr, goal, best, sharpness, floor, SEARCH: tl.constexpr, CHUNK: tl.constexpr
):
    """The threshold. Stores the numbers that `_narrow` would store. x is the first chunk of candidates."""
    at, digit = tl.arange(0, CHUNK), tl.arange(0, _DIGITS)
    key, weight = order_key(x), _weights(x, at < count, best, sharpness, floor, SEARCH)
    bits = tl.full((), 0, tl.int64)
    target = bits
    mass = tl.load(search_ptr + _first_mass(SEARCH, 0) + digit)
    for step in range(_PASSES):
        mass = tl.where(step == 0, mass, 0)
        mass += _by_digit(key, tl.where(_begins(key, bits, step), weight, 0), step)
        for start in range(CHUNK, count, CHUNK):
            more = tl.load(candidate_ptr + start + at, mask=start + at < count, other=-INF)
            their_key, theirs = order_key(more), _weights(more, start + at < count, best, sharpness, floor, SEARCH)
            mass += _by_digit(their_key, tl.where(_begins(their_key, bits, step), theirs, 0), step)
        # Stored in each pass, though the last is enough: see test_twins.py on old values in loops.
        tl.store(search_ptr + _begun(SEARCH, step), bits)
        tl.store(search_ptr + _begun(SEARCH, step) + 1, target)
        tl.store(search_ptr + _first_mass(SEARCH, step) + digit, mass)
        bits, target = _settled(goal, mass, bits, target, step, SEARCH)
    return bits


@triton.jit
def _at_once(search_ptr, x, count, k, share, dropped, best, sharpness, CHUNK: tl.constexpr):
    """The searches for top-k and top-p among candidates that fit one chunk: each is compared with all others.

    dropped: the mass of the tokens that are no candidates.
    """
    key, real = order_key(x), tl.arange(0, CHUNK) < count
    weight = tl.where(real, weight_of((x - best) * sharpness), 0)
    # For each candidate [None, :] the number of those whose keys are not less, and below it their mass.
    order = (key - 2147483648).to(tl.int32)
    one_of = weight + (real.to(tl.int64) << _MASS_BITS)
    not_less = tl.sum(tl.where(order[:, None] >= order[None, :], one_of[:, None], 0), axis=0)
    number, mass = not_less >> _MASS_BITS, not_less & _MASS
    # Top-p counts only what top-k keeps. A key that top-k keeps has the same mass with or without the others.
    floor = tl.full((), 0, tl.int64)
    if k >= 0:
        floor = tl.max(tl.where(number >= k, key, 0), axis=0)
        _store_threshold(search_ptr, floor, TOP_K)
    if share >= 0:
        kept = tl.sum(tl.where(key >= floor, weight, 0), axis=0)
        target = tl.maximum(share_of(dropped + kept, share), 1)
        _store_threshold(search_ptr, tl.max(tl.where(mass >= target, key, 0), axis=0), TOP_P)


@triton.jit
def _store_threshold(search_ptr, bits, SEARCH: tl.constexpr):
    """Stores a last pass whose result is this threshold."""
    last: tl.constexpr = _PASSES - 1
    digit = bits & (_DIGITS - 1)
    tl.store(search_ptr + _first_mass(SEARCH, last) + digit, 1)
    tl.store(search_ptr + _begun(SEARCH, last), bits - digit)
    tl.store(search_ptr + _begun(SEARCH, last) + 1, 1)


@jit("candidate_ptr V")
def _narrow_few(
    candidate_ptr, search_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr,
    V, blocks, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The searches for top-k and top-p by one program, for candidates that usually fit one chunk."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    search_ptr = of_row(search_ptr, row)
    candidate_ptr += row * V
    count, dropped = tl.load(search_ptr + _COUNT), tl.load(search_ptr + _first_mass(TOP_P, 0))
    k, share = _goal(top_k_ptr, row, V, TOP_K), _goal(top_p_ptr, row, V, TOP_P)
    maxima = read_maxima(best_ptr, row, blocks, BLOCKS)
    sharpness = read_sharpness(temperature_ptr, row)
    at = tl.arange(0, CHUNK)
    x = tl.load(candidate_ptr + at, mask=at < count, other=-INF)
    best = best_of(maxima)
    if count <= CHUNK:
        _at_once(search_ptr, x, count, k, share, dropped, best, sharpness, CHUNK)
    else:
        floor = tl.full((), 0, tl.int64)
        if k >= 0:
            floor = _all_passes(candidate_ptr, x, count, search_ptr, k, best, sharpness, floor, TOP_K, CHUNK)
        if share >= 0:
            _all_passes(candidate_ptr, x, count, search_ptr, share, best, sharpness, floor, TOP_P, CHUNK)


def find_thresholds(
    x: Tensor,
    best: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    typical_p: Tensor | None,
    search: Tensor,
    block: int,
    few_candidates: bool,
) -> None:
    """Writes the numbers of the searches to `search` [B, NUMBERS] int64, which must be cleared.

    x [B, V]; best [B, blocks]: the maximum of each block of x. A filter that is off for the whole batch has no
    launches. `sample` explains few_candidates.
    """
    (rows, vocab), blocks = x.shape, best.shape[1]
    candidate = torch.empty_like(x)
    filters = (temperature, top_k, top_p, min_p, typical_p)
    shared = {"BLOCKS": next_power_of_2(blocks), "num_warps": WARPS, **options(x.device)}
    _collect[(rows, blocks)](
        x, best, temperature, top_k, top_p, typical_p, candidate, search, vocab, BLOCK=block, **shared
    )
    several = [number for number, p in enumerate((top_k, top_p, typical_p)) if p is not None]
    if few_candidates and top_k is not None:
        _narrow_few[(rows,)](candidate, search, best, temperature, top_k, top_p, vocab, blocks, CHUNK=FEW, **shared)
        several = [number for number in several if number == TYPICAL_P]
    chunks = (rows, cdiv(vocab, CHUNK))
    for number in several:
        if number == TYPICAL_P:
            _weigh[chunks](candidate, search, best, *filters, vocab, blocks, CHUNK=CHUNK, **shared)
        for step in range(PASSES):
            _narrow[chunks](
                candidate, search, best, *filters, step, vocab, blocks, SEARCH=number, CHUNK=CHUNK, **shared
            )
