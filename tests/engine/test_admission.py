"""Admission: long prompts come in chunk by chunk between the steps of others; order, priority, cancels half way."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.graphs import StepQueue
from internlm3.runtime.model.kv_cache import PAGE
from internlm3.tests.support.capture import Recorder
from internlm3.tests.support.engine import alone, ask, ids, random_model, result, run, shorten_chunks

CHUNK = PAGE


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of one page, so that short prompts have several."""
    shorten_chunks(monkeypatch, CHUNK)


@pytest.fixture
def work(monkeypatch, model):
    """The work in order: the number of prompt tokens of each launch, and "step" for each decode step."""
    work, through, launch = [], model.model.run, StepQueue.launch

    def counting(x, *args, decode_step=False, **options):
        if not decode_step:
            work.append(len(x))
        return through(x, *args, decode_step=decode_step, **options)

    monkeypatch.setattr(model.model, "run", counting)
    monkeypatch.setattr(StepQueue, "launch", lambda *arguments: (work.append("step"), launch(*arguments)))
    return work


def run_out(engine):
    while engine.busy:
        engine.step()


def between_steps(work):
    """Prompt tokens between each decode step and the next, from the first step to the last."""
    counts, tokens = [], 0
    first, last = work.index("step"), len(work) - work[::-1].index("step")
    for each in work[first:last]:
        if each == "step":
            counts.append(tokens)
            tokens = 0
        else:
            tokens += each
    return counts


@pytest.mark.parametrize("depth", [1, 2])
def test_at_most_a_chunk_between_two_steps(model, work, depth):
    """While a stream runs, long prompts and many short ones come in; all get what they get alone."""
    engine = Engine(model, max_batch_size=8, max_seq_len=512, depth=depth)
    stream = ask(ids(10), 60)
    engine.add([stream])
    while not stream.token_ids:
        engine.step()
    others = [ask(ids(length, length), 5) for length in (300, 40, 30, 20, 250, 64, 65, 3)]
    work.clear()
    run(engine, *others)
    run_out(engine)
    assert max(between_steps(work)) <= CHUNK
    assert sum(each for each in work if each != "step") >= sum(len(request.prompt_ids) for request in others)
    for request in (stream, *others):
        assert result(request) == alone(model, request)


def test_without_a_stream_nothing_is_held_back(model, work, monkeypatch):
    """Short prompts that come together run before the first step; a long one runs in as few launches as it can."""
    shorten_chunks(monkeypatch, CHUNK, 4 * CHUNK)
    run(Engine(model, max_batch_size=8, max_seq_len=512), *(ask(ids(40, seed), 3) for seed in range(5)))
    assert work.index("step") == len([each for each in work if each != "step"])
    work.clear()
    run(Engine(model, max_batch_size=8, max_seq_len=512), ask(ids(424), 3))
    launches = [each for each in work if each != "step"]
    assert sum(launches) == 424 and len(launches) <= (2 if model.model.can_batch_prompts(CHUNK) else 7)


def test_prompts_come_in_by_captured_launches(model, monkeypatch):
    """The same where each chunk is one replay, as on a GPU: also with twins, and where the host sees the logits."""
    recorder = Recorder(monkeypatch)

    def answered(*requests):
        engine = Engine(model, max_batch_size=8, max_seq_len=512, capture=recorder.capture, depth=2)
        return [result(request) for request in run(engine, *requests)]

    def requests():
        twins = [ask(ids(200, 1), 5, answer, temperature=1.0, seed=3) for answer in range(3)]
        return [ask(ids(10), 30), ask(ids(300, 2), 9), *twins, ask(ids(150, 4), 5, logprobs=2), ask(ids(20, 6), 4)]

    assert answered(*requests()) == [each for request in requests() for each in answered(request)]
    assert recorder.replays > 0


def test_first_come_first_served_within_a_priority(model):
    engine = Engine(model, max_batch_size=1, max_seq_len=512)
    priorities = enumerate((0, 1, -1, 0, 1, -1, 0, 2))
    requests = [ask(ids(5, number), 3, priority=priority) for number, priority in priorities]
    run(engine, *requests)
    order = sorted(range(8), key=lambda number: requests[number].began)
    assert order == [2, 5, 0, 3, 6, 1, 4, 7]


def test_what_was_prefilled_before_a_cancel_is_reused(model):
    """A prompt that is broken off leaves the pages that are written, and no others."""
    engine = Engine(model, max_batch_size=2, max_seq_len=512)
    stream, lost, again = ask(ids(10), 40), ask(ids(300, 1), 5), ask(ids(300, 1), 5)
    engine.add([stream])
    while not stream.token_ids:
        engine.step()
    engine.add([lost])
    while (slot := engine._runner.scheduler.prefilling) is None or slot.prefilled < 3 * CHUNK:
        engine.step()
    assert lost.finish_reason is None and not lost.token_ids
    engine.cancel([lost])
    run(engine, again)
    run_out(engine)
    assert again.cached_tokens == 3 * CHUNK
    assert result(again) == alone(model, again) and result(stream) == alone(model, stream)
    assert engine.pages.free == len(engine.pages)


@pytest.mark.parametrize("gone", [[0], [1], [0, 1], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("steps", [1, 3])
def test_answers_to_one_long_prompt_go_on_without_each_other(model, gone, steps):
    """The prefill of one serves all; when it is cancelled half way, another one goes on with it."""
    engine = Engine(model, max_batch_size=4, max_seq_len=512)
    answers = [ask(ids(300, 1), 5, answer, temperature=1.0, seed=7) for answer in range(3)]
    stream = ask(ids(10), 20)
    engine.add([stream])
    engine.step()
    engine.add(answers)
    for _ in range(steps):
        engine.step()
    engine.cancel([answers[number] for number in gone])
    rest = [answer for number, answer in enumerate(answers) if number not in gone]
    run_out(engine)
    for request in (stream, *rest):
        assert result(request) == alone(model, request)
    assert engine.pages.free == len(engine.pages)


asked = st.tuples(
    st.sampled_from([1, 30, 64, 65, 130, 300, 450]), st.integers(0, 2), st.integers(1, 12), st.integers(-1, 1)
)


@settings(max_examples=12)
@given(st.lists(st.tuples(asked, st.integers(0, 6), st.booleans()), max_size=10), st.integers(1, 3), st.integers(1, 4))
def test_nobody_starves_and_everyone_ends_once(model, arrivals, depth, rows):
    """Any arrivals, lengths, priorities and cancels, with few pages: used are those of active slots, at every step."""
    engine = Engine(model, max_batch_size=rows, max_seq_len=512, cache_tokens=900, depth=depth)
    requests, cancelled, dice = [], set(), random.Random(len(arrivals))
    for (length, seed, most, priority), steps, cancel in arrivals:
        requests.append(ask(ids(length, seed), most, priority=priority))
        engine.add(requests[-1:])
        for _ in range(steps):
            engine.step()
            held = {page for slot in engine._runner.scheduler.active for page in slot.pages}
            assert len(engine.pages) - engine.pages.free == len(held)
        if cancel and (victim := dice.choice(requests)).finish_reason is None:
            cancelled.add(victim)
            engine.cancel([victim])
    bound = sum(len(request.prompt_ids) // CHUNK + 2 + request.max_tokens for request in requests)
    for _ in range(bound):
        engine.step()
    assert not engine.busy and engine.pages.free == len(engine.pages)
    for request in requests:
        assert (request.finish_reason == "abort") == (request in cancelled)
        if request not in cancelled:
            assert result(request) == alone(model, request)
    started = {}
    for request in requests:
        if request.began:
            started.setdefault(request.params.priority, []).append(request.began)
    assert all(times == sorted(times) for times in started.values())
