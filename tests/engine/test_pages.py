"""Pages and the caches on them: exact accounting, no page with two owners, and errors that change nothing."""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm3 import InternLM3Config, InternLM3ForCausalLM
from internlm3.runtime.compat.cache import KVCache
from internlm3.runtime.engine.pages import PageAllocator
from internlm3.runtime.model.kv_cache import PAGE, PagedKVCache, page_bytes, pages_of
from internlm3.tests.support.engine import shorten_chunks

CONFIG = InternLM3Config(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
CPU = torch.device("cpu")


def kv_cache(count, **options):
    return PagedKVCache(CONFIG, count, torch.float32, CPU, **options)


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.randoms(use_true_random=False))))
def test_every_page_is_free_or_allocated_once(count, steps):
    """Random allocations and releases compared with a plain set; a contiguous run wherever one is long enough."""
    pool, holders, free = PageAllocator(count), [], set(range(count))
    for taking, size, rng in steps:
        if taking and size <= len(free):
            runs = [first for first in range(count - size + 1) if free >= set(range(first, first + size))]
            taken = pool.allocate(size)
            assert len(taken) == len(set(taken)) == size and free >= set(taken)
            if runs and size:
                assert taken == list(range(runs[0], runs[0] + size))
            free -= set(taken)
            holders.append(taken)
        elif taking:
            with pytest.raises(
                ValueError, match=f"{size} pages of {PAGE} tokens are needed, and {len(free)} of {count}"
            ):
                pool.allocate(size)
        elif holders:
            released = holders.pop(rng.randrange(len(holders)))
            rng.shuffle(released)
            pool.release(released)
            free |= set(released)
        assert pool.free == len(free)
    for pages in holders:
        pool.release(pages)
    assert pool.allocate(count) == list(range(count))


def test_releasing_many_pages_compares_few():
    """An answer without max_tokens has pages for a whole window, and their release holds up every other answer."""
    compared = 0

    class Page(int):
        __hash__ = int.__hash__

        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return int(self) == other

    pool = PageAllocator(500)
    pool.release([Page(page) for page in pool.allocate(500)])
    assert pool.free == 500 and compared < 5 * 500
    pool.retain([7, 8, 7])
    for wrong in ([7, 7, 7], [7, 8, 8], [7, 500], [-1]):
        with pytest.raises(ValueError, match=rf"page {wrong[-1]} of 500 is released, and it is not in use"):
            pool.release(wrong)
    pool.release([7, 8, 7])
    assert pool.free == 500


@given(st.integers(1, 24), st.integers(0, 30), st.randoms(use_true_random=False))
def test_a_run_evicts_the_least_recently_used_pages(size, prompts, rng):
    """A full pool gives runs too, and evicts little else than the least recently used; compared with brute force."""
    pool, in_use, evictable = PageAllocator(30), [], []
    for number in range(prompts):
        count = rng.randint(1, 6)
        if count <= pool.free:
            in_use.append(pool.allocate(count))
            evictable = [page for page in evictable if page not in in_use[-1]]
            if rng.random() < 0.8:
                pool.register_prefix(in_use[-1], [number] * count * PAGE, b"")
        if in_use and rng.random() < 0.7:
            released = in_use.pop(rng.randrange(len(in_use)))
            pool.release(released)
            evictable += [page for page in reversed(released) if page in pool._digest_of]
    free = set(range(30)).difference(*in_use)
    if size > len(free):
        return
    expected = [*sorted(free - set(evictable)), *evictable][:size]
    for evicted in reversed(range(0, len(evictable) + size, size)):
        may = free - set(evictable[evicted:])
        runs = [first for first in range(31 - size) if may >= set(range(first, first + size))]
        expected = list(range(runs[0], runs[0] + size)) if runs else expected
    assert pool.allocate(size) == expected


@pytest.mark.parametrize("wrong", [[1, 5], [2, 2], [1, 8], [1, -1]], ids=str)
def test_a_page_that_is_not_in_use_is_not_released(wrong):
    """Released twice, listed twice, or out of range: an error that names it, and the others stay in use."""
    pool = PageAllocator(8)
    pool.allocate(5)
    with pytest.raises(ValueError, match=f"page {wrong[1]} of 8 is released, and it is not in use"):
        pool.release(wrong)
    assert pool.free == 3
    pool.release([1, 2])
    with pytest.raises(ValueError, match="page 1 of 8 is released"):
        pool.release([1])


def test_a_cache_grows_by_moving_its_pages():
    cache = KVCache(kv_cache(3), [[1], [2, 0]], [40, 100])
    for kv in cache.kv_cache.layers:
        kv.copy_(torch.randn(kv.shape))
    before = [[kv[:, pages].clone() for pages in cache.pages] for kv in cache.kv_cache.layers]
    cache.reserve(24)
    assert cache.pages == [[1], [2, 0]]  # there is room
    cache.reserve(29)
    assert cache.pages == [[0, 1, 2], [3, 4, 5]] and cache.kv_cache.spare == 6
    for kv, rows in zip(cache.kv_cache.layers, before, strict=True):
        for pages, was in zip(cache.pages, rows, strict=True):
            assert torch.equal(kv[:, pages[: was.shape[1]]], was)


def test_the_metadata_of_a_launch():
    lengths = [PAGE * 4 - 1, PAGE * 2 - 1]
    cache = KVCache(kv_cache(10), [[5, 6, 7, 8], [0, 1]], lengths, inv_freq=torch.zeros(2, 8))
    batch = cache.batch(range(2), 1, None)
    assert batch.block_table.tolist() == [[5, 6, 7, 8], [0, 1, 0, 0]] and batch.seq_lens.tolist() == [256, 128]
    assert cache.batch([1], 1, None).block_table.tolist() == [[0, 1, 0, 0]]
    assert cache.batch([1, 0], 1, None).block_table.tolist() == [[0, 1, 0, 0], [5, 6, 7, 8]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = InternLM3ForCausalLM(CONFIG, dtype=torch.float32)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.mul_(5)
    return model


def filled(model, lengths, order):
    """One cache of random sequences, each prefilled by itself, on pages that `order` arranges."""
    pool = kv_cache(64)
    for kv in pool.layers:
        kv.fill_(torch.nan)
    free = list(range(64))
    order(free)
    caches = []
    for seed, length in enumerate(lengths):
        pages = [free.pop() for _ in range(pages_of(length + 8))]
        cache = KVCache(pool, [pages])
        ids = torch.randint(50, (1, length), generator=torch.Generator().manual_seed(seed))
        for chunk in ids.split(100, dim=1):
            model(chunk, past_key_values=cache)
        caches.append(cache)
    inv_freq = torch.cat([cache.inv_freq for cache in caches])
    together = KVCache(pool, [cache.pages[0] for cache in caches], list(lengths), inv_freq)
    together.real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return together


def test_logits_do_not_depend_on_the_pages(model):
    """Contiguous, shuffled and reversed pages: bit-identical logits of some more tokens."""
    lengths, found = [130, 5, 64, 63], []
    for order in (lambda free: free.reverse(), list.sort, random.Random(0).shuffle):
        cache = filled(model, lengths, order)
        step = torch.tensor([[1], [2], [3], [4]])
        positions = torch.tensor(lengths)[:, None]
        logits = []
        for i in range(3):
            mask = torch.nn.functional.pad(cache.real, (0, 1), value=True)
            logits.append(model(step + i, mask, position_ids=positions + i, past_key_values=cache).logits)
        found.append(torch.cat(logits, 1))
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_scratch_cache_has_one_layers_memory():
    whole, scratch = kv_cache(4), kv_cache(4, scratch=True)
    assert len({kv.data_ptr() for kv in whole.layers}) == 3 == len(whole.layers)
    assert len({kv.data_ptr() for kv in scratch.layers}) == 1 and len(scratch.layers) == 3


def peak_bytes(run):
    """Peak memory of the tensors that `run` allocates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_prompts_cache_is_never_copied(rows, monkeypatch):
    """Pages are allocated before; prefill in chunks and some steps need far less memory than a second copy."""
    shorten_chunks(monkeypatch, 64, 64)
    values = {**CONFIG.to_dict(), "num_key_value_heads": 8, "num_attention_heads": 8, "head_dim": 64}
    model = InternLM3ForCausalLM(InternLM3Config.from_dict(values), dtype=torch.float32)
    ids = torch.randint(50, (rows, 630), generator=torch.Generator().manual_seed(0))
    prompt = pages_of(630) * page_bytes(model.config, torch.float32)
    model.engine(4, 1024)
    options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": []}
    assert peak_bytes(lambda: model.generate(ids, torch.ones_like(ids), **options)) < prompt / 2
