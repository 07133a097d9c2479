"""rope_and_cache, by both backends and the reference, against float64; and the cosines that it computes."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.harness import difference
from internlm3 import kernels
from internlm3.kernels.triton.rope_and_cache import cos_sin
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
    seeds,
)

# cos and sin, the products and their sum are rounded, half an ulp of the operands each. float32's cosine adds 1.5 ulp.
ULPS = {torch.bfloat16: 1.1, torch.float16: 1.1, torch.float32: 3.0}


@triton.jit
def _cos_sin(angle_ptr, cos_ptr, sin_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    cos, sin = cos_sin(tl.load(angle_ptr + at))
    tl.store(cos_ptr + at, cos)
    tl.store(sin_ptr + at, sin)


@pytest.mark.op(name="rope_and_cache")
@settings(max_examples=30)
@given(seeds, st.sampled_from(["any", "positions", "quadrants"]))
def test_cos_sin_are_exact_to_two_ulp(seed, kind):
    """Any magnitude; positions up to a million; float32 numbers next to multiples of pi/2, where sines vanish."""
    rng = generator(seed)
    uniform = torch.rand(4096, generator=rng, dtype=torch.float64)
    if kind == "any":
        angles = 10.0 ** (uniform * 14 - 8)
    elif kind == "positions":
        angles = torch.floor(uniform * 1e6)
    else:
        angles = torch.floor(uniform * 2**20) * (math.pi / 2)
    angles = angles.float().to(DEVICE)
    cos, sin = torch.empty_like(angles), torch.empty_like(angles)
    _cos_sin[(1,)](angles, cos, sin, BLOCK=4096)
    wide = angles.cpu().numpy().astype(np.longdouble)
    for name, ours, exact in (("cos", cos, np.cos(wide)), ("sin", sin, np.sin(wide))):
        ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        bound = torch.from_numpy(2 * ulp).to(DEVICE)
        wrong = difference(name, ours, torch.from_numpy(exact.astype(np.float64)).to(DEVICE), bound, "2 ulp")
        assert not wrong, wrong


class Case:
    """A random launch: sequences of these lengths, on three pages each, which the table repeats to any length.

    A launch has at most as many tokens as a page, so no two of them share a slot.
    """

    def __init__(
        self,
        seed,
        dtype,
        lengths,
        tokens,
        heads,
        kv_heads,
        dim,
        page_size,
        padding=0,
        order="PAKSD",
        own_positions=False,
    ):
        assert tokens <= page_size
        rng = generator(seed)
        sequences = len(lengths)
        self.lengths, self.tokens, self.heads, self.kv_heads, self.dim = lengths, tokens, heads, kv_heads, dim
        self.page_size = page_size
        self.qkv = embedded(normal(rng, sequences * tokens, (heads + 2 * kv_heads) * dim, dtype=dtype), padding)
        theta = 10.0 ** (4 + 5 * torch.rand(sequences, 1, generator=rng))
        self.inv_freq = embedded((theta ** (-torch.arange(0, dim, 2) / dim)).to(DEVICE), padding)
        pages = torch.randperm(3 * sequences + 1, generator=rng, dtype=torch.int32)[: 3 * sequences].view(-1, 3)
        slots = max(max(lengths) - 1, 0) // page_size + 1
        choice = torch.randint(3, (sequences, slots), generator=rng)
        self.block_table = embedded(pages.gather(1, choice).to(DEVICE), padding)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        # Positions for the rotation that differ from those in the sequence.
        turns = torch.randint(1_000_000, (sequences * tokens,), generator=rng, dtype=torch.int32)
        self.positions = turns.to(DEVICE) if own_positions else None
        # k and v (axis A) in one buffer of NaN, as freed memory may be: what the op does not write must stay NaN.
        sizes = {"P": 3 * sequences + 1, "A": 2, "K": kv_heads, "S": page_size, "D": dim}
        self.order = order
        self.kv = torch.full([sizes[axis] for axis in order], torch.nan, dtype=dtype, device=DEVICE)

    def paged(self, kv):
        """A buffer like self.kv, [P, 2, K, S, D]."""
        return kv.permute([self.order.index(axis) for axis in "PAKSD"])

    def run(self, backend):
        """The op on a copy of the cache: q, k_cache, v_cache."""
        kv = self.paged(embedded(self.kv))
        args = (self.qkv, self.inv_freq, kv[:, 0], kv[:, 1], self.block_table, self.seq_lens, self.positions)
        return run(backend, "rope_and_cache", *args, writes=args[2:4]), kv[:, 0], kv[:, 1]

    def exact(self):
        """In float64: q, k and v of every row, the magnitude of the terms of q and k, and the position of every row."""
        x = self.qkv.double().view(len(self.lengths), self.tokens, -1, self.dim)
        position = self.seq_lens[:, None] - self.tokens + torch.arange(self.tokens, device=DEVICE)
        turn = position if self.positions is None else self.positions.view(position.shape)
        angle = (turn[..., None].float() * self.inv_freq[:, None]).double()
        cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        # The last term is the rounding of a subnormal cosine, which has fewer bits.
        size = torch.cat(((first * cos).abs() + (second * sin).abs(), (second * cos).abs() + (first * sin).abs()), -1)
        size = size + (first.abs() + second.abs()).repeat(1, 1, 1, 2) * torch.finfo(self.qkv.dtype).smallest_normal
        live = (position >= 0)[..., None, None]
        q, k, _ = (turned * live).split((self.heads, self.kv_heads, self.kv_heads), 2)
        q_size, k_size, _ = (size * live).split((self.heads, self.kv_heads, self.kv_heads), 2)
        return q.flatten(0, 1), k, x[:, :, self.heads + self.kv_heads :], q_size.flatten(0, 1), k_size, position


def check_case(case):
    results = {backend: case.run(backend) for backend in MODULES}
    exact_q, exact_k, exact_v, q_size, k_size, position = case.exact()
    ulps = ULPS[case.qkv.dtype]
    assert_near(exact_q, ulps, q_size, **{backend: q for backend, (q, _, _) in results.items()})
    written = torch.zeros(case.paged(case.kv).shape[0], case.page_size, dtype=torch.bool, device=DEVICE)
    for b, t in (position >= 0).nonzero().tolist():
        slot = int(position[b, t])
        if slot // case.page_size >= case.block_table.shape[1]:
            continue  # it must not be written
        page, offset = int(case.block_table[b, slot // case.page_size]), slot % case.page_size
        written[page, offset] = True
        k = {backend: k_cache[page, :, offset] for backend, (_, k_cache, _) in results.items()}
        v = {backend: v_cache[page, :, offset].double() for backend, (_, _, v_cache) in results.items()}
        assert_near(exact_k[b, t], ulps, k_size[b, t], **k)
        assert_same(exact_v[b, t], **v)
    for backend, (_, *caches) in results.items():
        for cache in caches:
            assert (cache.isnan().all(-1).all(1) != written).all(), f"{backend} wrote a slot of another token"


# The axes in memory: by page, by token within a page, and by head, as in the runtime.
orders = st.sampled_from(["PAKSD", "PASKD", "AKPSD"])
lengths_near_pages = st.sampled_from([0, 1, 2, 15, 16, 17, 31, 32, 33, 131072, 131073, 1_000_000])


@pytest.mark.op(name="rope_and_cache")
@settings(max_examples=60)
@given(
    seeds,
    dtypes,
    st.lists(lengths_near_pages | st.integers(0, 3000), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([16, 48, 64, 80, 128]),
    st.sampled_from([16, 32, 256]),
    st.sampled_from([0, 8]),
    orders,
    st.booleans(),
)
def test_rope_and_cache(seed, dtype, lengths, tokens, kv_heads, group, dim, page_size, padding, order, own_positions):
    heads = group * kv_heads
    check_case(Case(seed, dtype, lengths, tokens, heads, kv_heads, dim, page_size, padding, order, own_positions))


@pytest.mark.parametrize(
    ("dtype", "lengths", "tokens"),
    [
        (torch.bfloat16, [131072], 1),
        (torch.float16, [0, 0], 1),
        (torch.float32, [257], 2),
        (torch.bfloat16, [70, 3], 33),
    ],
)
def test_internlm3_shapes(dtype, lengths, tokens):
    """One token; idle sequences; the edge of a page; many rows, part of which are padding."""
    check_case(Case(3, dtype, lengths, tokens, 32, 2, 128, 256))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_rounded_one_by_one(dtype):
    """InternLM3's order of rounding, bit by bit, except a few values where a cosine's last float32 bit decides."""
    case = Case(5, dtype, [70], 32, 4, 2, 128, 32)
    results = {backend: case.run(backend) for backend in MODULES}
    expected_q, expected_k, _ = results.pop("reference")
    for backend, (q, k_cache, _) in results.items():
        assert_rounded_alike(expected_q, **{f"{backend}'s q": q})
        assert_rounded_alike(expected_k.nan_to_num(7.0), **{f"{backend}'s k_cache": k_cache.nan_to_num(7.0)})


@pytest.mark.parametrize("own_positions", [False, True])
def test_arguments_that_change_in_place(own_positions):
    """A backend may keep tables from one layer to the next, but not where an argument has changed since."""
    case = Case(11, torch.float32, [5, 30], 2, 4, 2, 64, 64, own_positions=own_positions)
    check_case(case)
    for argument in (case.seq_lens, case.inv_freq, *([case.positions] if own_positions else [])):
        argument[1] += 1
        check_case(case)
    case.positions = None if own_positions else case.seq_lens.repeat_interleave(2)
    check_case(case)
    case.qkv, case.kv = case.qkv.half(), case.kv.half()
    check_case(case)


@pytest.mark.parametrize("lengths", [[50, 3], [3, 50], [98, 51]])
def test_positions_after_the_block_table_are_not_written(lengths):
    """Three tokens of a sequence, whose table has three pages of 16, then two: some, all or none are after its end."""
    case = Case(13, torch.float32, lengths, 3, 4, 2, 64, 16)
    for pages in (3, 2):
        case.block_table = case.block_table[:, :pages]  # what follows in memory are pages of the sequence
        check_case(case)


def test_page_ids_outside_the_cache_write_nothing():
    case = Case(9, torch.float32, [5, 6, 7], 2, 4, 2, 64, 16)
    case.block_table[0] = -1
    case.block_table[1] = case.kv.shape[0]
    _, k_cache, v_cache = case.run("triton")
    mine = case.block_table[2, 0]
    for cache in (k_cache, v_cache):
        assert cache[mine, :, 5:7].isfinite().all()
        assert cache.isfinite().sum() == cache[mine, :, 5:7].numel()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.zeros(3, 128)}, ValueError, "3 rows, must have a multiple of the 2 sequences"),
        ({"qkv": torch.zeros(2, 120)}, ValueError, r"qkv has 120 columns, must have \(H \+ 2 \* 2\) \* 16"),
        ({"qkv": torch.zeros(2, 64)}, ValueError, "qkv has 64 columns"),
        ({"inv_freq": torch.zeros(2, 16)}, ValueError, r"inv_freq has shape \[2, 16\], must have \[2, 8\]"),
        ({"inv_freq": torch.zeros(2, 8).double()}, TypeError, "inv_freq is torch.float64, must be torch.float32"),
        ({"k_cache": torch.zeros(4, 2, 16, 16).half()}, TypeError, "k_cache is torch.float16, must be torch.float32"),
        ({"v_cache": torch.zeros(4, 2, 8, 16)}, ValueError, "v_cache has shape"),
        ({"k_cache": torch.zeros(4, 2, 16, 8), "v_cache": torch.zeros(4, 2, 16, 8)}, ValueError, "inv_freq has shape"),
        ({"block_table": torch.zeros(2, 4).long()}, TypeError, "block_table is torch.int64, must be torch.int32"),
        ({"seq_lens": torch.zeros(1).int()}, ValueError, r"seq_lens has shape \[1\], must have \[2\]"),
        ({"positions": torch.zeros(2).long()}, TypeError, "positions is torch.int64, must be torch.int32"),
        ({"positions": torch.zeros(3).int()}, ValueError, r"positions has shape \[3\], must have \[2\]"),
    ],
)
def test_bad_input(change, error, message):
    good = {
        "qkv": torch.zeros(2, 128),
        "inv_freq": torch.zeros(2, 8),
        "k_cache": torch.zeros(4, 2, 16, 16),
        "v_cache": torch.zeros(4, 2, 16, 16),
        "block_table": torch.zeros(2, 4).int(),
        "seq_lens": torch.zeros(2).int(),
    }
    args = {name: x.to(DEVICE) for name, x in {**good, **change}.items()}
    with pytest.raises(error, match=message):
        kernels.rope_and_cache(**args)


def test_head_dim_must_divide_by_16():
    caches = torch.zeros(2, 4, 2, 16, 24, device=DEVICE)
    numbers = {"dtype": torch.int32, "device": DEVICE}
    with pytest.raises(ValueError, match="head_dim 24, must be a multiple of 16"):
        kernels.rope_and_cache(
            torch.zeros(1, 120, device=DEVICE),
            torch.zeros(1, 12, device=DEVICE),
            *caches,
            torch.zeros(1, 1, **numbers),
            torch.zeros(1, **numbers),
        )
