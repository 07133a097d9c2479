"""rms_norm against kernels.reference and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import kernels
from internlm3.kernels import reference
from internlm3.tests.kernels.support import (
    DEVICE,
    assert_near,
    assert_rounded_alike,
    call,
    dtypes,
    embedded,
    generator,
    normal,
    scales,
    seeds,
)

widths = st.one_of(st.sampled_from([1, 8, 64, 576, 1536, 4096]), st.integers(1, 80).map(lambda n: 8 * n))
paddings = st.sampled_from([0, 8, 3])
# Two roundings to the dtype (half an ulp each, the first doubled where the product crosses a power of two), and
# float32's own error, which only float32 results see: rsqrt and the division by C, a few ulp.
ULPS = {torch.bfloat16: 1.1, torch.float16: 1.1, torch.float32: 6.0}


def exact_norm(x, weight, eps):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.op(name="rms_norm")
@settings(max_examples=300)
@given(
    seeds, dtypes, st.sampled_from([(1,), (3,), (2, 2), ()]), widths, paddings, scales, st.sampled_from([1e-5, 1e-6])
)
def test_rms_norm(seed, dtype, lead, width, padding, scale, eps):
    rng = generator(seed)
    x = embedded(normal(rng, *lead, width, dtype=dtype, scale=scale), padding)
    weight = embedded(normal(rng, width, dtype=dtype))
    y = call(kernels.rms_norm, x, weight, eps)
    assert_near(exact_norm(x, weight, eps), ULPS[dtype], triton=y, reference=reference.rms_norm(x, weight, eps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cast_comes_before_the_weight(dtype):
    """InternLM3's order of rounding, bit by bit: all but a few values, where rsqrt's last float32 bit decides a tie."""
    rng = generator(7)
    x, weight = normal(rng, 8, 4096, dtype=dtype), normal(rng, 4096, dtype=dtype)
    y, expected = call(kernels.rms_norm, x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)
    assert_rounded_alike(expected, triton=y)


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int32), torch.zeros(8), TypeError, "x is torch.int32"),
        (torch.zeros(2, 8), torch.zeros(8).half(), TypeError, "weight is torch.float16, must be torch.float32"),
        (torch.zeros(2, 8), torch.zeros(16), ValueError, r"weight has shape \[16\], must have \[8\]"),
        (torch.zeros(8, 2).t(), torch.zeros(8), ValueError, "last dimension must be contiguous"),
        (torch.zeros(2, 8), torch.zeros(8, device="meta"), ValueError, "weight is on meta"),
    ],
)
def test_bad_input(x, weight, error, message):
    x, weight = (t if t.is_meta else t.to(DEVICE) for t in (x, weight))
    with pytest.raises(error, match=message):
        kernels.rms_norm(x, weight, 1e-5)
