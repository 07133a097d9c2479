"""Callers don't disturb each other: callbacks that raise or call back, Ctrl-C anywhere, readers that are gone."""

import contextlib
import gc
import itertools
import random
import signal
import sys
import threading
import weakref

import pytest
import torch

from internlm3.runtime.engine.answer import Answer
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.exclusive import held_back_interrupts
from internlm3.runtime.engine.pages import PageAllocator
from internlm3.runtime.engine.runner import Runner
from internlm3.runtime.engine.scheduler import Scheduler
from internlm3.runtime.engine.shared import SharedEngine
from internlm3.tests.support.engine import alone, ask, ids, random_model, result, run

PROMPT = torch.tensor([ids(70)])
SETTINGS = {"max_new_tokens": 8, "eos_token_id": [], "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture
def engine(model):
    model._shared = SharedEngine()
    return model.engine(4, 1024)


def nothing_held(engine):
    return not engine.busy and engine.pages.free == len(engine.pages) and not len(engine._runner._steps)


class Wrong(Exception):
    pass


def raising(error, at):
    """A logits processor, stopping criterion or streamer that raises at its `at`-th call."""
    calls = itertools.count(1)

    def called(result):
        if next(calls) == at:
            raise error
        return result

    return called


def processor(error, at):
    called = raising(error, at)
    return {"logits_processor": [lambda ids, scores: called(scores)]}


def criterion(error, at):
    called = raising(error, at)
    return {"stopping_criteria": [lambda ids, scores: called(False)]}


def streamer(error, at):
    called = raising(error, at)

    class Streamer:
        def put(self, ids):
            called(None)

        def end(self):
            pass

    return {"streamer": Streamer()}


# -------------------------------------------------------------------- exceptions in callbacks


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("error", [Wrong("mine"), KeyboardInterrupt("mine"), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("callback", [processor, criterion, streamer])
def test_an_exception_ends_its_own_call_only(model, engine, callback, error, at):
    """Two rows of it; a neighbour, whose thread may run the step in which it happens, and the prefix cache stay."""
    run(engine, ask(PROMPT[0].tolist()))
    neighbours = [Answer(ask(ids(30, seed), 40, temperature=1.0, seed=seed)) for seed in range(2)]
    started, failed = threading.Event(), threading.Event()

    def read():
        for number, _ in enumerate(engine.run(neighbours)):
            started.set()
            if number == 20:
                failed.wait()  # they are still there when the call fails

    thread = threading.Thread(target=read)
    thread.start()
    started.wait()
    with pytest.raises(type(error)) as caught:
        model.generate(PROMPT.expand(2, -1), **SETTINGS, **callback(error, at))
    assert caught.value is error
    failed.set()
    thread.join()
    for answer in neighbours:
        assert result(answer.request) == alone(model, answer.request)
    assert nothing_held(engine)  # while the traceback is still there
    (again,) = run(engine, ask(PROMPT[0].tolist()))
    assert again.cached_tokens == 64


def test_the_call_gets_its_exception_whichever_thread_runs_the_step(model, engine):
    """Each of six calls fails in its own way at a place of its own, while all run their steps for one another."""
    caught, begin = {}, threading.Barrier(6)

    def call(number):
        begin.wait()
        try:
            settings = {**SETTINGS, **processor(Wrong(number), number + 3), "max_new_tokens": 20}
            model.generate(PROMPT[:, number:], **settings)
        except Wrong as error:
            caught[number] = error.args[0]

    threads = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caught == {number: number for number in range(6)}
    assert nothing_held(engine)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda ids, scores: None, "must return scores of shape .*; it returned None"),
        (
            lambda ids, scores: scores[:, :-1],
            r"must return scores of shape .*; it returned a tensor \[1, 319\]",
        ),
        (lambda ids, scores: scores.tolist(), r"must return scores of shape \[1, 320\]; it returned \[\["),
    ],
)
def test_what_a_processor_returns_is_checked_before_others_run_with_it(model, engine, wrong, message):
    neighbour = Answer(ask(ids(30), 10))
    engine.submit([neighbour])
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, **SETTINGS, logits_processor=[wrong])
    while not neighbour.finished:
        engine.updates([neighbour])
    assert result(neighbour.request) == alone(model, neighbour.request)


def test_a_processor_may_return_another_dtype(model, engine):
    expected = model.generate(PROMPT, **SETTINGS)
    assert model.generate(PROMPT, **SETTINGS, logits_processor=[lambda ids, x: x.double()]).equal(expected)


# -------------------------------------------------------------------- callbacks that call


def test_classifier_free_guidance_by_transformers(model, engine):
    """Its processor calls the model at every step. The oracle computes both distributions from scratch."""
    from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

    negative, scale = torch.tensor([ids(9, 5)]), 1.7
    guided = model.generate(
        PROMPT, **SETTINGS, logits_processor=[UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model, negative)]
    )
    text, other = PROMPT, negative
    for _ in range(SETTINGS["max_new_tokens"]):
        with_prompt, without = (model(x).logits[:, -1].float().log_softmax(-1) for x in (text, other))
        token = (scale * (with_prompt - without) + without).argmax(-1, keepdim=True)
        text, other = torch.cat((text, token), 1), torch.cat((other, token), 1)
    assert guided.tolist() == text.tolist()
    assert nothing_held(engine)


def test_a_processor_that_generates_with_its_own_model_is_told_so(model, engine):
    neighbour = Answer(ask(ids(30), 30))
    engine.submit([neighbour])

    def generate(ids, scores):
        model.generate(ids, max_new_tokens=2)
        return scores

    with pytest.raises(RuntimeError, match=r"called from inside a step of the same model, as a logits processor is"):
        model.generate(PROMPT, **SETTINGS, logits_processor=[generate])
    while not neighbour.finished:
        engine.updates([neighbour])
    assert result(neighbour.request) == alone(model, neighbour.request)
    assert nothing_held(engine)


@pytest.mark.parametrize("callback", ["criterion", "streamer", "another model's processor"])
def test_other_callbacks_may_generate(model, engine, callback):
    expected, inner = model.generate(PROMPT, **SETTINGS), model.generate(PROMPT[:, 5:], **SETTINGS)
    answers, other = [], random_model()

    def generate(*_):
        answers.append(model.generate(PROMPT[:, 5:], **SETTINGS))

    class Streamer:
        put, end = generate, lambda self: None

    if callback == "criterion":
        got = model.generate(PROMPT, **SETTINGS, stopping_criteria=[lambda ids, _: generate() is not None])
    elif callback == "streamer":
        got = model.generate(PROMPT, **SETTINGS, streamer=Streamer())
    else:
        got = other.generate(PROMPT, **SETTINGS, logits_processor=[lambda ids, scores: (generate(), scores)[1]])
    assert got.equal(expected) and len(answers) >= 8
    assert all(answer.equal(inner) for answer in answers)


def test_a_stream_that_the_garbage_collector_closes_inside_a_step(model, engine):
    """It is freed, and the step goes on."""

    def collect(ids, scores):
        gc.collect()
        return scores

    stream = engine.run([Answer(ask(ids(90), 200))])
    next(stream)
    cycle = [stream]
    cycle.append(cycle)
    gc.disable()
    try:
        del stream, cycle
        got = model.generate(PROMPT, **SETTINGS, logits_processor=[collect])
    finally:
        gc.enable()
    assert got.equal(model.generate(PROMPT, **SETTINGS))
    assert nothing_held(engine)


# -------------------------------------------------------------------- Ctrl-C


@pytest.fixture
def interrupts():
    """Ctrl-C raises KeyboardInterrupt, whatever the test runner does with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_waits_for_the_end_of_a_step(model, engine, monkeypatch):
    """It ends its own call: neighbours and the prefix cache stay."""
    neighbour = Answer(ask(ids(30), 30))
    engine.submit([neighbour])
    head = type(model).head

    def interrupted(self, x):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return head(self, x)

    with pytest.raises(KeyboardInterrupt):
        for number, _ in enumerate(engine.run([Answer(ask(PROMPT[0].tolist(), 50))])):
            if number == 3:
                monkeypatch.setattr(type(model), "head", interrupted)
    while not neighbour.finished:
        engine.updates([neighbour])
    assert result(neighbour.request) == alone(model, neighbour.request)
    assert nothing_held(engine)
    (again,) = run(engine, ask(PROMPT[0].tolist()))
    assert again.cached_tokens == 64


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_again_is_raised_at_once(monkeypatch):
    clock = itertools.chain([0.0, 0.5, 0.9, 1.5], itertools.repeat(9.0))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    reached = []
    with pytest.raises(KeyboardInterrupt), held_back_interrupts():
        for number in range(5):
            reached.append(number)
            signal.raise_signal(signal.SIGINT)
    assert reached == [0, 1, 2, 3], "three within a second wait, the fourth comes a second after the first"


@pytest.mark.usefixtures("interrupts")
def test_a_handler_of_ones_own_is_called_once_afterwards():
    calls = []
    signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    with held_back_interrupts(), held_back_interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert calls == []
    assert calls == [signal.SIGINT]
    for ignored in (signal.SIG_IGN, signal.SIG_DFL):
        signal.signal(signal.SIGINT, ignored)
        with held_back_interrupts():
            assert signal.getsignal(signal.SIGINT) is ignored


@contextlib.contextmanager
def interrupting(code, after):
    """Raises KeyboardInterrupt at the `after`-th line that runs in a function of this name, wherever that is."""
    lines = itertools.count()

    def local(frame, event, argument):
        if event == "line" and next(lines) == after:
            sys.settrace(None)
            raise KeyboardInterrupt
        return local

    def trace(frame, event, argument):
        return local if frame.f_code.co_name in code else None

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


# What `with self.exclusively()` runs is not among them: an interrupt hits no line between a lock and its release.
CHANGING = {
    member.__code__.co_name
    for owner in (Engine, Runner, Scheduler, PageAllocator)
    for member in vars(owner).values()
    if hasattr(member, "__code__")
} - {"exclusively"}


@pytest.mark.parametrize("what", ["a closed stream", "a whole call"])
def test_an_interrupt_at_any_line_leaves_nothing_held(model, what):
    """Even where nothing holds it back, as with an asynchronous exception: the next step repairs."""
    engine = Engine(model, max_batch_size=2, max_seq_len=256)
    rng, interrupted = random.Random(1), 0
    for after in [*range(40), *(rng.randrange(40, 400) for _ in range(40 if what == "a whole call" else 0))]:
        neighbour = Answer(ask(ids(20, 2), 3))
        engine.submit([neighbour])
        with contextlib.suppress(KeyboardInterrupt), interrupting(CHANGING, after):
            stream = engine.run([Answer(ask(ids(70, after), 30))])
            if what == "a closed stream":
                sys.settrace(None)
                next(stream)
                with interrupting(CHANGING, after):
                    stream.close()
            else:
                list(itertools.islice(stream, 3))
                stream.close()
            after = None
        interrupted += after is not None
        stream = None
        while not neighbour.finished:
            engine.updates([neighbour])
        assert neighbour.request.finish_reason in ("length", "abort")
        engine.step()
        assert nothing_held(engine)
        (request,) = run(engine, ask(ids(30)))
        assert result(request) == alone_once(model, 30)
    assert interrupted > 20


_ALONE = {}


def alone_once(model, length):
    if length not in _ALONE:
        _ALONE[length] = alone(model, ask(ids(length)))
    return _ALONE[length]


@pytest.mark.usefixtures("interrupts")
def test_a_storm_of_signals_at_cancel(model):
    """Two thousand Ctrl-Cs, sent by another thread while the main one opens and closes streams."""
    engine = Engine(model, max_batch_size=2, max_seq_len=256)
    prompt, sent, stop = ids(70), 0, threading.Event()
    main = threading.main_thread().ident

    def storm():
        nonlocal sent
        while not stop.is_set() and sent < 2000:
            signal.pthread_kill(main, signal.SIGINT)
            sent += 1
            stop.wait(0.0005)
        stop.set()

    thread = threading.Thread(target=storm)
    closed = 0
    try:
        thread.start()
        while not stop.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                stream = engine.run([Answer(ask(prompt, 100))])
                next(stream)
                stream.close()
                closed += 1
    except KeyboardInterrupt:
        pass  # between two rounds
    finally:
        while thread.is_alive():
            with contextlib.suppress(KeyboardInterrupt):
                stop.set()
                thread.join()
    stream = None
    engine.step()
    assert nothing_held(engine) and sent > 0
    (request,) = run(engine, ask(ids(30)))
    assert result(request) == alone_once(model, 30)


# -------------------------------------------------------------------- readers that are gone


@pytest.mark.parametrize("state", ["waiting", "running"])
def test_an_answer_that_nobody_reads_is_dropped(model, state):
    engine = Engine(model, max_batch_size=1, max_seq_len=256)
    first, lost = Answer(ask(ids(20), 8)), Answer(ask(ids(30), 100))
    engine.submit([first, lost] if state == "waiting" else [lost, first])
    engine.updates([first, lost])
    request = lost.request
    del lost
    while not first.finished:
        engine.updates([first])
    engine.step()
    assert request.finish_reason == "abort" and nothing_held(engine)
    assert result(first.request) == alone(model, first.request)


# -------------------------------------------------------------------- memory


@pytest.mark.parametrize("used", ["never", "generate", "captured", "hooks", "an error", "a stream", "forward"])
def test_a_deleted_model_is_freed_at_once(used, monkeypatch):
    """Without the garbage collector: weights and cache alike."""
    gc.collect()
    gc.disable()
    try:
        model = random_model()
        if used == "captured":
            engine = Engine(model, max_batch_size=2, max_seq_len=256, capture=lambda step: (step(), step)[1], depth=2)
            run(engine, ask(ids(70)))
        else:
            engine = model.engine(2, 256)
        if used == "generate":
            model.generate(PROMPT, **SETTINGS)
        if used == "hooks":
            model.generate(
                PROMPT, **SETTINGS, output_logits=True, output_scores=True, return_dict_in_generate=True,
                logits_processor=[lambda ids, scores, model=model: scores],
            )  # fmt: skip
        if used == "an error":
            with contextlib.suppress(ZeroDivisionError):
                model.generate(PROMPT.expand(3, -1), **SETTINGS, logits_processor=[lambda ids, scores: 1 / 0])
        if used == "a stream":
            next(engine.run([Answer(ask(ids(70), 20))]))
        if used == "forward":
            model(PROMPT)
        things = (model, model.lm_head.weight, engine, engine.kv_cache, engine.kv_cache.layers[0])
        left = [*map(weakref.ref, things)]
        del things
        del model, engine
        assert [ref() for ref in left] == [None] * len(left)
    finally:
        gc.enable()
