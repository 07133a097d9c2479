"""Other weights: no answer is computed with keys, values or captured steps of the weights before."""

import copy

import pytest
import torch
from torch import nn

from internlm3.runtime.engine.answer import Answer
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.shared import SharedEngine
from internlm3.runtime.model.weights import WeightsState
from internlm3.tests.support.capture import Recorder
from internlm3.tests.support.engine import alone, ask, ids, random_model, run

PROMPT = ids(150)


def other_weights():
    torch.manual_seed(2)
    return {name: torch.randn_like(weight) * 0.3 for name, weight in random_model(torch.float32).state_dict().items()}


def load(model):
    model.load_state_dict(other_weights())


def assign(model):
    model.load_state_dict(other_weights(), assign=True)


def copy_in_place(model):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.copy_(other_weights()["model.layers.0.mlp.down_proj.weight"])


def write_through_data(model):
    model.model.layers[0].mlp.down_proj.weight.data *= 2


def write_through_the_state_dict(model):
    model.state_dict()["model.layers.1.self_attn.v_proj.weight"].mul_(-1)


def replace_data(model):
    norm = model.model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data * 2


def replace_a_parameter(model):
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.detach().flip(0), requires_grad=False)


def replace_a_module(model):
    model.model.layers[0] = copy.deepcopy(model.model.layers[1])


def change_the_dtype(model):
    model.bfloat16()


CHANGES = [
    load, assign, copy_in_place, write_through_data, write_through_the_state_dict, replace_data, replace_a_parameter,
    replace_a_module, change_the_dtype,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("captured", [False, True])
def test_the_next_request_sees_the_weights_of_now(change, captured, monkeypatch):
    capture = Recorder(monkeypatch).capture if captured else None
    model, shared = random_model(torch.float32), SharedEngine(capture=capture)
    before = run(shared.get(model, 2, 512), ask(PROMPT))[0].token_ids
    change(model)
    (request,) = run(shared.get(model, 2, 512), ask(PROMPT))
    assert request.cached_tokens == 0 and (request.token_ids != before or change is change_the_dtype)
    assert request.token_ids == alone(model, request)[0]
    (again,) = run(shared.get(model, 2, 512), ask(PROMPT))
    assert again.cached_tokens == 128 and again.token_ids == request.token_ids


@pytest.mark.parametrize("change", [copy_in_place, replace_data, change_the_dtype], ids=lambda change: change.__name__)
@pytest.mark.parametrize("seen_at", ["the next request", "its end", "a stop string"])
def test_what_was_under_way_is_an_error(change, seen_at):
    """It was begun with other weights: seen when the next request comes, or else at its own end."""
    model, shared = random_model(torch.float32), SharedEngine()
    engine = shared.get(model, 2, 512)
    answers = [Answer(ask(PROMPT[number:], most)) for number, most in enumerate((12, 30, 9))]
    engine.submit(answers)
    for _ in range(5):
        engine.updates(answers)
    change(model)
    if seen_at == "the next request":
        (other,) = run(shared.get(model, 2, 512), ask(PROMPT, 5))
        assert other.token_ids == alone(model, other)[0]
    if seen_at == "a stop string":
        answers[0].finish("so")
        engine.cancel([answers[0].request])
    while not all(answer.finished for answer in answers):
        engine.updates(answers)
    for answer in answers[1 if seen_at == "a stop string" else 0 :]:
        assert answer.request.finish_reason == "error"
        assert "weights changed while this answer waited or was under way" in answer.request.stop_reason
    assert not engine.busy and engine.pages.free == len(engine.pages)


def test_generate_says_that_the_weights_changed():
    model = random_model(torch.float32)

    def change(ids, scores):
        if ids.shape[1] == 8:
            copy_in_place(model)
        return scores

    with pytest.raises(RuntimeError, match="row 0: the model's weights changed while this answer"):
        model.generate(torch.tensor([PROMPT[:5]]), logits_processor=[change], max_new_tokens=6, eos_token_id=[])
    assert model.generate(torch.tensor([PROMPT[:5]]), max_new_tokens=6, eos_token_id=[]).shape == (1, 11)


def test_reading_weights_changes_nothing():
    model = random_model(torch.float32)
    state, engine = WeightsState(model), Engine(model, max_batch_size=1, max_seq_len=512)
    run(engine, ask(PROMPT))
    model.state_dict(), copy.deepcopy(model.state_dict()), list(model.parameters()), model.lm_head.weight.float().sum()
    model(torch.tensor([PROMPT]))
    assert not state.changed(model)
    (again,) = run(engine, ask(PROMPT))
    assert again.cached_tokens == 128
    assert again.token_ids == alone(model, again)[0]


def test_a_promise_of_bits_that_comes_later_gets_an_engine_of_its_own():
    model, shared = random_model(torch.float32), SharedEngine()
    first = shared.get(model, 2, 512)
    model.model.batch_invariant = True
    assert shared.get(model, 2, 512) is not first
