"""rms_norm, by both backends and the reference, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import kernels
from internlm3.tests.kernels.support import (
    DEVICE,
    assert_near,
    assert_rounded_alike,
    dtypes,
    embedded,
    generator,
    normal,
    run_all,
    scales,
    seeds,
)

widths = st.one_of(st.sampled_from([1, 8, 64, 576, 1536, 4096]), st.integers(1, 80).map(lambda n: 8 * n))
paddings = st.sampled_from([0, 8, 3])
# Two roundings to the dtype (half an ulp each, the first doubled where the product crosses a power of two). Only
# float32 results show float32's own error, a few ulp of rsqrt and of the division by C.
ULPS = {torch.bfloat16: 1.1, torch.float16: 1.1, torch.float32: 6.0}


def exact_norm(x, weight, eps):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.op(name="rms_norm")
@settings(max_examples=90)
@given(
    seeds,
    dtypes,
    st.sampled_from([(1,), (3,), (2, 2), (), (17,)]),
    widths,
    paddings,
    scales,
    st.sampled_from([1e-5, 1e-6]),
)
def test_rms_norm(seed, dtype, lead, width, padding, scale, eps):
    rng = generator(seed)
    x = embedded(normal(rng, *lead, width, dtype=dtype, scale=scale), padding)
    weight = embedded(normal(rng, width, dtype=dtype))
    assert_near(exact_norm(x, weight, eps), ULPS[dtype], **run_all("rms_norm", x, weight, eps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cast_comes_before_the_weight(dtype):
    """InternLM3's order of rounding, bit by bit, except a few values where rsqrt's last bit decides a tie."""
    rng = generator(7)
    x, weight = normal(rng, 8, 4096, dtype=dtype), normal(rng, 4096, dtype=dtype)
    results = run_all("rms_norm", x, weight, 1e-5)
    assert_rounded_alike(results.pop("reference"), **results)


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
