"""The linear ops with quantised weights, by both backends and the reference, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import kernels
from internlm3.kernels import reference
from internlm3.kernels.quantised import Form, QuantisedWeight, pack
from internlm3.kernels.triton import linear_few_rows
from internlm3.kernels.triton.dequantise import dequantise
from internlm3.tests.kernels.support import (
    DEVICE,
    DTYPES,
    assert_near,
    assert_same,
    call,
    dtypes,
    embedded,
    generator,
    normal,
    run,
    run_all,
    scales,
    seeds,
)
from internlm3.tests.kernels.test_linear import EPS, product
from internlm3.tests.kernels.test_rope_and_cache import ULPS
from internlm3.tests.kernels.test_rope_and_cache import Case as RopeCase

# Columns, and columns with one scale (0: all): whole blocks of words of every width, and padding.
COLUMNS = [
    (512, 128), (1024, 0), (576, 64), (576, 0), (64, 16), (384, 32), (256, 256), (200, 0), (72, 0), (48, 16), (8, 0),
]  # fmt: skip
columns = st.sampled_from(COLUMNS)
# The kind and its zero point: one for all groups, or "groups" for one each.
KINDS = [("int4", 8), ("int4", 0), ("int4", "groups"), ("int8", 0), ("int8", "groups"), ("float8", 0)]
kinds = st.sampled_from(KINDS)
rows = st.integers(1, 18) | st.sampled_from([31, 32, 33, 63, 64, 65])
shapes = st.tuples(rows, columns, st.sampled_from([1, 2, 31, 32, 33]) | st.integers(1, 70))


def quantised(rng, outputs, columns, group, kind, zero, *, ordered=False, minimum=False):
    """A random weight, its numbers in float64 by the formula, and the size of the terms that these add up."""
    groups = columns // group if group else 1
    zero = 0 if zero == "groups" and (group or columns) % 16 else zero  # which cannot be packed
    scale = (0.5 + torch.rand(outputs, groups, generator=rng)).half() * (columns**-0.5 / (4 if kind == "int4" else 64))
    scale = scale.to(torch.float16 if zero == "groups" else torch.float32)
    if kind == "float8":
        q = (torch.randn(outputs, columns, generator=rng) * 60).to(torch.float8_e4m3fn)
    else:
        low, high = (0, 16) if kind == "int4" else (-128, 128)
        q = torch.randint(low, high, (outputs, columns), generator=rng)
    if zero == "groups":
        low, high = (0, 17) if kind == "int4" else (-128, 128)
        zero = torch.randint(low, high, (outputs, groups), generator=rng)
    order = torch.randperm(columns, generator=rng) if ordered else None
    minimum = torch.randn(outputs, groups, generator=rng) * columns**-0.5 if minimum and group else None
    weight = pack(kind, q, scale, zero, minimum, order)
    q, zeros = q.double(), zero if isinstance(zero, int) else zero.double().repeat_interleave(columns // groups, 1)
    exact = (q - zeros) * scale.double().repeat_interleave(columns // groups, 1)
    size = exact.abs()
    if minimum is not None:
        size += minimum.double().abs().repeat_interleave(columns // groups, 1)
        exact += minimum.double().repeat_interleave(columns // groups, 1)
    if ordered:
        exact[:, order], size[:, order] = exact.clone(), size.clone()
    guarded = [embedded(x.contiguous().to(DEVICE)) for x in (weight.words, weight.scales)]
    weight = weight._replace(
        words=guarded[0],
        scales=guarded[1],
        minimum=None if minimum is None else embedded(weight.minimum.to(DEVICE)),
        order=None if order is None else order.to(DEVICE),
    )
    return weight, exact.to(DEVICE), size.to(DEVICE)


class Case:
    def __init__(self, seed, dtype, shape, kind, scale=1.0, biased=False, ordered=False, pairs=1):
        rng = generator(seed)
        rows, (columns, group), outputs = shape
        self.x = embedded(normal(rng, rows, columns, dtype=dtype, scale=scale))
        options = {"ordered": ordered, "minimum": bool(seed & 1)}
        self.weight, self.exact, self.size = quantised(rng, pairs * outputs, columns, group, *kind, **options)
        self.bias = embedded(normal(rng, pairs * outputs, dtype=dtype)) if biased else None
        self.norm = embedded(normal(rng, columns, dtype=dtype))
        self.residual = embedded(normal(rng, rows, outputs, dtype=dtype, scale=scale))

    def product(self, x, normed=False):
        """As test_linear's `product`; more than 64 rows may round each weight, by half a step of the dtype."""
        exact, size = product(x, self.exact, self.bias, normed)
        # The sums of products and of minima may cancel: four float32 ulp of each, as `product` has of their sum.
        cancelled = 4 * torch.finfo(torch.float32).eps / torch.finfo(x.dtype).eps * (self.size - self.exact.abs())
        rounded = 0.5 * self.exact.abs() if len(x) > linear_few_rows.FEW_ROWS else 0.0
        return exact, size + x.double().abs() @ (cancelled + rounded).mT

    def normed(self):
        return reference.rms_norm(self.x, self.norm, EPS)


def bounds(product):
    """The arguments of assert_near."""
    exact, size = product
    return exact, 1.0, size


def draw(count):
    def decorate(test):
        return settings(max_examples=count)(
            given(seeds, dtypes, shapes, kinds, scales, st.booleans(), st.booleans(), st.booleans())(test)
        )

    return decorate


@pytest.mark.op(name="linear")
@draw(40)
def test_linear(seed, dtype, shape, kind, scale, biased, ordered, batch_invariant):
    case = Case(seed, dtype, shape, kind, scale, biased, ordered)
    results = run_all("linear", case.x, case.weight, case.bias, batch_invariant=batch_invariant)
    assert_near(*bounds(case.product(case.x)), **results)


@pytest.mark.op(name="linear_add")
@draw(20)
def test_linear_add(seed, dtype, shape, kind, scale, biased, ordered, batch_invariant):
    case = Case(seed, dtype, shape, kind, scale, biased, ordered)
    exact, size = case.product(case.x)
    results = run_all("linear_add", case.x, case.weight, case.residual, case.bias, batch_invariant=batch_invariant)
    assert_near(exact + case.residual.double(), 1.0, size + exact.abs(), **results)


@pytest.mark.op(name="rms_norm_linear")
@draw(20)
def test_rms_norm_linear(seed, dtype, shape, kind, scale, biased, ordered, batch_invariant):
    case = Case(seed, dtype, shape, kind, scale, biased, ordered)
    results = run_all(
        "rms_norm_linear", case.x, case.norm, EPS, case.weight, case.bias, batch_invariant=batch_invariant
    )
    assert_near(*bounds(case.product(case.normed(), normed=True)), **results)


@pytest.mark.op(name="rms_norm_swiglu")
@draw(20)
def test_rms_norm_swiglu(seed, dtype, shape, kind, scale, biased, ordered, batch_invariant):
    case = Case(seed, dtype, shape, kind, scale, biased, ordered, pairs=2)
    exact, size = case.product(case.normed(), normed=True)
    gate, up = exact.chunk(2, -1)
    gate_size, up_size = (exact.abs() + size).chunk(2, -1)
    silu = gate * gate.sigmoid()
    size = (1.1 * gate_size + 3 * silu.abs()) * up.abs() + silu.abs() * up_size  # as in test_linear
    results = run_all(
        "rms_norm_swiglu", case.x, case.norm, EPS, case.weight, case.bias, batch_invariant=batch_invariant
    )
    assert_near(silu * up, 1.0, size, **results)


@pytest.mark.op(name="rms_norm_qkv_rope_cache")
@settings(max_examples=16)
@given(
    seeds,
    dtypes,
    st.lists(st.sampled_from([0, 1, 15, 16, 17]) | st.integers(0, 300), min_size=1, max_size=5),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([(1, 1, 16), (3, 1, 32), (2, 2, 48)]),
    kinds,
)
def test_qkv(seed, dtype, lengths, tokens, heads, kind):
    """The rotated q, and what is in the cache: as the separate ops make them of the product."""
    rope = RopeCase(seed, dtype, lengths, tokens, *heads, 16, 0)
    rows, outputs = rope.qkv.shape
    case = Case(seed, dtype, (rows, (256, 64), outputs), kind)
    found = {}
    for name in ("triton", "cpu", "reference"):
        kv = rope.paged(rope.kv.clone())
        cache = (rope.inv_freq, kv[:, 0], kv[:, 1], rope.block_table, rope.seq_lens)
        args = (case.x, case.norm, EPS, case.weight, None, *cache)
        q = run(name, "rms_norm_qkv_rope_cache", *args, writes=cache[1:3])
        # Slots without a token are NaN, whoever wrote the others.
        found[name] = q, kv.clone()
    _, size = case.product(case.normed(), normed=True)
    magnitude = size.amax() + case.product(case.normed())[0].abs().amax()
    expected_q, expected_kv = found["reference"]
    for q, kv in found.values():
        assert torch.equal(kv.isnan(), expected_kv.isnan())
        assert_near(expected_q.double(), ULPS[dtype], 2 * magnitude, q=q)
        assert_near(expected_kv.double().nan_to_num(), ULPS[dtype], 2 * magnitude, kv=kv.nan_to_num())


@pytest.mark.parametrize("minimum", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_as_a_matrix(dtype, kind, minimum):
    """Which products of more than 64 rows compute first. It is rounded once."""
    for count, group in COLUMNS:
        weight, exact, size = quantised(generator(count), 33, count, group, *kind, minimum=minimum)
        cancelled = 4 * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps * (size - exact.abs())
        assert_near(exact, 0.501 if dtype != torch.float32 else 2.0, cancelled, triton=call(dequantise, weight, dtype))


@pytest.mark.parametrize("kind", [("int4", 8), ("int4", "groups"), ("int8", 0), ("float8", 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_and_among_others(dtype, kind):
    """With and without batch_invariant, at every padding, at any place."""
    case = Case(3, dtype, (64, (512, 128), 33), kind)
    alone = torch.cat([kernels.linear(case.x[i : i + 1], case.weight) for i in (0, 5, 63)])
    for count in (2, 8, 9, 17, 33, 64):
        for batch_invariant in (False, True):
            among = kernels.linear(case.x[:count], case.weight, batch_invariant=batch_invariant)
            assert_same(alone[0], found=among[0])
    assert_same(alone, found=kernels.linear(case.x, case.weight)[[0, 5, 63]])


@pytest.mark.parametrize("kind", [("int4", "groups"), ("int8", 0)])
@pytest.mark.parametrize("group", [128, 0])
def test_the_order_of_the_sum(group, kind):
    """Four parts of every fourth block, one after another; slices of a block in ascending order, with groups each by
    itself. Within a slice sums of these numbers are exact. 7168 columns are 14 or 28 blocks.
    """
    rng = generator(5)
    weight, *_ = quantised(rng, 40, 7168, group, *kind)
    sizes = 2.0 ** torch.randint(-9, 9, (56,), generator=rng).repeat_interleave(128)
    x = torch.randint(-8, 9, (5, 7168), generator=rng) * sizes
    x = x.to(DEVICE, torch.bfloat16)
    numbers = weight._replace(scales=unscaled(weight)).dense().double()
    scale = weight.dense().double() / numbers.where(numbers != 0, 1)
    parts = torch.zeros(4, 5, 40)
    for first in range(0, 7168, weight.form.width):
        some = slice(first, first + weight.form.width)
        part = first // (weight.form.fields * weight.form.width) % 4
        product = x[:, some].double() @ numbers[:, some].mT
        if group:
            product *= scale[:, some].amax(1)
        parts[part] = (parts[part].double() + product).float()
    y = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    if not group:
        y = y * scale.amax(1).float()
    assert_same(y.to(torch.bfloat16), triton=kernels.linear(x, weight))


def unscaled(weight):
    """Scales of one, with the zero points."""
    bits = weight.scales.view(torch.int32)
    zeros = bits & 0x1FFF if weight.form.zero is None else 0
    return (torch.ones_like(weight.scales).view(torch.int32) | zeros).view(torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"words": torch.zeros(4, 16).int()}, TypeError, "weight.words is torch.int32, must be torch.int16"),
        ({"words": torch.zeros(4, 17).short()}, ValueError, r"weight.words has shape \[4, 17\], must have \[any, 16\]"),
        ({"scales": torch.zeros(1, 4).half()}, TypeError, "weight.scales is torch.float16, must be torch.float32"),
        ({"scales": torch.zeros(1, 5)}, ValueError, r"weight.scales has shape \[1, 5\], must have \[1, 4\]"),
        ({"form": Form("int4", 60, 0, 8)}, ValueError, "weight has 60 columns, and x 64"),
        ({"order": torch.zeros(63).long()}, ValueError, r"weight.order has shape \[63\], must have \[64\]"),
    ],
)
def test_bad_weights(change, error, message):
    good = QuantisedWeight(Form("int4", 64, 0, 8), torch.zeros(4, 16).short(), torch.zeros(1, 4))
    weight = good._replace(**{name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()})
    with pytest.raises(error, match=message):
        kernels.linear(torch.zeros(2, 64, device=DEVICE), weight)
