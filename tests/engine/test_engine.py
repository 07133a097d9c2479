"""The engine: requests join and leave between steps, each gets what it gets alone, and no page is lost."""

import contextlib
import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import batching
from internlm3.kernels import triton
from internlm3.kernels.cpu import ROW_COUNT_CHANGES_BITS
from internlm3.kernels.reference import FEW_ROWS
from internlm3.runtime.engine.answer import Answer
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.graphs import StepQueue, cuda_graphs
from internlm3.runtime.engine.pages import page_budget
from internlm3.runtime.model import model as runtime_model
from internlm3.runtime.model.kv_cache import PAGE, page_bytes, pages_of
from internlm3.runtime.model.model import Decoder
from internlm3.tests.support.capture import Recorder
from internlm3.tests.support.engine import alone, ask, count_tokens, ids, random_model, result, run, shorten_chunks


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of one page, so that short prompts have several."""
    shorten_chunks(monkeypatch, PAGE, PAGE)


# -------------------------------------------------------------------- prefill


@pytest.mark.skipif(ROW_COUNT_CHANGES_BITS, reason="on this CPU the number of rows may change rounding")
def test_short_prompts_are_batched(model, monkeypatch):
    """Prompts of similar lengths, up to a bound; one of up to 16 tokens runs alone."""
    shorten_chunks(monkeypatch, 192, 192)
    engine = Engine(model, max_batch_size=8, max_seq_len=512)
    requests = [ask(ids(length, length)) for length in (50, 45, 16, 40, 51, 39, 37, 36, 38)]
    tokens = count_tokens(monkeypatch, model)
    engine.add(requests)
    engine.step()
    assert tokens == [16, 3 * 51, 4 * 40]  # the last prompt waits for a slot
    while engine.busy:
        engine.step()
    for request in requests:
        assert result(request) == alone(model, request)


def test_prompts_run_in_captured_launches(model, monkeypatch):
    """Padded to a few widths and replayed: the same answers, while another request decodes."""
    shorten_chunks(monkeypatch, 256, 256)
    lengths = (1, 15, 16, 17, 64, 65, 130, 255, 256, 257, 300, 500)
    prompts = {length: ids(length, length) for length in lengths}
    expected = {length: alone(model, ask(prompt))[0] for length, prompt in prompts.items()}
    turn = ask(prompts[500][:300] + ids(30, 31))  # shares its first chunk with another prompt
    its_tokens = alone(model, turn)[0]
    neighbour = ask(ids(90, 7), 120)
    its_answer = alone(model, neighbour)[0]

    recorder = Recorder(monkeypatch)
    engine = Engine(model, max_batch_size=2, max_seq_len=512, capture=recorder.capture)
    engine.warm_up()
    engine.add([neighbour])
    launched = count_tokens(monkeypatch, model)
    for length, prompt in prompts.items():
        (request,) = run(engine, ask(prompt))
        assert request.token_ids == expected[length], length
    while engine.busy:
        engine.step()
    assert neighbour.token_ids == its_answer
    run(engine, turn)
    assert turn.token_ids == its_tokens and turn.cached_tokens == 256
    assert launched == [], "all is replayed"


def test_which_prompts_can_be_batched(model, monkeypatch):
    assert not model.model.can_batch_prompts(FEW_ROWS)
    assert model.model.can_batch_prompts(FEW_ROWS + 1) != ROW_COUNT_CHANGES_BITS
    monkeypatch.setattr(runtime_model, "for_device", lambda _: triton)
    on_a_gpu = Decoder(model.config, device="meta")
    assert on_a_gpu.can_batch_prompts(FEW_ROWS + 1) and not on_a_gpu.can_batch_prompts(FEW_ROWS)
    on_a_gpu.batch_invariant = True
    assert not on_a_gpu.can_batch_prompts(FEW_ROWS + 1)


# -------------------------------------------------------------------- waiting


def test_requests_wait_for_pages(model):
    """Pages for one window, five requests that need most of it: they run one after the other, and none fails."""
    engine = Engine(model, max_batch_size=4, max_seq_len=512, cache_tokens=512)
    requests = run(engine, *(ask(ids(300, seed), 100) for seed in range(5)))
    assert [request.finish_reason for request in requests] == ["length"] * 5
    assert result(requests[4]) == alone(model, requests[4])
    assert engine.pages.free == len(engine.pages) == 8


@pytest.mark.parametrize("tail", [[], [1, 2]], ids=["same prompt", "same beginning"])
def test_a_request_that_waits_for_pages_uses_none(model, tail):
    """Nor the pages of its prefix, which it would share."""
    engine = Engine(model, max_batch_size=4, max_seq_len=512, cache_tokens=512)
    requests = [ask(prompt, 40) for prompt in (ids(200), ids(200, 1), ids(200) + tail)]
    engine.add(requests)
    while requests[1].began == 0:
        engine.step()
    assert engine.pages.free == 0 and requests[0].finish_reason is None and requests[2].token_ids == []
    engine.cancel(requests[:2])
    assert engine.pages.free == len(engine.pages)
    while engine.busy:
        engine.step()
    assert result(requests[2]) == alone(model, requests[2])


def test_a_request_that_can_never_fit_is_refused_at_once(model):
    engine = Engine(model, max_batch_size=4, max_seq_len=100)
    with pytest.raises(ValueError, match="a prompt of 90 tokens and 11 more are 101, and the window is 100"):
        engine.add([ask(ids(5)), ask(ids(90), 11)])
    assert not engine.busy


@pytest.mark.parametrize(
    ("huge", "plain"),
    [({"top_k": 2**63 - 1}, {"top_k": 0}), ({"min_tokens": 2**31}, {"min_tokens": 8})],
    ids=["top_k", "min_tokens"],
)
def test_a_huge_setting_means_what_a_large_one_means(model, huge, plain):
    """Whatever the device's integers hold; and the caller beside it gets its own answer."""
    engine = Engine(model, max_batch_size=2, max_seq_len=64)
    settings, neighbour = {"temperature": 1.0, "seed": 3}, ask(ids(9, 2))
    (one, _), (other,) = (
        run(engine, ask(ids(5), **settings, **huge), neighbour),
        run(engine, ask(ids(5), **settings, **plain)),
    )
    assert one.token_ids == other.token_ids and result(neighbour) == alone(model, neighbour)


def test_the_page_budget_and_its_errors(model, monkeypatch):
    with pytest.raises(ValueError, match="cache_tokens is 100, less than one window: max_seq_len is 512"):
        Engine(model, max_seq_len=512, cache_tokens=100)
    each = page_bytes(model.config, torch.bfloat16)
    assert each == 2 * 2 * 2 * 16 * 2 * PAGE
    monkeypatch.setattr("internlm3.runtime.engine.pages.free_memory", lambda device: 20 * each)
    where = (model.config, torch.bfloat16, torch.device("cpu"))
    assert page_budget(*where, batch_size=1, max_seq_len=512) == 8
    assert page_budget(*where, batch_size=4, max_seq_len=512) == 10  # half of what is free
    assert page_budget(*where, batch_size=1, max_seq_len=512, cache_tokens=1200) == 19
    with pytest.raises(
        MemoryError, match=r"KV cache of 1,000 tokens needs 0.00 GB \(256 bytes a token\).*lower max_seq"
    ):
        page_budget(*where, batch_size=1, max_seq_len=1000)
    with pytest.raises(MemoryError, match="lower cache_tokens"):
        page_budget(*where, batch_size=1, max_seq_len=512, cache_tokens=1300)


def test_slots_that_do_not_fit_into_memory(model, monkeypatch):
    """A slot has counts of 50 tokens twice and biases of 50, padded to 52 each; a window of 512 tokens; and more."""
    pages = page_budget(model.config, model.dtype, model.device, batch_size=1, max_seq_len=512, cache_tokens=512)
    free = pages * page_bytes(model.config, model.dtype) + 10 * 4 * (3 * 52 + 512)
    monkeypatch.setattr("internlm3.runtime.engine.runner.free_memory", lambda device: free)
    with pytest.raises(MemoryError, match=r"max_batch_size is 10: .* bytes a slot.* beside the KV cache: lower max_b"):
        Engine(model, max_batch_size=10, max_seq_len=512, cache_tokens=512)
    monkeypatch.setattr("internlm3.runtime.engine.runner.free_memory", lambda device: 2 * free)
    Engine(model, max_batch_size=10, max_seq_len=512, cache_tokens=512)


# -------------------------------------------------------------------- cancels and errors


def test_cancelled_requests_free_their_slots_and_pages_at_once(model):
    engine = Engine(model, max_batch_size=2, max_seq_len=512)
    one, two, three = (ask(ids(70, seed), 50) for seed in range(3))
    engine.add([one, two, three])
    for _ in range(5):
        engine.step()
    engine.cancel([one, three])
    assert (one.finish_reason, three.finish_reason) == ("abort", "abort") and three.token_ids == []
    assert len(engine.pages) - engine.pages.free == pages_of(120)
    have = len(one.token_ids)
    engine.add([four := ask(ids(10, 4), 5)])
    while engine.busy:
        engine.step()
    assert len(one.token_ids) == have and engine.pages.free == len(engine.pages)
    assert result(two) == alone(model, two) and result(four) == alone(model, four)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_step_ends_every_request_and_leaves_the_engine_as_new(model, monkeypatch, error):
    engine = Engine(model, max_batch_size=2, max_seq_len=512)
    requests = [ask(ids(100, seed), 20) for seed in range(3)]
    engine.add(requests)
    for _ in range(3):
        engine.step()
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(model, "head", lambda x: (_ for _ in ()).throw(error("in a step")))
        engine.step()
    assert [request.finish_reason for request in requests] == ["abort"] * 3
    assert not engine.busy and engine.pages.free == len(engine.pages)
    (again,) = run(engine, ask(ids(100)))
    assert again.cached_tokens == 0 and result(again) == alone(model, again)


def test_slots_that_an_error_freed_write_no_page(model, monkeypatch):
    """A captured step of four runs for three requests then: the fourth slot's old pages hold another prompt."""
    engine = Engine(model, max_batch_size=4, max_seq_len=512, capture=lambda step: (step(), step)[1], depth=2)
    engine.add([ask(ids(100, seed), 20) for seed in range(4)])
    for _ in range(3):
        engine.step()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(model, "head", lambda x: (_ for _ in ()).throw(RuntimeError("in a step")))
        engine.step()
    requests = run(engine, *(ask(ids(256, seed), 6) for seed in range(3)))
    assert [result(request) for request in requests] == [alone(model, request) for request in requests]


def test_threads_share_steps_and_get_their_own_answers(model):
    engine = Engine(model, max_batch_size=4, max_seq_len=512)
    requests = [ask(ids(20 + seed, seed), 30, temperature=1.0, seed=seed) for seed in range(6)]
    begin = threading.Barrier(len(requests))

    def read(request):
        begin.wait()
        for _ in engine.run([Answer(request)]):
            pass

    threads = [threading.Thread(target=read, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result(request) for request in requests] == [alone(model, request) for request in requests]


def test_an_error_in_another_callers_step_is_reported(model, monkeypatch):
    engine = Engine(model, max_batch_size=2, max_seq_len=512)
    mine, other = ask(ids(5)), ask(ids(6))
    updates = engine.run([Answer(mine)])
    next(updates)
    engine.add([other])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "head", lambda x: (_ for _ in ()).throw(KeyboardInterrupt))
        engine.step()
    with pytest.raises(RuntimeError, match="broken off by an error in a step shared with other calls"):
        next(updates)
    again = ask(mine.prompt_ids)
    for _ in engine.run([Answer(again)]):
        pass
    assert result(again) == alone(model, again)


def test_requests_wait_for_slots(model):
    requests = [ask(ids(70), answer=answer, temperature=1.0, seed=4) for answer in range(6)]
    run(Engine(model, max_batch_size=2, max_seq_len=512), *requests)
    assert [result(request) for request in requests] == [alone(model, request) for request in requests]


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_as_few_steps_as_the_lengths_allow(model, monkeypatch, rows):
    """No slot is idle while a request waits: as many steps as bench/batching.py computes."""
    dice, queued, launch = random.Random(rows), [], StepQueue.launch
    monkeypatch.setattr(StepQueue, "launch", lambda *arguments: (queued.append(1), launch(*arguments)))
    lengths = [dice.choice([1, 2, 3, 20, 40]) for _ in range(16)]
    run(Engine(model, max_batch_size=rows, max_seq_len=512), *(ask(ids(5, row), n) for row, n in enumerate(lengths)))
    assert len(queued) == batching.steps(lengths, rows, batching.CONTINUOUS)
    ends, waves = [0] * rows, 0
    for n in lengths:  # computed in another way
        ends.sort()
        ends[0] += n - 1
    for first in range(0, 16, rows):
        waves += max(lengths[first : first + rows]) - 1
    assert len(queued) == max(ends) and waves == batching.steps(lengths, rows, batching.STATIC)


def test_a_soak_of_a_thousand(model):
    """Random prompts, lengths, prefixes and cancels: every request ends once, and every page is free at the end."""
    dice = random.Random(1)
    engine = Engine(model, max_batch_size=8, max_seq_len=512, cache_tokens=1500, depth=2)
    requests = [
        ask(ids(dice.choice([1, 20, 64, 100, 200]), dice.randrange(4)), dice.randrange(1, 9), ends=range(0, 320, 5))
        for _ in range(1000)
    ]
    waiting = list(requests)
    cancelled = 0
    while waiting or engine.busy:
        for _ in range(min(dice.randrange(4), len(waiting))):
            engine.add([waiting.pop()])
        engine.step()
        if dice.random() < 0.2:
            victim = dice.choice(requests[len(waiting) :])
            cancelled += victim.finish_reason is None
            engine.cancel([victim])
    reasons = [request.finish_reason for request in requests]
    assert reasons.count("abort") == cancelled > 20 and reasons.count("stop") > 250 and None not in reasons
    assert engine.pages.free == len(engine.pages)
    for request in dice.sample([r for r in requests if r.finish_reason != "abort"], 20):
        assert result(request) == alone(model, request)


def test_no_memory_for_a_capture_leaves_the_step_eager(model, monkeypatch):
    """The step runs once when it is captured and again each time; a warning says that it is slower."""

    @contextlib.contextmanager
    def graph(*_, **__):
        raise torch.cuda.OutOfMemoryError("no room")
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    runs = []
    with pytest.warns(UserWarning, match="no memory to capture a decode step"):
        replay = cuda_graphs()(lambda: runs.append(1))
    assert len(runs) == 1
    replay()
    assert len(runs) == 2
    engine = Engine(model, max_batch_size=2, max_seq_len=512, capture=cuda_graphs(), depth=2)
    with pytest.warns(UserWarning, match="no memory to capture a decode step"):
        requests = run(engine, *(ask(ids(60, seed), 6 + seed) for seed in range(3)))
    assert [result(request) for request in requests] == [alone(model, request) for request in requests]
    assert engine.pages.free == len(engine.pages)


asked = st.fixed_dictionaries(
    {
        "prompt": st.tuples(st.sampled_from([1, 30, 64, 65, 130, 200]), st.integers(0, 1)),
        "max_tokens": st.integers(1, 40),
        "seed": st.integers(0, 3),
        "temperature": st.sampled_from([0.0, 1.0]),
        "min_tokens": st.sampled_from([0, 1]),
        "logprobs": st.sampled_from([None, None, 2]),
    }
)
actions = st.one_of(
    asked, st.tuples(st.just("step"), st.integers(1, 9)), st.tuples(st.just("cancel"), st.integers(0, 30))
)


@settings(max_examples=40)
@given(st.lists(actions, max_size=25), st.sampled_from([512, 900, None]), st.integers(1, 3), st.integers(1, 4))
def test_any_order_of_requests_steps_and_cancels(model, actions, cache_tokens, depth, max_rows):
    """Pages in use are those of active slots; every request ends once, with the tokens that it gets alone."""
    engine = Engine(model, max_batch_size=max_rows, max_seq_len=512, cache_tokens=cache_tokens, depth=depth)
    requests, cancelled = [], set()

    def check():
        active = engine._runner.scheduler.active
        held = {page for slot in active for page in slot.pages}
        assert len(engine.pages) - engine.pages.free == len(held)
        assert len({slot.index for slot in active}) == len(active) <= max_rows

    for action in actions:
        if isinstance(action, dict):
            action = dict(action)
            length, seed = action.pop("prompt")
            requests.append(ask(ids(length, seed), action.pop("max_tokens"), ends=range(0, 320, 9), **action))
            if requests[-1].params.min_tokens <= requests[-1].max_tokens:
                engine.add(requests[-1:])
        elif action[0] == "step":
            for _ in range(action[1]):
                engine.step()
                check()
        elif requests:
            request = requests[action[1] % len(requests)]
            if request.finish_reason is None:
                cancelled.add(request)
            engine.cancel([request])
            check()
    while engine.busy:
        engine.step()
        check()
    assert engine.pages.free == len(engine.pages)
    for request in requests:
        assert (request.finish_reason == "abort") == (request in cancelled)
        expected = alone(model, request)
        if request in cancelled:
            assert request.token_ids == expected[0][: len(request.token_ids)]
        else:
            assert result(request) == expected
