"""Constrained requests: masks that the host makes of every token before reach the step that samples the next one.

The rule of these tests needs no grammar: a token permits only those of one residue class, and the end after some of
them. What is generated is compared with what a logits processor gives that masks by the same rule.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3.kernels import cpu
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.hooks import LogitsHooks
from internlm3.runtime.engine.request import Request
from internlm3.runtime.model.kv_cache import PAGE
from internlm3.runtime.sampling.token_masks import holding, packed
from internlm3.tests.support.capture import Recorder
from internlm3.tests.support.drafts import Planted
from internlm3.tests.support.engine import SHAPE, alone, ask, ids, random_model, result, run, shorten_chunks

VOCAB = SHAPE["vocab_size"]
ENDS = (2, 7, 300)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    shorten_chunks(monkeypatch, PAGE, PAGE)


def permitted(token_ids, step=5):
    """The rule: a residue class modulo `step`, which depends on the last two tokens; ends after one class only."""
    last, before = ([0, 0, *token_ids])[-1:-3:-1]
    residue = (3 * last + before + len(token_ids)) % step
    tokens = {token for token in range(VOCAB) if token % step == residue}.difference(ENDS)
    return tokens | ({*ENDS} if last % 3 == 1 else set())


class Rule:
    """A constraint that checks how it is asked, and fails after some tokens if told to."""

    def __init__(self, fails_after=None):
        self.asked, self.fails_after = [], fails_after

    def allowed(self, token_ids):
        token_ids = list(token_ids)
        before = self.asked[-1] if self.asked else []
        assert token_ids[: len(before)] == before and len(token_ids) - len(before) in (0, 1)
        self.asked.append(token_ids)
        if len(token_ids) == self.fails_after:
            raise ValueError("no token may follow there")
        return packed(holding(permitted(token_ids), VOCAB))


def constrained(prompt, max_tokens=20, fails_after=None, **params):
    request = ask(prompt, max_tokens, ends=ENDS, **params)
    request.constraint = Rule(fails_after)
    return request


def expected(model, request):
    """What the same request gets alone, from a logits processor with the same rule."""
    twin = Request(request.prompt_ids, request.params, request.max_tokens, request.eos_token_ids, request.answer)

    def masked(ids, scores):
        mask = torch.full_like(scores, -torch.inf)
        mask[:, [*permitted(ids[0, len(request.prompt_ids) :].tolist())]] = 0
        return scores + mask

    twin.hooks = LogitsHooks(torch.tensor([request.prompt_ids]), 0, (), [masked], [twin])
    twin.seed = request.seed
    return result(*run(Engine(model, max_batch_size=1, max_seq_len=512), twin))


def right(model, request, options=()):
    """Whether a request got what it gets alone: the bits; from captured launches, which pad prompts, up to rounding."""
    found, wanted = result(request), (alone if request.constraint is None else expected)(model, request)
    if "capture" in options:
        wanted = (wanted[0], pytest.approx(wanted[1], abs=0.05), *wanted[2:])
    return found == wanted


def obeys(request):
    return all(token in permitted(request.token_ids[:place]) for place, token in enumerate(request.token_ids))


class FreshMemory(Recorder):
    """As with a CUDA graph, what a capture executed is not in the memory that replays write."""

    def capture(self, step):
        replay = super().capture(step)
        for *_, out in self.nodes:
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                out.fill_(torch.nan)
        return replay


@pytest.fixture(params=["eager", "eager, ahead", "captured", "captured, drafts"])
def options(request, monkeypatch):
    """Of an engine."""
    if request.param.startswith("eager"):
        return {"depth": 3 if "ahead" in request.param else 1}
    return {"capture": FreshMemory(monkeypatch).capture, "depth": 2, "speculation": "drafts" in request.param}


def test_masks_reach_the_step_that_samples(model, options):
    """Constrained and other requests, greedy and sampled, more than slots: each gets what it gets alone."""
    engine = Engine(model, max_batch_size=4, max_seq_len=512, **options)
    requests = [
        constrained(ids(70, 1), 40),
        ask(ids(20, 2), 30, ends=ENDS, temperature=1.0, seed=2),
        constrained(ids(5, 3), 40, temperature=1.0, seed=3),
        constrained(ids(5, 3), 40, temperature=0.8, seed=3, answer=1, top_k=20),
        ask(ids(9, 4) * 4, 40),
        constrained(ids(130, 5), 40, temperature=1.0, seed=5, repetition_penalty=1.2),
        constrained(ids(64, 6), 1),
    ]
    run(engine, *requests)
    for request in requests:
        assert right(model, request, options)
        assert request.constraint is None or obeys(request)
    assert engine.pages.free == len(engine.pages)
    assert {request.finish_reason for request in requests} == {"stop", "length"}


def test_a_warm_engine_captures_nothing_more(model, monkeypatch):
    recorder = FreshMemory(monkeypatch)
    engine = Engine(model, max_batch_size=2, max_seq_len=512, capture=recorder.capture, depth=2)
    engine.warm_up()
    captured = dict(engine._runner._steps._captured)
    requests = run(engine, constrained(ids(20), 30), constrained(ids(30, 1), 30))
    assert all(right(model, request, {"capture"}) for request in requests)
    assert engine._runner._steps._captured == captured


def test_the_host_reads_while_the_model_runs(model, monkeypatch):
    """The masks are made after the model has been launched, and before sampling is."""
    events = []
    recorder = Recorder(monkeypatch)
    engine = Engine(model, max_batch_size=1, max_seq_len=512, capture=recorder.capture, depth=2)
    engine.warm_up()
    execute = engine._runner._steps.execute
    monkeypatch.setattr(engine._runner._steps, "execute", lambda step: (events.append(step.part.name), execute(step)))
    request = constrained(ids(5), 4)
    ask_rule = request.constraint.allowed
    request.constraint.allowed = lambda tokens: (events.append(len(tokens)), ask_rule(tokens))[1]
    run(engine, request)
    count = len(request.token_ids)
    rounds = [event for tokens in range(1, count) for event in ("LOGITS", tokens, "TOKENS")]
    assert count > 1 and events[: 1 + len(rounds)] == [0, *rounds]


def test_drafts_of_before_are_forgotten(model, monkeypatch):
    """A request with drafts goes on alone, in the same slots, after steps that made none."""
    engine = Engine(model, max_batch_size=2, max_seq_len=512, depth=2, speculation=True)
    (told,) = run(Engine(model, max_batch_size=1, max_seq_len=512), ask(ids(20, 4), 60))
    monkeypatch.setattr(cpu, "draft", Planted([told.prompt_ids + told.token_ids], VOCAB, end=2))
    request = ask(told.prompt_ids, 60)
    engine.add([request])
    for _ in range(2):
        engine.step()
    run(engine, constrained(ids(5), 4))
    while engine.busy:
        engine.step()
    assert request.accepted > 10 and result(request) == result(told)


@pytest.mark.parametrize("options", [{}, {"depth": 2}], ids=["", "ahead"])
def test_among_requests_whose_logits_the_host_sees(model, options):
    engine = Engine(model, max_batch_size=4, max_seq_len=512, **options)
    requests = [
        constrained(ids(20, 1), 25, temperature=1.0, seed=1),
        ask(ids(20, 2), 10, logprobs=2),
        constrained(ids(20, 3), 25, logprobs=3),
        ask(ids(20, 4), 25),
    ]
    run(engine, *requests)
    assert all(right(model, request) for request in requests)


def test_a_constraint_that_fails_ends_its_own_request(model, options):
    engine = Engine(model, max_batch_size=3, max_seq_len=512, **options)
    failing = constrained(ids(20, 1), 20, fails_after=2, temperature=1.0, seed=9)
    others = [constrained(ids(30, 2), 20), ask(ids(40, 3), 20)]
    run(engine, failing, *others)
    assert (failing.finish_reason, failing.stop_reason) == ("error", "no token may follow there")
    assert len(failing.token_ids) == 2 and obeys(failing)
    assert all(right(model, other, options) for other in others)
    assert engine.pages.free == len(engine.pages)


asked = st.tuples(st.sampled_from([1, 30, 64, 130]), st.integers(1, 25), st.booleans(), st.sampled_from([0.0, 1.0]))
actions = st.one_of(
    asked.map(lambda each: ("ask", *each)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
)


@settings(max_examples=15)
@given(st.lists(actions, max_size=20), st.integers(1, 3), st.integers(1, 3))
def test_any_order_of_requests_steps_and_cancels(model, actions, depth, slots):
    engine = Engine(model, max_batch_size=slots, max_seq_len=512, depth=depth)
    requests = []
    for action, *details in actions:
        if action == "ask":
            length, most, has_rule, temperature = details
            make = constrained if has_rule else ask
            requests.append(make(ids(length, len(requests)), most, temperature=temperature, seed=len(requests)))
            engine.add(requests[-1:])
        elif action == "step":
            for _ in range(details[0]):
                engine.step()
        elif requests:
            engine.cancel([requests[details[0] % len(requests)]])
    while engine.busy:
        engine.step()
    assert engine.pages.free == len(engine.pages)
    for request in requests:
        if request.finish_reason == "abort":
            wanted = (alone if request.constraint is None else expected)(model, request)
            assert request.token_ids == wanted[0][: len(request.token_ids)]
        else:
            assert right(model, request)
