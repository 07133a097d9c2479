"""Rounding: against every number that a form can hold, one by one, in float64."""

import numpy as np
import pytest
import torch

from internlm3.runtime.checkpoint.quantise import rounding
from internlm3.runtime.checkpoint.quantise.rounding import FORMS, to_integers
from internlm3.tests.support.quantised import rounded

NAME = "model.layers.0.mlp.up_proj.weight"
FORM_CASES = [("int4", False), ("int4", True), ("int8", False), ("fp8", False)]


def random_weight(seed, outputs, inputs, dtype):
    """With a row of zeros, one of positive numbers, one of a single spike, and one of large numbers."""
    weight = np.random.default_rng(seed).standard_t(4, (outputs, inputs)) * 0.02
    weight[0] = 0
    weight[1] = abs(weight[1])
    weight[2] = 0
    weight[2, 5] = -1
    weight[3] *= 1000
    return torch.from_numpy(weight).to(dtype)


def candidates(form):
    if form == "fp8":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
        return values[np.isfinite(values)]
    return np.arange(16) if form == "int4" else np.arange(-127, 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("form", "symmetric"), FORM_CASES)
def test_every_number_is_the_nearest(form, symmetric, dtype):
    weight = random_weight(FORMS.index(form), 19, 96, dtype)
    found = rounded(NAME, weight, form, symmetric=symmetric)
    groups = 3 if form == "int4" else 1
    assert found.scale.dtype == dtype and found.scale.shape == (19, groups) and found.q.shape == weight.shape
    scale = np.repeat(found.scale.double().numpy(), 96 // groups, 1)
    zero = np.zeros_like(scale)
    if form == "int4":
        assert found.q.dtype == torch.uint8 and found.bits == 4
        zeros = torch.full_like(found.scale, found.zero, dtype=torch.uint8) if symmetric else found.zero
        assert zeros.dtype == torch.uint8 and zeros.max() < 16
        zero = np.repeat(zeros.double().numpy(), 96 // groups, 1)
    else:
        assert found.zero == 0 and found.q.dtype == (torch.int8 if form == "int8" else torch.float8_e4m3fn)
    exact = weight.double().numpy()
    values = (candidates(form)[:, None, None] - zero) * scale
    assert np.isin(found.q.double().numpy(), candidates(form)).all()
    error = abs((found.q.double().numpy() - zero) * scale - exact)
    # q comes from a quotient in float32, so between two that are as near it may take either.
    assert (error <= abs(values - exact).min(0) + 1e-6 * scale).all()
    product = ((found.q.double().numpy() - zero) * scale).astype(np.float32)
    assert np.array_equal(found.weight().numpy(), product)
    assert (found.weight()[0] == 0).all()


@pytest.mark.parametrize(("form", "symmetric"), FORM_CASES)
def test_scales_reach_the_largest_weight(form, symmetric):
    """The range that a scale spans is that of its group, up to the rounding of the scale."""
    weight = random_weight(7, 8, 64, torch.bfloat16)[1:]
    found = rounded(NAME, weight, form, 32, symmetric)
    grouped = weight.double().unflatten(1, (found.scale.shape[1], -1))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    largest = grouped.abs().amax(-1)
    steps = {
        "int4": (2 * largest / 15) if symmetric else (high - low) / 15,
        "int8": largest / 127,
        "fp8": largest / 448,
    }
    expected = torch.where(steps[form] == 0, 1.0, steps[form])
    torch.testing.assert_close(found.scale.double(), expected, rtol=2**-8, atol=0)


def test_rows_are_rounded_alone(monkeypatch):
    weight = random_weight(1, 33, 64, torch.bfloat16)
    for form in FORMS:
        whole = rounded(NAME, weight, form)
        with monkeypatch.context() as patch:
            patch.setattr(rounding, "_CHUNK", 5 * 64)
            parts = rounded(NAME, weight, form)
        for one, other in zip(whole, parts, strict=True):
            same = (
                torch.equal(one.view(torch.uint8), other.view(torch.uint8))
                if isinstance(one, torch.Tensor)
                else one == other
            )
            assert same


def test_what_stays_and_what_the_head_becomes():
    weight = random_weight(2, 8, 64, torch.bfloat16)
    for form in FORMS:
        for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
            assert rounded(name, weight, form) is None
        head, whole = rounded("lm_head.weight", weight, form), rounded("lm_head.weight", weight, "int8")
        assert torch.equal(head.q, whole.q) and head.q.dtype == torch.int8


def test_a_group_that_does_not_divide():
    """The largest smaller group that does is taken: 576 inputs have groups of 64."""
    for inputs, wanted, count in ((576, 128, 9), (576, 64, 9), (1536, 128, 12), (96, 128, 3), (256, 32, 8)):
        assert rounded(NAME, torch.rand(4, inputs), "int4", wanted).scale.shape[1] == count
    with pytest.raises(ValueError, match=r"up_proj.* has 48 inputs.*8 bits"):
        rounded(NAME, torch.rand(4, 48), "int4")


def test_small_and_impossible_weights():
    tiny = torch.full((2, 32), 2e-8, dtype=torch.float16)
    for form, symmetric in FORM_CASES:
        found = to_integers(NAME, tiny, torch.float16, form, 32, symmetric)
        assert (found.scale >= torch.finfo(torch.float16).tiny).all() and found.weight().isfinite().all()
        for bad in (torch.inf, torch.nan):
            weight = torch.rand(4, 32)
            weight[3, 7] = bad
            with pytest.raises(ValueError, match=r"up_proj.*inf or NaN"):
                rounded(NAME, weight, form, symmetric=symmetric)
