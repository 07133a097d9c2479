"""The linear layers, by both backends and the reference, against float64: one row, 2 to 64 rows, and more."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import kernels
from internlm3.kernels import cpu, reference
from internlm3.kernels.triton import linear_few_rows
from internlm3.kernels.triton.launch import INTERPRETED
from internlm3.tests.kernels.support import (
    DEVICE,
    MODULES,
    assert_near,
    assert_rounded_alike,
    assert_same,
    dtypes,
    embedded,
    generator,
    normal,
    run,
    scales,
    seeds,
)
from internlm3.tests.kernels.test_rope_and_cache import ULPS, orders
from internlm3.tests.kernels.test_rope_and_cache import Case as RopeCase

EPS = 1e-5
# Less than, as much as and more than a program reads at once, in whole chunks and not; multiples of 8 for 16-byte rows.
widths = st.sampled_from([8, 64, 200, 576, 1536, 2048, 2056, 4104]) | st.integers(1, 80).map(lambda n: 8 * n)
# One row has a kernel path of its own; it gets few outputs, since the interpreter is slow and a program has only two of
# them. 2 to 64 rows have another path, with tiles of 32 outputs and 16, 32 or 64 rows. Torch multiplies more rows.
one_row = st.tuples(st.just(1), widths, st.integers(1, 7))
counts = st.integers(1, 18) | st.sampled_from([31, 32, 33, 63, 64, 65, 66])
rows = st.tuples(counts, widths, st.sampled_from([1, 2, 31, 32, 33]) | st.integers(1, 70))
few_rows = st.tuples(st.integers(1, 16) | st.integers(17, 64), widths, st.integers(1, 34))
paddings = st.sampled_from([0, 8])


def product(x, weight, bias=None, normed=False):
    """x @ weight^T + bias in float64, and its error bound, to be multiplied by the dtype's eps.

    The bound has 4 float32 ulp of the sum of magnitudes, for the float32 sums. Where x is the result of a norm, rsqrt's
    last bit may round an element the other way: two ulp of the largest term allow for several of these. A GPU's rsqrt
    is itself within two float32 ulp, in the same direction for all elements. The bound has no room for partial sums
    that are rounded to the dtype.
    """
    terms = x.double()[:, None] * weight.double()
    exact, addends = terms.sum(-1), terms.abs().sum(-1)
    shifted = 2 * torch.finfo(torch.float32).eps / torch.finfo(x.dtype).eps * exact.abs()
    steps = x.double().abs().clamp(min=torch.finfo(x.dtype).smallest_normal)  # the least step of the dtype
    largest = 2 * (steps[:, None] * weight.double().abs()).amax(-1) + shifted if normed else 0.0
    unbiased = 0.0
    if bias is not None:
        # A backend may round before it adds the bias. Where one pass takes all columns, up to 64 in float32, Triton's
        # compiler begins the sum with the bias, so every addition rounds a sum that includes it.
        exact, addends, unbiased = exact + bias.double(), addends + 4 * bias.double().abs(), exact.abs()
    size = 4 * torch.finfo(torch.float32).eps / torch.finfo(x.dtype).eps * addends + largest + unbiased
    return exact, size


def summed_in_order(x, weight, bias):
    """x @ weight^T + bias in float32, in the order that `parts` of linear_few_rows.py states for several rows.

    A chunk's sum is exact if the sums of its products are, in any order: the order within a chunk is the hardware's.
    """
    columns, chunk = x.shape[1], linear_few_rows.CHUNK // x.element_size()
    width = columns // linear_few_rows.parts(len(weight), columns)
    y = torch.zeros(len(x), len(weight))
    for begin in range(0, columns, width):
        part = torch.zeros_like(y)
        for first in range(begin, begin + width, chunk):
            some = slice(first, min(first + chunk, begin + width))
            part += (x[:, some].double() @ weight[:, some].double().mT).float()
        y += part
    return y + bias.float()


def order_case(rng, rows, outputs, columns, dtype, chunk, exponents=10):
    """x [rows, columns] and weight [outputs, columns] whose product depends on the order of the chunks' sums.

    Within a chunk the products are integers below 2^6 times a power of two, so that its sum is exact in any order.
    Chunks have products of very different sizes, and all but one or two are cancelled by another one, so what remains
    is mostly rounding.
    """
    x, weight = (torch.randint(-8, 9, (count, columns), generator=rng).float() for count in (rows, outputs))
    scale, whole = torch.ones(columns), columns // chunk
    for i in range((whole - 1) // 2):
        this, other = (slice(n * chunk, (n + 1) * chunk) for n in (i, whole - 1 - i))
        scale[this] = scale[other] = 2.0 ** int(torch.randint(exponents, (), generator=rng))
        x[:, other], weight[:, other] = x[:, this], -weight[:, this]
    return (x * scale).to(DEVICE, dtype), (weight * scale).to(DEVICE, dtype)


def one_row_in_order(x, weight, bias):
    """x @ weight^T + bias of one row in float32, in the order of lanes. Of all lanes only one has products."""
    lanes = linear_few_rows.ONE_ROW_CHUNK // x.element_size()
    y = torch.zeros(1, len(weight))
    for column in range(x.shape[1]):
        # A product of 16-bit numbers, and of the small ones in float32, is exact, so this rounds once, as fma does.
        y += x[:, column].float() * weight[:, column].float()
    assert (x.view(-1).nonzero() % lanes).unique().numel() == 1
    return y + bias.float()


class Case:
    """Random inputs in poisoned memory, with gaps of `padding` between the rows of matrices."""

    def __init__(self, seed, dtype, rows, width, outputs, scale=1.0, padding=0, biased=False):
        rng = generator(seed)
        # For more rows the product is torch's, which NaN in the gaps may reach: see `run_all`.
        padding = padding if rows <= linear_few_rows.FEW_ROWS else 0
        self.x = embedded(normal(rng, rows, width, dtype=dtype, scale=scale), padding)
        self.weight = embedded(normal(rng, outputs, width, dtype=dtype, scale=2 * width**-0.5), padding)
        self.bias = embedded(normal(rng, outputs, dtype=dtype)) if biased else None
        self.norm = embedded(normal(rng, width, dtype=dtype))
        self.residual = embedded(normal(rng, rows, outputs, dtype=dtype, scale=scale), padding)

    def normed(self):
        return reference.rms_norm(self.x, self.norm, EPS)


def draw(*extra):
    """Random cases for every path of a linear layer."""
    return given(seeds, dtypes, one_row | rows, scales, paddings, st.booleans(), *extra)


def run_all(op, *args, **options):
    """The op's results by name: of both backends and the reference.

    On a CPU, torch.mm in bfloat16 multiplies the gaps between rows by zero, and these are NaN here: all but Triton get
    rows without gaps.
    """
    dense = [arg.contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args]
    return {name: run(name, op, *(args if name == "triton" else dense), **options) for name in MODULES}


@pytest.mark.op(name="linear")
@settings(max_examples=40)
@draw(st.booleans())
def test_linear(seed, dtype, shape, scale, padding, biased, batch_invariant):
    case = Case(seed, dtype, *shape, scale, padding, biased)
    args = (case.x, case.weight, case.bias)
    exact, size = product(*args)
    assert_near(exact, 1.0, size, **run_all("linear", *args, batch_invariant=batch_invariant))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (5,), (2, 3), (20,)])
@pytest.mark.parametrize("transposed", [0, 16])
def test_the_products_of_any_cpu(monkeypatch, transposed, leading, dtype, biased):
    """Both kinds of product, whichever this CPU uses, with any leading dimensions."""
    monkeypatch.setattr(cpu, "TRANSPOSED_ROWS", dict.fromkeys(cpu.TRANSPOSED_ROWS, transposed))
    monkeypatch.setattr(cpu, "ONEDNN_FLOAT32", False)
    rng = generator(7)
    x, weight = normal(rng, *leading, 24, dtype=dtype), normal(rng, 40, 24, dtype=dtype)
    bias = normal(rng, 40, dtype=dtype) if biased else None
    exact, size = product(x.view(-1, 24), weight, bias)
    found = run("cpu", "linear", x, weight, bias)
    assert found.shape == (*leading, 40)
    assert_near(exact, 1.0, size, cpu=found.view(-1, 40))


@pytest.mark.op(name="linear_add")
@settings(max_examples=40)
@draw(st.booleans())
def test_linear_add(seed, dtype, shape, scale, padding, biased, batch_invariant):
    case = Case(seed, dtype, *shape, scale, padding, biased)
    exact, size = product(case.x, case.weight, case.bias)
    results = run_all("linear_add", case.x, case.weight, case.residual, case.bias, batch_invariant=batch_invariant)
    assert_near(exact + case.residual.double(), 1.0, size + exact.abs(), **results)


@pytest.mark.op(name="rms_norm_linear")
@settings(max_examples=40)
@draw(st.booleans())
def test_rms_norm_linear(seed, dtype, shape, scale, padding, biased, batch_invariant):
    case = Case(seed, dtype, *shape, scale, padding, biased)
    exact, size = product(case.normed(), case.weight, case.bias, normed=True)
    results = run_all(
        "rms_norm_linear", case.x, case.norm, EPS, case.weight, case.bias, batch_invariant=batch_invariant
    )
    assert_near(exact, 1.0, size, **results)


def test_the_case_that_failed_on_an_h200():
    """float16, 17 rows, which torch multiplied. The record of 2026-11-27 has 3 of 34 wrong, the worst at [11, 1].

    Sums of 12 parts of the columns, each rounded to float16, give that value and that count; by torch's default cuBLAS
    may round so. The norm gives neither: two float32 ulp of rsqrt change no element of its result. The bound has no
    room for rounded parts, so this result would fail again.
    """
    case = Case(0, torch.float16, 17, 1536, 2, scale=1e-8)
    x, norm, weight, normed = (each.cpu() for each in (case.x, case.norm, case.weight, case.normed()))
    exact, size = product(normed, weight, normed=True)
    parts = (normed.double()[:, None] * weight.double()).view(17, 2, 12, 128).sum(-1).half()
    found = parts.double().sum(-1).half()
    error = (found.double() - exact).abs()
    assert exact[11, 1].item() == pytest.approx(1.5197937273114803e-06, rel=1e-12)
    assert found[11, 1].item() == 1.430511474609375e-06
    assert error[11, 1].item() == error.max().item() == pytest.approx(8.93e-8, rel=1e-3)
    assert (error > 6.53e-8).sum() == 3
    with pytest.raises(AssertionError, match=r"worst at \[11, 1\]"):
        assert_near(exact, 1.0, size, parts=found)
    for ulps in (-2, -1, 1, 2):
        scale = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS) * (1 + ulps * 2.0**-23)
        assert_same(normed, shifted=((x.float() * scale.float()).half().float() * norm.float()).half())


@pytest.mark.op(name="rms_norm_swiglu")
@settings(max_examples=40)
@draw(st.booleans())
def test_rms_norm_swiglu(seed, dtype, shape, scale, padding, biased, batch_invariant):
    rows, width, outputs = shape
    case = Case(seed, dtype, rows, width, 2 * outputs, scale, padding, biased)
    exact, size = product(case.normed(), case.weight, case.bias, normed=True)
    gate, up = exact.chunk(2, -1)
    gate_size, up_size = (exact.abs() + size).chunk(2, -1)
    silu = gate * gate.sigmoid()
    # silu's slope is at most 1.1. float32's exp and division add three ulp.
    size = (1.1 * gate_size + 3 * silu.abs()) * up.abs() + silu.abs() * up_size
    results = run_all(
        "rms_norm_swiglu", case.x, case.norm, EPS, case.weight, case.bias, batch_invariant=batch_invariant
    )
    assert_near(silu * up, 1.0, size, **results)


def check_qkv(seed, dtype, width, padding, biased, batch_invariant, rope):
    """rms_norm_qkv_rope_cache at the shapes of a RopeCase, whose qkv is replaced by the normed and projected x."""
    rows, outputs = rope.qkv.shape
    case = Case(seed, dtype, rows, width, outputs, 1.0, padding, biased)
    qkv, size = product(case.normed(), case.weight, case.bias, normed=True)
    rope.qkv = qkv
    exact_q, exact_k, exact_v, *_, position = rope.exact()
    rope.qkv = qkv.abs() + size  # the magnitude of the rotation's operands, and the product's error
    _, _, v_size, q_size, k_size, _ = rope.exact()

    results = {}
    for name in MODULES:
        kv = rope.paged(rope.kv.clone())
        cache = (rope.inv_freq, kv[:, 0], kv[:, 1], rope.block_table, rope.seq_lens, rope.positions)
        weight = case.weight if name == "triton" else case.weight.contiguous()
        args = (case.x, case.norm, EPS, weight, case.bias, *cache)
        q = run(name, "rms_norm_qkv_rope_cache", *args, writes=cache[1:3], batch_invariant=batch_invariant)
        results[name] = q, kv

    assert_near(exact_q, ULPS[dtype], q_size, **{name: q for name, (q, _) in results.items()})
    written = torch.zeros(rope.paged(rope.kv).shape[0], rope.page_size, dtype=torch.bool, device=DEVICE)
    for b, t in (position >= 0).nonzero().tolist():
        slot = int(position[b, t])
        if slot // rope.page_size >= rope.block_table.shape[1]:
            continue  # it must not be written
        page, offset = int(rope.block_table[b, slot // rope.page_size]), slot % rope.page_size
        written[page, offset] = True
        found = {name: kv[page, :, :, offset] for name, (_, kv) in results.items()}
        exact, error = torch.stack((exact_k[b, t], exact_v[b, t])), torch.stack((k_size[b, t], v_size[b, t]))
        assert_near(exact, ULPS[dtype], error, **found)
    for name, (_, kv) in results.items():
        assert (kv.isnan().all(-1) != written[:, None, None]).all(), f"{name} wrote a slot of another token"


@pytest.mark.op(name="rms_norm_qkv_rope_cache")
@settings(max_examples=50)
@given(
    seeds,
    dtypes,
    st.lists(st.sampled_from([0, 1, 15, 16, 17, 131073]) | st.integers(0, 300), min_size=1, max_size=5),
    st.integers(1, 5) | st.sampled_from([8, 16]),
    st.sampled_from([(1, 1, 16), (3, 1, 32), (2, 2, 48), (6, 2, 16), (16, 1, 16), (4, 2, 64), (2, 1, 80), (2, 1, 128)]),
    st.sampled_from([16, 64]),
    st.sampled_from([8, 64, 200]),
    paddings,
    st.booleans(),
    orders,
    st.booleans(),
)
def test_qkv(seed, dtype, lengths, tokens, heads, page_size, width, padding, biased, order, own_positions):
    """Several rows: decode batches, short prompts, and verification of drafted tokens; more than 64 by separate ops."""
    rope = RopeCase(seed, dtype, lengths, tokens, *heads, page_size, padding, order, own_positions)
    check_qkv(seed, dtype, width, padding, biased, True, rope)


@pytest.mark.op(name="rms_norm_qkv_rope_cache")
@settings(max_examples=16)
@given(
    seeds,
    dtypes,
    st.sampled_from([0, 1, 16, 17, 300, 131073]),
    st.integers(1, 2),
    paddings,
    st.booleans(),
    st.booleans(),
)
def test_qkv_of_one_row(seed, dtype, length, heads, padding, biased, own_positions):
    rope = RopeCase(seed, dtype, [length], 1, heads, 1, 16, 16, padding, own_positions=own_positions)
    check_qkv(seed, dtype, 200, padding, biased, False, rope)


def test_qkv_of_one_row_and_wide_heads():
    """InternLM3-8B's head dimension, and more columns than a program reads at once."""
    check_qkv(23, torch.bfloat16, 2056, 0, False, False, RopeCase(23, torch.bfloat16, [77], 1, 1, 1, 128, 64))


@pytest.mark.parametrize(("lengths", "tokens"), [([50, 3], 3), ([3, 50], 3), ([49], 1)])
def test_qkv_of_positions_after_the_block_table(lengths, tokens):
    """The table has three pages of 16, then two."""
    rope = RopeCase(13, torch.float32, lengths, tokens, 1, 1, 16, 16)
    for pages in (3, 2):
        rope.block_table = rope.block_table[:, :pages]  # what follows in memory are pages of the sequence
        check_qkv(13, torch.float32, 64, 0, False, False, rope)


@pytest.mark.parametrize("sequences", [1, 3])
def test_qkv_of_pages_outside_the_cache(sequences):
    """Their keys and values are written nowhere."""
    for outside in (-1, 3 * sequences + 1):
        rope = RopeCase(9, torch.float32, [5] * sequences, 1, 1, 1, 16, 16)
        rope.block_table[0] = outside
        case = Case(9, torch.float32, sequences, 64, 3 * 16, 1.0, 0, False)
        kv = embedded(rope.kv)
        cache = (rope.inv_freq, kv[:, 0], kv[:, 1], rope.block_table, rope.seq_lens)
        args = (case.x, case.norm, EPS, case.weight, None, *cache)
        run("triton", "rms_norm_qkv_rope_cache", *args, writes=cache[1:3])
        written = ~kv.isnan().all(-1).all(2).all(1)
        expected = torch.zeros_like(written)
        expected[rope.block_table[1:, 0], 4] = True
        assert_same(expected, written=written)


@pytest.mark.op(name="linear")
@pytest.mark.op(name="linear_add")
@pytest.mark.op(name="rms_norm_linear")
@pytest.mark.op(name="rms_norm_swiglu")
@settings(max_examples=25)
@given(seeds, dtypes, few_rows, st.integers(0, 63), scales)
def test_a_row_has_the_same_bits_in_any_batch(seed, dtype, shape, other, scale):
    """A row is bit-identical alone and in a batch, at any index."""
    rows, width, outputs = shape
    case = Case(seed, dtype, rows, width, 2 * outputs, scale, biased=True)
    row = other % rows
    alone, residual = case.x[row : row + 1], case.residual[row : row + 1]
    ops = [
        lambda x, _: kernels.linear(x, case.weight, case.bias, batch_invariant=True),
        lambda x, r: kernels.linear_add(x, case.weight, r, case.bias, batch_invariant=True),
        lambda x, _: kernels.rms_norm_linear(x, case.norm, EPS, case.weight, batch_invariant=True),
        lambda x, _: kernels.rms_norm_swiglu(x, case.norm, EPS, case.weight, batch_invariant=True),
    ]
    for op in ops:
        assert_same(op(alone, residual)[0], found=op(case.x, case.residual)[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "outputs", "width"), [(5, 40, 4096), (33, 70, 1024), (20, 33, 1000), (2, 4097, 512)])
@pytest.mark.parametrize("tiles", ["ROWS", "HOPPER"])
def test_several_rows_are_summed_in_the_stated_order(monkeypatch, tiles, dtype, rows, outputs, width):
    """Bit for bit, by values whose sum over a chunk is exact in any order.

    So this does not show the order within a chunk, which numpy chooses in the interpreter and the tensor core on a GPU.
    """
    monkeypatch.setattr(linear_few_rows, "ROWS", getattr(linear_few_rows, tiles))
    rng = generator(width)
    x, weight = order_case(rng, rows, outputs, width, dtype, linear_few_rows.CHUNK // dtype.itemsize)
    bias = normal(rng, outputs, dtype=dtype)
    expected = summed_in_order(x.cpu(), weight.cpu(), bias.cpu())
    assert_same(expected.to(DEVICE, dtype), found=run("triton", "linear", x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_row_is_summed_in_the_stated_order(dtype):
    """Bit for bit in one lane. The order over the lanes is the compiler's, and numpy's in the interpreter."""
    lanes, rng = linear_few_rows.ONE_ROW_CHUNK // dtype.itemsize, generator(5)
    count = linear_few_rows.LONGEST // linear_few_rows.ONE_ROW_CHUNK
    x, weight = torch.zeros(1, count * lanes), torch.zeros(30, count * lanes)
    values = order_case(rng, 1, 30, count, torch.float32, 1, exponents=13)
    shuffled = torch.randperm(count, generator=rng)  # the case is symmetric, and so is the rounding of its sum
    x[0, 7::lanes], weight[:, 7::lanes] = (each.cpu()[:, shuffled] for each in values)
    x, weight, bias = x.to(DEVICE, dtype), weight.to(DEVICE, dtype), normal(rng, 30, dtype=dtype)
    expected = one_row_in_order(x.cpu(), weight.cpu(), bias.cpu())
    assert_same(expected.to(DEVICE, dtype), found=run("triton", "linear", x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_number_of_rows_changes_no_bits(dtype):
    """1 to 64 rows, whose kernels have tiles of 16, 32 and 64 rows."""
    x, weight = order_case(generator(3), 64, 40, 1024, dtype, linear_few_rows.CHUNK // dtype.itemsize)
    every = kernels.linear(x, weight)
    for count in (1, 2, 15, 16, 17, 32, 33, 63):
        found = {f"{count} rows": kernels.linear(x[-count:], weight, batch_invariant=True)}
        assert_same(every[-count:], **found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "width"), [(576, 1536), (960, 576), (1024, 4096)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_row_has_the_same_bits_in_any_batch_on_a_cpu(dtype, outputs, width, biased):
    """Alone, and at any index among up to 16 rows."""
    rng = generator(width)
    x, weight = (torch.randn(shape, generator=rng).to(dtype) for shape in ((16, width), (outputs, width)))
    bias = torch.randn(outputs, generator=rng).to(dtype) if biased else None
    alone = torch.cat([cpu.linear(row[None], weight, bias) for row in x])
    for count in (2, 3, 4, 8, 11, 16):
        assert_same(alone[-count:], **{f"{count} rows": cpu.linear(x[-count:], weight, bias)})


@pytest.mark.parametrize(
    ("sequences", "tokens", "batch_invariant"),
    [(2, 2, False), (2, 2, True), (2, 20, False), (3, 21, True), (33, 1, True)],
)
def test_qkv_has_the_same_bits_in_any_batch(sequences, tokens, batch_invariant):
    """Sequences together, and the last alone: q and its part of the cache are bit-identical."""
    rope = RopeCase(11, torch.bfloat16, [40 - n % 18 for n in range(sequences)], tokens, 4, 2, 64, 64)
    case = Case(11, torch.bfloat16, sequences * tokens, 200, 8 * 64)
    together, apart = rope.kv.clone(), rope.kv.clone()
    weights = (case.norm, EPS, case.weight, None)
    options = {"batch_invariant": batch_invariant}
    q = kernels.rms_norm_qkv_rope_cache(
        case.x, *weights, rope.inv_freq, *together.unbind(1), rope.block_table, rope.seq_lens, **options
    )
    last = (rope.inv_freq[-1:], *apart.unbind(1), rope.block_table[-1:], rope.seq_lens[-1:])
    q_alone = kernels.rms_norm_qkv_rope_cache(case.x[-tokens:], *weights, *last, **options)
    assert_same(q_alone, found=q[-tokens:])
    mine = ~apart.isnan()
    assert mine.sum() == tokens * 2 * 2 * 64
    assert_same(apart[mine], found=together[mine])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[77], [77, 5, 131073]])
def test_both_kernels_write_the_same_bits_to_the_cache(dtype, lengths):
    """The kernel of decode steps and that of prompts round the same product in the same way."""
    rope = RopeCase(29, dtype, lengths, 1, 2, 1, 32, 16)
    case = Case(29, dtype, len(lengths), 200, 4 * 32)
    together, apart = rope.kv.clone(), rope.kv.clone()
    weights = (case.norm, EPS, case.weight)
    q = kernels.rms_norm_qkv_rope_cache(
        case.x, *weights, None, rope.inv_freq, *together.unbind(1), rope.block_table, rope.seq_lens
    )
    qkv = kernels.rms_norm_linear(case.x, *weights)
    expected = kernels.rope_and_cache(qkv, rope.inv_freq, *apart.unbind(1), rope.block_table, rope.seq_lens)
    assert_same(expected, found=q)
    assert_same(apart.nan_to_num(7.0), found=together.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 10240), (1, 20488), (2, 10240)])
def test_long_rows(dtype, rows, width):
    """As long as the down projection's, and too long for the registers of the single-row path."""
    case = Case(13, dtype, rows, width, 3)
    exact, size = product(case.x, case.weight)
    results = run_all("linear_add", case.x, case.weight, case.residual)
    assert_near(exact + case.residual.double(), 1.0, size + exact.abs(), **results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", [15, 31, 2047, 65, 129])
def test_rows_that_end_a_column_before_or_after_a_chunk(width, rows, dtype):
    """The last column counts, and what follows a row does not."""
    case = Case(11, dtype, rows, width, 20, padding=-width % 8)
    exact, size = product(case.normed(), case.weight, normed=True)
    assert_near(exact, 1.0, size, **run_all("rms_norm_linear", case.x, case.norm, EPS, case.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_the_head_of_an_odd_vocabulary(monkeypatch, rows, dtype):
    """128133 tokens, the last of which are in a tile that they do not fill."""
    if INTERPRETED:  # a program takes milliseconds: 32 large ones
        tile = linear_few_rows.Tile(4096, 4)
        monkeypatch.setattr(linear_few_rows, "ONE_ROW", tile)
        for name in ("FLOAT32", "ROWS_WIDE"):
            monkeypatch.setattr(linear_few_rows, name, dict.fromkeys(linear_few_rows.FLOAT32, tile))
    case = Case(31, dtype, rows, 8, 128133)
    exact, size = product(case.normed(), case.weight, normed=True)
    assert_near(exact, 1.0, size, **run_all("rms_norm_linear", case.x, case.norm, EPS, case.weight))


def test_any_leading_dimensions():
    case = Case(17, torch.float32, 6, 64, 5)
    y = kernels.linear(case.x, case.weight)
    assert_same(y.view(2, 3, 5), found=kernels.linear(case.x.view(2, 3, 64), case.weight))
    assert_same(kernels.linear(case.x[:1], case.weight)[0], found=kernels.linear(case.x[0], case.weight))
    assert kernels.linear(case.x[:0], case.weight).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4])
def test_roundings_in_the_reference_order(dtype, rows):
    """Bit by bit, except a few values where the order of a float32 sum decides a tie."""
    case = Case(19, dtype, rows, 200, 128)  # one element of a half is then less than 3%
    args = (case.x, case.norm, EPS, case.weight)
    for op in ("rms_norm_linear", "rms_norm_swiglu"):
        results = run_all(op, *args)
        assert_rounded_alike(results.pop("reference"), 0.03, **results)
    results = run_all("linear_add", case.x, case.weight, case.residual)
    assert_rounded_alike(results.pop("reference"), 0.03, **results)


@pytest.mark.parametrize("rows", [1, 3, 65])
@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        ("linear", {"x": torch.zeros(1, 16).int()}, TypeError, "x is torch.int32"),
        ("linear", {"weight": torch.zeros(4, 16).half()}, TypeError, "weight is torch.float16, must be torch.float32"),
        ("linear", {"weight": torch.zeros(4, 8)}, ValueError, r"weight has shape \[4, 8\], must have \[any, 16\]"),
        ("linear", {"weight": torch.zeros(4, 16, device="meta")}, ValueError, "weight is on meta"),
        ("linear", {"weight": torch.zeros(16, 4).t()}, ValueError, "last dimension must be contiguous"),
        ("linear", {"weight": torch.zeros(4, 17)[:, 1:]}, ValueError, "weight's rows begin 68 bytes apart"),
        ("linear", {"weight": torch.zeros(65)[1:].view(4, 16)}, ValueError, "multiples of 16: copy or pad it"),
        ("linear", {"bias": torch.zeros(5)}, ValueError, r"bias has shape \[5\], must have \[4\]"),
        ("linear_add", {"residual": torch.zeros(2, 4)}, ValueError, "residual has shape"),
        ("linear_add", {"x": torch.zeros(16)}, ValueError, r"x has shape \[16\], must have \[any, any\]"),
        ("rms_norm_linear", {"norm": torch.zeros(8)}, ValueError, r"norm has shape \[8\], must have \[16\]"),
        ("rms_norm_swiglu", {"weight": torch.zeros(5, 16)}, ValueError, "weight has 5 rows"),
    ],
)
def test_bad_input(rows, op, change, error, message):
    good = {"x": torch.zeros(rows, 16), "weight": torch.zeros(4, 16)}
    if op == "linear_add":
        good["residual"] = torch.zeros(rows, 4)
    if op.startswith("rms_norm"):
        good |= {"norm": torch.zeros(16), "eps": EPS}
    args = {**good, **change}
    args = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) and not x.is_meta else x for n, x in args.items()}
    # A copy to another device has other strides.
    if "weight" in change and change["weight"].stride(0) == 17:
        args["weight"] = torch.zeros(4, 17, device=DEVICE)[:, 1:]
    elif "weight" in change and change["weight"].storage_offset():
        args["weight"] = torch.zeros(65, device=DEVICE)[1:].view(4, 16)
    with pytest.raises(error, match=message):
        getattr(kernels, op)(**args)


@pytest.mark.parametrize("rows", [2, 66])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 16)}, ValueError, "3 rows, must have a multiple of the 2 sequences"),
        ({"weight": torch.zeros(120, 16)}, ValueError, r"weight has 120 rows, must have \(H \+ 2 \* 2\) \* 16"),
        ({"weight": torch.zeros(64, 16)}, ValueError, "weight has 64 rows"),
        ({"inv_freq": torch.zeros(2, 16)}, ValueError, r"inv_freq has shape \[2, 16\], must have \[2, 8\]"),
        ({"inv_freq": torch.zeros(2, 8).double()}, TypeError, "inv_freq is torch.float64, must be torch.float32"),
        ({"k_cache": torch.zeros(4, 2, 16, 16).half()}, TypeError, "k_cache is torch.float16, must be torch.float32"),
        ({"v_cache": torch.zeros(4, 2, 8, 16)}, ValueError, "v_cache has shape"),
        ({"block_table": torch.zeros(2, 4).long()}, TypeError, "block_table is torch.int64, must be torch.int32"),
        ({"seq_lens": torch.zeros(1).int()}, ValueError, r"seq_lens has shape \[1\], must have \[2\]"),
        ({"positions": torch.zeros(1).int()}, ValueError, "positions has shape"),
    ],
)
def test_bad_cache(rows, change, error, message):
    good = {
        "x": torch.zeros(rows, 16),
        "norm": torch.zeros(16),
        "weight": torch.zeros(128, 16),
        "inv_freq": torch.zeros(2, 8),
        "k_cache": torch.zeros(4, 2, 16, 16),
        "v_cache": torch.zeros(4, 2, 16, 16),
        "block_table": torch.zeros(2, 4).int(),
        "seq_lens": torch.zeros(2).int(),
    }
    args = {name: x.to(DEVICE) for name, x in {**good, **change}.items()}
    with pytest.raises(error, match=message):
        kernels.rms_norm_qkv_rope_cache(**args, eps=EPS, bias=None)
