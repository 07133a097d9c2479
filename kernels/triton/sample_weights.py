"""The weights of tokens and the order of their logits, by the arithmetic of `reference_sampling`."""

import triton
import triton.language as tl

from ..reference_sampling import EXP2_COEFFICIENTS, FLOAT32_MAX, LOG2_E, MASK32, SHARE_BITS, UNIT_BITS

UNIT = tl.constexpr(2**UNIT_BITS)
WHOLE = tl.constexpr(2**SHARE_BITS)
LARGEST = tl.constexpr(FLOAT32_MAX)
LOW32 = tl.constexpr(MASK32)
INF = tl.constexpr(float("inf"))
_UNIT_EXPONENT = tl.constexpr(127 + UNIT_BITS)  # of a float32
_SHARE_BITS = tl.constexpr(SHARE_BITS)
_LOG2_E = tl.constexpr(LOG2_E)
_C5, _C4, _C3, _C2, _C1, _C0 = (tl.constexpr(c) for c in EXP2_COEFFICIENTS)


@triton.jit
def order_key(x):
    """int64 in [0, 2^32), in the order of the float32 x; -0.0 equals 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def share_of(total, share):
    """floor(total * share / 2^31) of int64."""
    low = total & (WHOLE - 1)
    return (total >> _SHARE_BITS) * share + ((low * share) >> _SHARE_BITS)


@triton.jit
def fraction_of(value):
    """A fraction in [0, 1] as a multiple of 2^-31."""
    return (value * WHOLE).to(tl.int64)


@triton.jit
def weight_of(scaled):
    """floor(2^40 * 2^scaled), int64."""
    scaled = tl.maximum(scaled, -63.0)
    whole = tl.floor(scaled)
    f = scaled - whole
    power = ((((f * _C5 + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _C0
    scale = ((whole.to(tl.int32) + _UNIT_EXPONENT) << 23).to(tl.float32, bitcast=True)
    return (power * scale).to(tl.int64)


@triton.jit
def read_maxima(best_ptr, row, blocks, BLOCKS: tl.constexpr):
    """The largest x of each block."""
    block = tl.arange(0, BLOCKS)
    return tl.load(best_ptr + row * blocks + block, mask=block < blocks, other=-INF)


@triton.jit
def best_of(maxima):
    """The row's largest x, made finite."""
    return tl.maximum(tl.max(maxima, axis=0), -LARGEST)


@triton.jit
def read_sharpness(temperature_ptr, row):
    """Bits of weight per unit of logit. At temperature 0 it is so large that only the maxima have a weight."""
    return tl.minimum(tl.div_rn(1.0, tl.load(temperature_ptr + row)) * _LOG2_E, LARGEST)


@triton.jit
def read_least_weight(min_p_ptr, row):
    if min_p_ptr is None:
        return tl.full((), 0, tl.int64)
    else:
        return (tl.load(min_p_ptr + row) * UNIT).to(tl.int64)


@triton.jit
def typical_key(x, best, sharpness, mean):
    """Keys that decrease as the distance from the mean grows."""
    return order_key(tl.abs((x - best) * sharpness - mean)) ^ LOW32


@triton.jit
def kept_weight(x, best, sharpness, floor, least_weight):
    """Weights of a tile of x, 0 where top-k, top-p or min-p drops the token."""
    weight = weight_of((x - best) * sharpness)
    return tl.where((order_key(x) >= floor) & (weight >= least_weight), weight, 0)
