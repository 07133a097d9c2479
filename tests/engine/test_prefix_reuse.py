"""Prefix reuse: a prompt that begins like an earlier sequence computes only what comes after their common pages."""

import random

import pytest
import torch

from internlm3.kernels import cpu
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.model.kv_cache import PAGE
from internlm3.tests.support.capture import Recorder
from internlm3.tests.support.engine import alone, ask, count_tokens, ids, random_model, result, run, shorten_chunks


@pytest.fixture(scope="module")
def model():
    """float32: pages that decoding wrote differ from a prefill's in the last bits only, which choose no other token."""
    return random_model(torch.float32)


@pytest.fixture
def exact():
    """A model that promises bits."""
    model = random_model()
    model.model.batch_invariant = True
    return model


def same(request, model):
    """Whether an answer is that of an engine without any other request; log-probabilities but for rounding."""
    tokens, logprobs, top_logprobs, *rest = alone(model, request)
    assert request.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert request.top_logprobs == [pytest.approx(expected, abs=1e-4) for expected in top_logprobs]
    return [request.token_ids, *result(request)[3:]] == [tokens, *rest]


# -------------------------------------------------------------------- a conversation


def test_a_turn_prefills_what_is_new_and_less_than_a_page_more(model, monkeypatch):
    """Ten turns of any lengths; the tokens of prompts and answers alike are there."""
    engine, turn, known = Engine(model, max_batch_size=2, max_seq_len=1024), [], 0
    rng = random.Random(3)
    for number in range(10):
        turn = turn + ids(rng.randint(1, 90), number)
        prefilled = count_tokens(monkeypatch, model)
        request = ask(turn, rng.randint(1, 40))
        (_,) = run(engine, request)
        assert sum(prefilled) - (len(request.token_ids) - 1) == len(turn) - request.cached_tokens
        assert len(turn) - request.cached_tokens <= len(turn) - known + PAGE
        assert request.cached_tokens == max(known - 1, 0) // PAGE * PAGE
        assert same(request, model)
        turn = turn + request.token_ids
        known = len(turn)
    assert known > 500


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 200])
def test_the_same_prompt_again(model, length):
    """All pages are reused but that of the last token, which must run."""
    engine = Engine(model, max_batch_size=2, max_seq_len=512)
    (one,), (two,) = run(engine, ask(ids(length))), run(engine, ask(ids(length)))
    assert two.cached_tokens == (length - 1) // PAGE * PAGE
    assert same(one, model) and same(two, model)


@pytest.mark.parametrize("place", [0, 63, 64, 100, 170, 200, 230])
def test_an_edit_reuses_the_pages_before_it(model, place):
    """In the prompt or in the answer."""
    engine, first = Engine(model, max_batch_size=2, max_seq_len=512), ids(200)
    (request,) = run(engine, ask(first, 60))
    whole = first + request.token_ids
    edited = [*whole[:place], (whole[place] + 1) % 320, *whole[place + 1 :]]
    (request,) = run(engine, ask(edited))
    assert request.cached_tokens == place // PAGE * PAGE
    assert same(request, model)


def test_other_sampling_finds_the_same_pages(model):
    engine, prompt = Engine(model, max_batch_size=2, max_seq_len=512), ids(100)
    (one,) = run(engine, ask(prompt, 40, temperature=1.0, seed=1, repetition_penalty=1.3))
    (two,) = run(engine, ask(prompt + one.token_ids, 10, logprobs=3))
    assert two.cached_tokens == 128 and same(two, model)


def test_a_cancelled_answer_is_continued(model):
    engine, prompt = Engine(model, max_batch_size=2, max_seq_len=512), ids(100)
    engine.add([broken := ask(prompt, 100)])
    for _ in range(40):
        engine.step()
    engine.cancel([broken])
    (request,) = run(engine, ask(prompt + broken.token_ids + ids(5, 1)))
    assert request.cached_tokens == 128 and same(request, model)


def test_an_answer_cut_by_its_reader_is_continued(model):
    """A stop string ends an answer some tokens after the host has read it: what was written after that is forgotten."""
    engine, prompt = Engine(model, max_batch_size=2, max_seq_len=512), ids(100)
    engine.add([cut := ask(prompt, 100)])
    for _ in range(60):
        engine.step()
    cut.truncate(30)
    cut.finish("stop")
    engine.cancel([cut])
    (request,) = run(engine, ask(prompt + cut.token_ids + ids(50, 1)))
    assert request.cached_tokens == 128 and same(request, model)


def test_an_answer_that_was_an_error_is_not_reused(model):
    engine, prompt = Engine(model, max_batch_size=2, max_seq_len=512), ids(60)
    (request,) = run(engine, ask(prompt, 60, allowed_token_ids=[7]))
    broken = ask(prompt, 60, allowed_token_ids=[8, 9])
    engine.add([broken])
    for _ in range(30):
        engine.step()
    broken.finish("error", "as NaN would")
    engine.cancel([broken])
    (again,) = run(engine, ask(prompt + broken.token_ids))
    assert again.cached_tokens == 0 and same(again, model)
    (again,) = run(engine, ask(prompt + request.token_ids))
    assert again.cached_tokens == 64 and same(again, model)


# -------------------------------------------------------------------- a prompt that is in the cache whole


@pytest.mark.parametrize("invariant", [False, True], ids=["pages", "bits"])
@pytest.mark.parametrize("length", [1, 64, 65, 128, 150, 192, 256])
def test_answers_to_a_prompt_that_is_cached_whole(model, exact, monkeypatch, length, invariant):
    """Another sequence began with all of its tokens. Three answers share its pages; only the last token's page runs."""
    shorten_chunks(monkeypatch, 2 * PAGE)
    model, unit = (exact, 2 * PAGE) if invariant else (model, PAGE)
    engine, prompt = Engine(model, max_batch_size=4, max_seq_len=512), ids(length)
    (longer,) = run(engine, ask(prompt + ids(300 - length, 1), 5))
    cached = (length - 1) // unit * unit
    for _ in range(2):
        tokens = count_tokens(monkeypatch, model)
        answers = [ask(prompt, answer=answer, temperature=1.0, seed=5, logprobs=2) for answer in range(3)]
        engine.add(answers)
        engine.step()
        assert tokens == [length - cached]
        whole = length // PAGE
        # The whole pages are shared, and each answer has pages of its own to write.
        assert len(engine.pages) - engine.pages.free == whole + 3
        run(engine)
        while engine.busy:
            engine.step()
        assert [answer.cached_tokens for answer in answers] == [cached, length, length]
        assert len({tuple(answer.token_ids) for answer in answers}) == 3
        for answer in answers:
            assert result(answer) == alone(model, answer) if invariant else same(answer, model)
    (again,) = run(engine, ask(longer.prompt_ids, 5))
    assert again.token_ids == longer.token_ids


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("length", [64, 128, 130])
def test_the_same_prompt_while_its_answer_is_under_way(model, monkeypatch, captured, length):
    """The page of the prompt's last token is computed again, and the answer that still reads it does not notice."""
    options = {"capture": Recorder(monkeypatch).capture} if captured else {}
    engine, prompt = Engine(model, max_batch_size=3, max_seq_len=512, **options), ids(length)
    engine.add([first := ask(prompt, 60, logprobs=1)])
    for _ in range(10):
        engine.step()
    engine.add([second := ask(prompt, 60, temperature=1.0, seed=3, answer=1)])
    for _ in range(5):
        engine.step()
    engine.add([third := ask(prompt + first.token_ids[:5], 40)])
    while engine.busy:
        engine.step()
    assert second.cached_tokens == third.cached_tokens == (length - 1) // PAGE * PAGE or length % PAGE == 0
    assert all(same(request, model) for request in (first, second, third))


def test_a_cached_prompt_of_one_whole_page_runs_it_again(model, monkeypatch):
    """Nothing is left of the cache then, and the answer is the same."""
    engine, prompt = Engine(model, max_batch_size=2, max_seq_len=512), ids(PAGE)
    (one,) = run(engine, ask(prompt))
    tokens = count_tokens(monkeypatch, model)
    (two,) = run(engine, ask(prompt))
    assert tokens[0] == PAGE and two.cached_tokens == 0 and two.token_ids == one.token_ids


# -------------------------------------------------------------------- several at a time


@pytest.mark.parametrize("batched", [False, True])
def test_prompts_that_begin_alike_and_arrive_together(model, monkeypatch, batched):
    """The first fills the common pages; the others then run together, where batching changes no promise."""
    monkeypatch.setattr(cpu, "ROW_COUNT_CHANGES_BITS", not batched)
    engine, common = Engine(model, max_batch_size=8, max_seq_len=512), ids(150)
    lengths = (30, 31, 70, 33, 32, 29)
    requests = [ask(common + ids(length, length)) for length in lengths]
    launched = count_tokens(monkeypatch, model)
    engine.add(requests)
    engine.step()
    left = [150 + length - (128 if number else 0) for number, length in enumerate(lengths)]
    expected = [left[0], left[2], 4 * max(left[1:2] + left[3:])] if batched else left
    assert sorted(launched) == sorted(expected)
    run(engine)
    while engine.busy:
        engine.step()
    assert all(same(request, model) for request in requests)


def test_answers_to_one_prompt_prefill_it_once(model, monkeypatch):
    engine, prompt = Engine(model, max_batch_size=4, max_seq_len=512), ids(150)
    tokens = count_tokens(monkeypatch, model)
    requests = [ask(prompt, answer=answer, temperature=1.0, seed=5) for answer in range(4)]
    engine.add(requests)
    engine.step()
    assert tokens == [150]
    # Two whole pages are shared; each answer has a page of its own to write.
    assert len(engine.pages) - engine.pages.free == 2 + 4
    while engine.busy:
        engine.step()
    assert len({tuple(request.token_ids) for request in requests}) == 4
    assert all(same(request, model) for request in requests)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_conversations_that_branch_while_others_run(model, monkeypatch, captured, seed):
    """Random continuations, edits, cancels and evictions, in a cache that holds a few of them."""
    rng = random.Random(seed)
    monkeypatch.setattr(cpu, "ROW_COUNT_CHANGES_BITS", rng.random() < 0.5)
    shorten_chunks(monkeypatch, 128, 256)
    options = {"capture": Recorder(monkeypatch).capture, "depth": 2} if captured else {}
    engine = Engine(model, max_batch_size=4, max_seq_len=512, cache_tokens=1024, **options)
    texts, running, ended = [ids(200, seed)], [], []
    for number in range(25):
        while len(running) < 4:
            past = rng.choice(texts)
            prompt = past[: rng.randint(0, len(past))] + ids(rng.choice([1, 5, 60, 130]), number)
            running.append(ask(prompt[-480:], rng.randint(1, 30)))
            engine.add(running[-1:])
        for _ in range(rng.randint(1, 12)):
            engine.step()
        if rng.random() < 0.2:
            engine.cancel([rng.choice(running)])
        ended += [request for request in running if request.finish_reason]
        running = [request for request in running if not request.finish_reason]
        texts += [request.prompt_ids + request.token_ids for request in ended[-3:]]
    assert sum(request.cached_tokens > 0 for request in ended) > 5
    for request in ended:
        expected = alone(model, request)
        assert request.token_ids == expected[0][: len(request.token_ids)]
        assert request.logprobs == pytest.approx(expected[1][: len(request.logprobs)], abs=1e-4)


def test_prompts_with_different_rotary_bases_share_no_pages():
    model = random_model(
        torch.float32, max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 4.0}
    )
    engine, prompt = Engine(model, max_batch_size=2, max_seq_len=512), ids(200)
    for length, cached in ((200, 0), (199, 0), (200, 192), (150, 0), (199, 192)):
        (request,) = run(engine, ask(prompt[:length]))
        assert request.cached_tokens == cached
        assert same(request, model)


# -------------------------------------------------------------------- where bits are promised


def test_batch_invariance_reuses_what_has_the_same_bits(exact, monkeypatch):
    """Whole chunks of prompts: bit-identical to a fresh prefill, log-probabilities included."""
    shorten_chunks(monkeypatch, 2 * PAGE)
    engine, prompt = Engine(exact, max_batch_size=2, max_seq_len=1024), ids(300)
    (one,) = run(engine, ask(prompt, 100))
    turn = prompt + one.token_ids
    for length, cached in ((129, 128), (257, 256), (300, 256), (400, 256), (256, 128)):
        (request,) = run(engine, ask(turn[:length] + ids(0)))
        assert request.cached_tokens == cached
        assert result(request) == alone(exact, request)
