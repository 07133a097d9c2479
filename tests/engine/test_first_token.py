"""What the host does for a request up to its first token, where launches are captured: it copies, and nothing else."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from internlm3.runtime.engine import prefill
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.staging import Staging
from internlm3.tests.support.capture import Recorder
from internlm3.tests.support.engine import alone, ask, ids, random_model, run

SETTINGS = [
    {},
    {"temperature": 1.0, "seed": 3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 1.0, "seed": 4, "top_p": 0.9},
    {"logit_bias": {5: 2.0, 9: -1.0}, "frequency_penalty": 0.5, "min_tokens": 2, "allowed_token_ids": range(200)},
]


class HostWork(TorchDispatchMode):
    """Counts PyTorch's operations, those that make a tensor from Python's numbers included, but for views."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            {x.untyped_storage().data_ptr() for x in tree_leaves(each) if isinstance(x, torch.Tensor)}
            for each in ((args, kwargs), result)
        )
        # `contiguous` and the like call themselves views, also where they copy.
        if not func.is_view or not made <= given:
            self.counts[func.overloadpacket.__name__] += 1
        return result


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture
def engine(model, monkeypatch):
    """An engine whose captured launches count as no operation, warmed up."""
    recorder = Recorder(monkeypatch)

    def capture(step):
        replay = recorder.capture(step)

        def uncounted():
            with _disable_current_modes():
                replay()

        return uncounted

    engine = Engine(model, max_batch_size=4, max_seq_len=1024, capture=capture, depth=2)
    engine.warm_up()
    run(engine, ask(ids(40), 3))
    return engine


def work(engine, request):
    with HostWork() as work:
        run(engine, request)
    return work.counts


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_a_request_is_copied_once(model, engine, params):
    """The request, the last hidden state from one captured launch to the next, and the report; then a step's report."""
    turn = ids(150, seed=1)
    first = ask(turn, 1, **params)
    assert work(engine, first) == {"copy_": 3}
    following = ask([*turn, *first.token_ids, *ids(30, seed=2)], 2, **params)
    assert work(engine, following) == {"copy_": 3 + 1}
    assert following.cached_tokens == 128
    assert [x.token_ids for x in (first, following)] == [alone(model, x)[0] for x in (first, following)]


def test_every_further_chunk_is_one_more_copy(engine):
    assert work(engine, ask(ids(prefill.CHUNK), 1)) == {"copy_": 3}
    assert work(engine, ask(ids(prefill.CHUNK + 1, seed=1), 1)) == {"copy_": 4}


def test_answers_that_end_leave_nothing_to_do(engine):
    """By a stop token in the first or a later step: the device has made the slot idle."""
    (request,) = run(engine, ask(ids(70), 4))
    for token in request.token_ids[:2]:
        steps = request.token_ids.index(token)
        counted = work(engine, ask(ids(70), 40, ends=[token]))
        assert counted.keys() == {"copy_"} and 3 + steps <= counted["copy_"] <= 3 + steps + 2


@pytest.mark.parametrize(
    "fault",
    [
        lambda staging: staging.tokens.add_(1),
        lambda staging: torch.tensor([1, 2]),
        lambda staging: torch.zeros(3),
        lambda staging: staging.tokens.clone(),
        lambda staging: staging.tokens[::2].contiguous(),
        lambda staging: int(staging.tokens[0]),
    ],
)
def test_an_operation_more_is_counted(engine, monkeypatch, fault):
    copy = Staging.copy
    monkeypatch.setattr(Staging, "copy", lambda self, *args: (copy(self, *args), fault(self)))
    assert work(engine, ask(ids(30, seed=5), 1)).total() == 4
