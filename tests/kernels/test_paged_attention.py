"""paged_attention, by both backends and the reference, against a float64 softmax; and which inputs affect its bits."""

import contextlib
import functools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton import language as tl
from triton.runtime import interpreter

from internlm3 import kernels
from internlm3.kernels.triton.launch import INTERPRETED
from internlm3.tests.kernels.support import (
    DEVICE,
    MODULES,
    PagedCache,
    assert_near,
    assert_same,
    backends,
    call,
    dtypes,
    embedded,
    generator,
    module_of,
    normal,
    paged_cache,
    run,
    seeds,
)

attention = module_of(kernels.paged_attention)

# The weights of a row are rounded to the dtype before they multiply the values, and so is the result: half an ulp each.
# The rest is float32's running sums and exponentials, in any order; in float32 there is nothing else.
ULPS = {torch.bfloat16: 1.1, torch.float16: 1.2, torch.float32: 8.0}


def exact(q, cache: PagedCache, scale):
    """In float64: the attention, and the magnitude of each element's terms, with the error of float32 scores."""
    sequences = len(cache.seq_lens)
    _, kv_heads, page_size, dim = cache.k_cache.shape
    wide = q.double().view(sequences, -1, kv_heads, q.shape[1] // kv_heads, dim)
    out, size = torch.zeros_like(wide), torch.zeros_like(wide)
    for b, length in enumerate(cache.seq_lens.tolist()):
        slots = [(int(cache.block_table[b, p // page_size]), p % page_size) for p in range(length)]
        if not slots:
            continue
        k, v = (torch.stack([x[page, :, slot] for page, slot in slots]).double() for x in cache[:2])
        live = min(wide.shape[1], length)  # the tokens that are not padding
        mine = wide[b, -live:]
        unseen = torch.ones(live, length, dtype=torch.bool, device=q.device).triu(length - live + 1)[:, None, None]
        weights = (torch.einsum("tkgd,nkd->tkgn", mine, k) * scale).masked_fill(unseen, -torch.inf).softmax(-1)
        out[b, -live:] = torch.einsum("tkgn,nkd->tkgd", weights, v)
        reach = torch.einsum("tkgd,nkd->tkgn", mine.abs(), k.abs()).masked_fill(unseen, 0).amax(-1, keepdim=True)
        blur = 1 + reach * scale * torch.finfo(torch.float32).eps / torch.finfo(q.dtype).eps
        size[b, -live:] = torch.einsum("tkgn,nkd->tkgd", weights, v.abs()) * blur
    return out.view(len(q), -1), size.view(len(q), -1)


@contextlib.contextmanager
def shared_by(programs):
    """Sets how many programs share the work of a sequence, which decides whether and how splits wrap around."""
    attention.tiling.cache_clear()
    with mock.patch.multiple(attention, _PROGRAMS=programs, _PROGRAMS_ALONE=programs):
        yield
    attention.tiling.cache_clear()


def check_case(q, cache: PagedCache, scale, programs=64):
    """Also, if there is one token of each sequence, as a decode step: its bits are the same in the interpreter."""
    with shared_by(programs):
        results = {backend: run(backend, "paged_attention", q, *cache, scale) for backend in MODULES}
        if len(q) == len(cache.seq_lens):
            results["decode step"] = run("triton", "paged_attention", q, *cache, scale, decode_step=True)
    expected, size = exact(q, cache, scale)
    # A CPU joins the attention to the context and that to the block by a float32 share near 1 or 0: an error of two
    # float32 ulp of the larger value, even where its weight is small.
    finite = cache.v_cache[cache.v_cache.isfinite()].double().abs()
    largest = finite.amax() if finite.numel() else 0.0
    joined = size + 2 / ULPS[q.dtype] * largest * torch.finfo(torch.float32).eps / torch.finfo(q.dtype).eps
    assert_near(expected, ULPS[q.dtype], joined, cpu=results.pop("cpu"))
    assert_near(expected, ULPS[q.dtype], size, **results)
    return results["triton"]


@st.composite
def launches(draw, tokens, most_rows):
    """q, a cache and a scale. Many lengths are near the ends of pages and tiles.

    q has at most `most_rows` rows times heads, a quarter of that in float32, whose tiles are smaller: an interpreted
    program takes milliseconds.
    """
    dtype, rng = draw(dtypes), generator(draw(seeds))
    page_size = draw(st.sampled_from([16, 32, 48, 64, 256]))
    dim = draw(st.sampled_from([16, 32, 64, 80, 128]))
    most = most_rows // (4 if dtype == torch.float32 else 1)
    tokens = draw(tokens)
    group = draw(st.sampled_from([g for g in (1, 3, 4, 16) if tokens * g <= most] or [1]))
    kv_heads = draw(st.integers(1, min(max(most // (tokens * group), 1), 3)))
    near = [0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size, 63, 64, 65, 129]
    most_sequences = min(max(most // (tokens * group * kv_heads), 1), 4)
    lengths = draw(st.lists(st.sampled_from(near) | st.integers(0, 150), min_size=1, max_size=most_sequences))
    spread, padding = draw(st.sampled_from([0.0, 1e-8, 1.0, 1.0, 30.0])), draw(st.sampled_from([0, 8]))
    q = embedded(normal(rng, len(lengths) * tokens, group * kv_heads, dim, dtype=dtype, scale=spread), padding)
    k_cache, v_cache, table, seq_lens = paged_cache(rng, lengths, kv_heads, dim, page_size, dtype)
    if draw(st.booleans()):
        k_cache, v_cache = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_cache, v_cache))
    if draw(st.booleans()):
        for x in (k_cache, v_cache):
            x.masked_fill_(x.isnan(), -torch.inf)
    if draw(st.booleans()):
        table = table[:, : max(-(-max(lengths) // page_size), 1)]  # without unused columns
    cache = PagedCache(k_cache, v_cache, embedded(table, padding), seq_lens)
    return q, cache, draw(st.sampled_from([dim**-0.5, 0.3]))


@pytest.mark.op(name="paged_attention")
@settings(max_examples=80)
@given(launches(st.integers(1, 16), 48), st.sampled_from([1, 2, 4]))  # 150 keys are five tiles, ten in float32
def test_few_tokens(launch, programs):
    check_case(*launch, programs)


@pytest.mark.op(name="paged_attention")
@settings(max_examples=30)
@given(launches(st.integers(17, 70), 1120))
def test_long_queries(launch):
    check_case(*launch, programs=1)


@pytest.mark.op(name="paged_attention")
@settings(max_examples=12)
@given(launches(st.integers(17, 40), 100))
def test_long_queries_in_splits(launch):
    check_case(*launch, programs=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [2, 7, 64])
def test_a_cpu_joins_a_long_past(dtype, tokens):
    """A chunk after contexts of several lengths, among them none, and a sequence that is shorter than the chunk."""
    rng = generator(tokens)
    lengths = [tokens + past for past in (600, 512, 511, 0, 513)] + [1]
    cache = paged_cache(rng, lengths, 2, 32, 16, dtype)
    q = normal(rng, len(lengths) * tokens, 6, 32, dtype=dtype)
    expected, size = exact(q, cache, 0.3)
    # The attention to the context and to the block are rounded before they are joined: half an ulp more.
    assert_near(expected, ULPS[dtype] + 0.5, size, cpu=run("cpu", "paged_attention", q, *cache, 0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("lengths", "tokens", "programs"), [([300, 0], 1, 64), ([37], 4, 64), ([90], 24, 1)])
def test_internlm3_shapes(dtype, lengths, tokens, programs):
    rng = generator(1)
    q = normal(rng, len(lengths) * tokens, 32, 128, dtype=dtype)
    check_case(q, paged_cache(rng, lengths, 2, 128, 256, dtype), 128**-0.5, programs)


def test_a_tall_tile_masks_from_its_first_rows_last_key_on():
    """128 rows, of 43 tokens; key tiles end before, at and after the last key of the first token."""
    rng, tokens = generator(11), 43
    lengths = [tokens - 1 + keys for keys in (1, 31, 32, 33, 63, 64, 65, 127, 128)]
    cache = paged_cache(rng, lengths, 1, 16, 32, torch.bfloat16)
    check_case(normal(rng, len(lengths) * tokens, 3, 16, dtype=torch.bfloat16), cache, 0.3, programs=1)


@pytest.mark.parametrize("length", [4096, 4097, 8200])
def test_more_tiles_than_splits(length):
    rng = generator(2)
    check_case(normal(rng, 1, 2, 16, dtype=torch.bfloat16), paged_cache(rng, [length], 1, 16, 64, torch.bfloat16), 0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("score", [-1e4, 1e4])
def test_one_key_dominates(dtype, score):
    """One score of +-1e4 among zeros: the result is that key's value, or the mean of all others."""
    rng = generator(3)
    # 1100 keys are more splits than `_combine` takes at a time.
    for length, place in [(130, place) for place in (0, 17, 63, 64, 129)] + [(1100, 0), (1100, 1099)]:
        cache = paged_cache(rng, [length], 1, 32, 16, dtype)
        page, slot = int(cache.block_table[0, place // 16]), place % 16
        cache.k_cache[cache.block_table[0, : -(-length // 16)].long()] = 0
        cache.k_cache[page, 0, slot, 0] = 100
        q = torch.zeros(1, 3, 32, dtype=dtype, device=DEVICE)
        q[..., 0] = score / 100
        out = check_case(q, cache, 1.0)
        if score > 0:
            assert_same(cache.v_cache[page, 0, slot].expand(3, 32), found=out.view(3, 32))


@pytest.mark.parametrize("programs", [1, 4, 64])
@pytest.mark.parametrize("offset", [-4096, 333, 8191])
def test_a_constant_added_to_every_score_changes_no_bit(offset, programs):
    """Softmax depends on the differences of scores: exact in float32 at any magnitude here, before the scale."""
    rng = generator(7)
    cache = paged_cache(rng, [300], 1, 16, 16, torch.float16)
    pages = cache.block_table[0, : -(-300 // 16)].long()
    cache.k_cache[pages] = 0
    cache.k_cache[pages, ..., 0] = torch.randint(-9, 10, (len(pages), 1, 16), generator=rng).to(DEVICE).half() / 8
    cache.k_cache[pages, ..., 1] = 1
    q = torch.zeros(1, 2, 16, dtype=torch.float16, device=DEVICE)
    q[..., 0] = 1
    with shared_by(programs):
        expected = call(kernels.paged_attention, q, *cache, 0.3)
        q[..., 1] = offset
        assert_same(expected, found=call(kernels.paged_attention, q, *cache, 0.3))


@pytest.mark.parametrize("scale", [1e-4, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_huge_keys(dtype, scale):
    """Products of up to 1e7, of both signs: they overflow fp16, and any exponential without the maximum subtracted."""
    rng = generator(4)
    cache = paged_cache(rng, [100, 7], 2, 64, 32, dtype)
    cache.k_cache.mul_(1e3)
    check_case(normal(rng, 6, 8, 64, dtype=dtype, scale=1e3), cache, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("dim", [16, 80])
def test_the_newest_token_at_the_edges_of_tiles_and_pages(dtype, programs, dim):
    """A tile has 64 tokens, 16 in float32. A decode step loads the newest token apart from the others of its tile."""
    rng = generator(12)
    cache = paged_cache(rng, [1, 0, 2, 16, 17, 48, 49, 64, 65, 66, 129], 1, dim, 48, dtype)
    check_case(normal(rng, 11, 3, dim, dtype=dtype), cache, 0.3, programs)


@contextlib.contextmanager
def dependent_launch(written):
    """Runs every launch as a GPU with programmatic dependent launch may: before `gdc_wait`, the predecessor's work is
    not there yet, and each program finds NaN instead. `written`: kernel -> the tensors of that work, by the arguments.

    Yields the names of the functions that each program called, in order.
    """
    programs, now, interpret = [], [], interpreter.GridExecutor.__call__

    def executor(self, *args, **options):
        now[:] = written(self.fn.__name__, dict(zip(self.arg_names, args, strict=False)))
        return interpret(self, *args, **{**options, "PDL": True})

    def begin(self, *index):
        programs.append([])
        hidden[:] = [(x, x.clone()) for x in now]
        for x in now:
            x.fill_(torch.nan)
        return set_index(self, *index)

    def wait():
        programs[-1].append("wait")
        for x, value in hidden:
            x.copy_(value)
        hidden.clear()

    hidden, set_index = [], interpreter.InterpreterBuilder.set_grid_idx
    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", executor),
        mock.patch.object(interpreter.InterpreterBuilder, "set_grid_idx", begin),
        mock.patch.object(tl.extra.cuda, "gdc_wait", wait),
        mock.patch.object(tl.extra.cuda, "gdc_launch_dependents", lambda: programs[-1].append("trigger")),
    ):
        yield programs


needs_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="the interpreter shows what is read before the wait")


@needs_the_interpreter
@pytest.mark.op(name="paged_attention")
@settings(max_examples=25)
@given(launches(st.just(1), 16), st.sampled_from([1, 2, 4]))
def test_a_decode_step_reads_only_what_is_older_before_the_wait(launch, programs):
    """q, the newest token's key and value, and what the first launch leaves for the second come after the wait."""
    q, cache, scale = launch
    size, columns = cache.k_cache.shape[2], cache.block_table.shape[1]
    newest = [
        x[int(cache.block_table[b, (length - 1) // size]), :, (length - 1) % size]
        for b, length in enumerate(cache.seq_lens.tolist())
        for x in (cache.k_cache, cache.v_cache)
        if 0 < length <= columns * size
    ]

    def written(kernel, arguments):
        if kernel == "_attend":
            return [arguments["q_ptr"], *newest]
        return [arguments[name] for name in ("partial_ptr", "best_ptr", "total_ptr")]

    with shared_by(programs):
        expected = kernels.paged_attention(q, *cache, scale, decode_step=True)
        with dependent_launch(written) as called:
            found = kernels.paged_attention(q, *cache, scale, decode_step=True)
    assert_same(expected, found=found)
    assert all(each.count("wait") == 1 and "trigger" in each for each in called)


@needs_the_interpreter
@pytest.mark.parametrize("length", [0, 1, 64, 128, 129, 192, 193, 400])
def test_the_successor_starts_when_nothing_is_left_to_load(length):
    """Before the wait, where a split has one tile of 64 keys; after its last tile, where it has several."""
    cache = paged_cache(generator(13), [length], 1, 16, 16, torch.float16)
    q = normal(generator(14), 1, 3, 16, dtype=torch.float16)
    with shared_by(2), dependent_launch(lambda kernel, arguments: []) as called:
        kernels.paged_attention(q, *cache, 0.3, decode_step=True)
    early = [each[0] == "trigger" for each in called[:2]]
    assert early == [length <= 64 * (2 + split) for split in range(2)]
    assert all("trigger" in each for each in called)


@needs_the_interpreter
@pytest.mark.op(name="paged_attention")
@settings(max_examples=25)
@given(launches(st.just(1), 16), st.sampled_from([1, 2, 4]))
def test_a_decode_step_is_bit_identical_to_another_launch_with_its_tiles(launch, programs):
    q, cache, scale = launch
    with shared_by(programs):
        expected, found = (
            kernels.paged_attention(q, *cache, scale, batch_invariant=True, decode_step=step) for step in (False, True)
        )
    assert_same(expected, found=found)


@needs_the_interpreter
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_no_decode_step_reads_nothing_before_the_wait(tokens):
    """As the last row of a chunk: the chunk's other keys are of the same step, and so may be the length."""
    cache = paged_cache(generator(10), [70, 9], 2, 32, 16, torch.float32)
    q = normal(generator(11), 2 * tokens, 4, 32, dtype=torch.float32)
    expected = kernels.paged_attention(q, *cache, 0.3)

    def written(kernel, arguments):
        names = ("q_ptr", "k_ptr", "v_ptr") if kernel == "_attend" else ("partial_ptr", "best_ptr", "total_ptr")
        return [arguments[name] for name in names]

    with dependent_launch(written) as called:
        found = kernels.paged_attention(q, *cache, 0.3)
    assert_same(expected, found=found)
    assert all(each == ["trigger", "wait"] for each in called)


@backends
def test_idle_sequences_are_zero_whatever_the_table_has(backend):
    cache = paged_cache(generator(5), [0, 0, 0], 2, 32, 16, torch.float16)
    cache.block_table.fill_(-1)
    for tokens in (1, 5, 70):
        q = torch.full((3 * tokens, 4, 32), torch.nan, dtype=torch.float16, device=DEVICE)
        assert run(backend, "paged_attention", q, *cache, 1.0).eq(0).all()


@pytest.mark.op(name="paged_attention")
@settings(max_examples=20)
@given(seeds, dtypes, st.sampled_from([(1, 1), (1, 16), (2, 4), (4, 16), (5, 16)]), st.integers(5, 150))
def test_bits_depend_on_the_row_alone(seed, dtype, tokens_and_group, length):
    """Not on other sequences, other queries, the page size, the order of pages, or the size of the block table."""
    with shared_by(4):  # 150 keys are five tiles, ten in float32
        check_bits(seed, dtype, *tokens_and_group, length)


@pytest.mark.op(name="paged_attention")
@settings(max_examples=20)
@given(seeds, dtypes, st.sampled_from([1, 4, 16]), st.integers(1, 150))
def test_bits_of_a_decode_step_depend_on_the_row_alone(seed, dtype, group, length):
    with shared_by(4):
        check_bits(seed, dtype, 1, group, length, decode_step=True)


def check_bits(seed, dtype, tokens, group, length, **options):
    rng = generator(seed)
    q = normal(rng, tokens, group, 32, dtype=dtype)
    alone = paged_cache(rng, [length], 1, 32, 16, dtype)
    k, v = (x[alone.block_table[0, : -(-length // 16)].long()].transpose(1, 2).flatten(0, 1) for x in alone[:2])
    attend = functools.partial(kernels.paged_attention, batch_invariant=True, **options)
    expected = call(attend, q, *alone, 0.3)

    crowd = paged_cache(rng, [length + 70, length, 0, length - 1], 1, 32, 48, dtype)
    for b in (1, 3):
        for p in range(int(crowd.seq_lens[b])):
            page = int(crowd.block_table[b, p // 48])
            crowd.k_cache[page, :, p % 48], crowd.v_cache[page, :, p % 48] = k[p], v[p]
    queries = normal(rng, 4, tokens, group, 32, dtype=dtype)
    queries[1, -1] = q[-1]
    queries[3, -1] = q[-2] if tokens > 1 else 0
    found = call(attend, queries.flatten(0, 1), *crowd, 0.3).view(4, tokens, -1)
    assert_same(expected[-1], found=found[1, -1])
    if tokens > 1:
        assert_same(expected[-2], **{"the last but one of a launch, as the last of another": found[3, -1]})


@pytest.mark.parametrize("programs", [1, 8, 64])
@pytest.mark.parametrize(("tokens", "decode_step"), [(1, False), (1, True), (3, False), (40, False)])
@pytest.mark.parametrize(("long", "pages"), [(0, 10), (1, 10), (1, 5)])
def test_a_length_beyond_the_table_reads_what_the_table_has(tokens, decode_step, programs, long, pages):
    """As in a late replay of a graph: the other sequence is bit-identical, and this one is finite."""
    lengths = [70, 70]
    lengths[long] = 16 * pages
    cache = paged_cache(generator(8), lengths, 1, 32, 16, torch.bfloat16)
    cache = cache._replace(block_table=cache.block_table[:, :pages].contiguous())
    q = normal(generator(9), 2 * tokens, 4, 32, dtype=torch.bfloat16)
    with shared_by(programs):
        expected = call(kernels.paged_attention, q, *cache, 0.3, decode_step=decode_step).view(2, tokens, -1)
        cache.seq_lens[long] = 5000
        found = call(kernels.paged_attention, q, *cache, 0.3, decode_step=decode_step).view(2, tokens, -1)
    assert_same(expected[1 - long], found=found[1 - long])
    assert_same(expected[long, -1], found=found[long, -1])  # the last row sees all keys, before and now
    assert found.isfinite().all()


def test_page_ids_outside_the_cache_do_no_harm():
    rng = generator(6)
    cache = paged_cache(rng, [20, 20, 20], 2, 32, 16, torch.float32)
    q = normal(rng, 3, 4, 32, dtype=torch.float32)
    expected = run("reference", "paged_attention", q, *cache, 1.0)
    cache.block_table[0], cache.block_table[2] = -(2**31), 2**31 - 1
    torch.testing.assert_close(call(kernels.paged_attention, q, *cache, 1.0)[1], expected[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 64)}, ValueError, r"q has shape \[2, 64\]"),
        ({"q": torch.zeros(2, 4, 16).double()}, TypeError, "q is torch.float64; kernels take"),
        ({"q": torch.zeros(3, 4, 16)}, ValueError, "q has 3 rows, must be a multiple of the 2 sequences"),
        ({"q": torch.zeros(2, 3, 16)}, ValueError, "q has 3 heads, must be a multiple of the 2 of k_cache"),
        ({"q": torch.zeros(2, 4, 32)}, ValueError, r"k_cache has shape \[4, 2, 16, 16\], must have .* 32\]"),
        ({"q": torch.zeros(0, 4, 16)}, ValueError, "none may be empty"),
        ({"q": torch.zeros(2, 16, 4).mT}, ValueError, "q has strides .* last dimension must be contiguous"),
        ({"k_cache": torch.zeros(4, 2, 16, 16).half()}, TypeError, "k_cache is torch.float16, must be torch.float32"),
        ({"v_cache": torch.zeros(4, 2, 8, 16)}, ValueError, r"v_cache has shape \[4, 2, 8, 16\]"),
        ({"v_cache": torch.zeros(4, 16, 2, 16).transpose(1, 2)}, ValueError, "must have those of k_cache"),
        ({"block_table": torch.zeros(2, 3).long()}, TypeError, "block_table is torch.int64, must be torch.int32"),
        ({"block_table": torch.zeros(2, 0).int()}, ValueError, "none may be empty"),
        ({"seq_lens": torch.zeros(3).int()}, ValueError, r"seq_lens has shape \[3\], must have \[2\]"),
        ({"scale": -1.0}, ValueError, "scale is -1.0, must be positive"),
        (
            {"q": torch.zeros(4, 4, 16), "decode_step": True},
            ValueError,
            "q has 2 rows for each .*; a decode_step has 1",
        ),
    ],
)
def test_bad_input(change, error, message):
    good = {
        "q": torch.zeros(2, 4, 16),
        "k_cache": torch.zeros(4, 2, 16, 16),
        "v_cache": torch.zeros(4, 2, 16, 16),
        "block_table": torch.zeros(2, 3).int(),
        "seq_lens": torch.zeros(2).int(),
        "scale": 1.0,
    }
    args = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in {**good, **change}.items()}
    with pytest.raises(error, match=message):
        kernels.paged_attention(**args)


@pytest.mark.parametrize("dim", [24, 272])
def test_head_dim_must_divide_by_16_up_to_256(dim):
    ids = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    cache = torch.zeros(1, 1, 16, dim, device=DEVICE)
    with pytest.raises(ValueError, match=f"q has head_dim {dim}, must be a multiple of 16 up to 256"):
        kernels.paged_attention(torch.zeros(1, 1, dim, device=DEVICE), cache, cache, ids, ids[0], 1.0)
