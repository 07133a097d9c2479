"""swiglu, by both backends and the reference, against float64."""

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

# silu and the product are rounded, half an ulp each; float32 adds the exponential's and the division's own ulps.
ULPS = {torch.bfloat16: 1.1, torch.float16: 1.1, torch.float32: 4.0}

widths = st.one_of(st.sampled_from([1, 8, 1024, 1032, 2048]), st.integers(1, 150).map(lambda n: 8 * n))


def check_swiglu(gate_up):
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = gate * gate.sigmoid() * up
    info = torch.finfo(gate_up.dtype)
    # exp(-gate) in float32 is off by gate / 2 ulp. It overflows near -88, where silu is about 1e-36 and becomes 0. A
    # subnormal silu has fewer bits.
    magnitude = (exact * gate).abs() * 2**-24 / info.eps + up.abs() * (2e-36 / info.eps + info.smallest_normal)
    assert_near(exact, ULPS[gate_up.dtype], magnitude, **run_all("swiglu", gate_up))


@pytest.mark.op(name="swiglu")
@settings(max_examples=90)
@given(seeds, dtypes, st.sampled_from([(1,), (3,), (2, 2), ()]), widths, st.sampled_from([0, 8, 3]), scales)
def test_swiglu(seed, dtype, lead, width, padding, scale):
    check_swiglu(embedded(normal(generator(seed), *lead, 2 * width, dtype=dtype, scale=scale), padding))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_gate(dtype):
    """From gates where silu vanishes to gates where it is the identity."""
    gate = torch.linspace(-110, 110, 2000, device=DEVICE).to(dtype)
    check_swiglu(torch.cat((gate, torch.linspace(0.5, 2, 2000, device=DEVICE).to(dtype))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_is_rounded_before_the_product(dtype):
    """InternLM3's order of rounding, bit by bit, except a few values where the exponential's last bit decides."""
    gate_up = normal(generator(11), 4, 4096, dtype=dtype)
    results = run_all("swiglu", gate_up)
    assert_rounded_alike(results.pop("reference"), **results)


@pytest.mark.parametrize(
    ("gate_up", "error", "message"),
    [
        (torch.zeros(2, 9), ValueError, "gate_up has 9 columns, must have an even number"),
        (torch.zeros(2, 8, dtype=torch.int32), TypeError, "gate_up is torch.int32"),
        (torch.zeros(8, 2).t(), ValueError, "last dimension must be contiguous"),
    ],
)
def test_bad_input(gate_up, error, message):
    with pytest.raises(error, match=message):
        kernels.swiglu(gate_up.to(DEVICE))
