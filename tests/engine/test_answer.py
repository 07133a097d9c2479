"""Answers as callers read them, over an engine: one update at a time, stop strings, errors, and closing early."""

import pytest
import torch

from internlm3 import InternLM3Config, InternLM3ForCausalLM
from internlm3.runtime.engine.answer import Answer
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.request import Request
from internlm3.runtime.sampling.params import SamplingParams

CONFIG = InternLM3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=256, initializer_range=0.3,
)  # fmt: skip


class Letters:
    """A stream that spells token i as the i-th letter, and stops after "stop"."""

    def __init__(self, stop=None):
        self.text, self.stopped, self._stop = "", None, stop

    def push(self, token_id):
        self.text += chr(97 + token_id)
        if self._stop is not None and self.text.endswith(self._stop):
            self.stopped = self._stop
        return "" if self.stopped else chr(97 + token_id)

    def flush(self):
        return "." if self.stopped is None else ""

    def stop_string(self, token_id):
        return f"<{token_id}>"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return InternLM3ForCausalLM(CONFIG, dtype=torch.float32)


def ask(prompt, max_tokens=8, ends=(), **params):
    return Request(prompt, SamplingParams(**{"temperature": 0, **params}), max_tokens, frozenset(ends))


def generated(*tokens, finish=None, stop_reason=None, **params):
    """A request that has these tokens, and has finished or not."""
    request = ask([1], 100, **params)
    for token in tokens:
        request.append(token, -1.0, 0)
    if finish:
        request.finish(finish, stop_reason)
    return request


def read_all(answer):
    updates = []
    while (update := answer.read()) is not None:
        updates.append((update.token_id, update.text, update.finished))
    return updates


def test_an_answer_is_read_token_by_token_and_can_wait():
    request = generated(0, 1)
    answer = Answer(request, Letters())
    assert read_all(answer) == [(0, "a", False), (1, "b", False)] and not answer.finished
    request.append(2, -1.0, 2)  # the last of max_tokens
    assert read_all(answer) == [(2, "c.", True)] and answer.finished and answer.text == "abc."
    assert answer.read() is None


@pytest.mark.parametrize(("include", "text"), [(False, "a."), (True, "ab.")])
def test_an_end_token_is_no_text_unless_asked_for(include, text):
    request = generated(0, 1, finish="stop", include_stop_str_in_output=include)
    answer = Answer(request, Letters())
    assert [finished for *_, finished in read_all(answer)] == [False, True]
    assert answer.text == text and request.token_ids == [0, 1] and request.stop_reason is None


def test_a_stop_token_that_spells_a_stop_string_is_reported_as_one():
    request = generated(0, 1, finish="stop", stop_reason=1)
    read_all(Answer(request, Letters()))
    assert request.stop_reason == "<1>"


@pytest.mark.parametrize("finish", [None, "length"])
def test_a_stop_string_drops_what_was_generated_after_it(finish):
    request = generated(0, 1, 2, 3, finish=finish)
    answer = Answer(request, Letters("bc"))
    assert read_all(answer) == [(0, "a", False), (1, "b", False), (2, "", True)]
    assert (request.token_ids, request.finish_reason, request.stop_reason) == ([0, 1, 2], "stop", "bc")
    assert len(request.logprobs) == len(request.times) == 3


def test_an_error_comes_after_the_last_token():
    request = generated(0)
    request.append(5, float("nan"), 3)
    answer = Answer(request, Letters())
    assert read_all(answer) == [(0, "a", False), (None, ".", True)]
    assert request.finish_reason == "error" and "not numbers" in request.stop_reason


def test_an_answer_without_text():
    answer = Answer(generated(3, 4, finish="length"))
    assert read_all(answer) == [(3, "", False), (4, "", True)] and answer.text == ""


def test_run_yields_at_most_one_update_of_each_answer(model):
    engine = Engine(model, max_batch_size=2, max_seq_len=128)
    answers = [Answer(ask([1, 2, row], 3 + row), Letters()) for row in range(4)]  # two wait for a slot
    tokens = {answer: [] for answer in answers}
    for updates in engine.run(answers):
        assert len({update.answer for update in updates}) == len(updates) > 0
        for update in updates:
            tokens[update.answer].append(update.token_id)
    assert all(answer.finished and tokens[answer] == answer.request.token_ids for answer in answers)
    assert [len(answer.request.token_ids) for answer in answers] == [3, 4, 5, 6]
    assert not engine.busy and engine.pages.free == len(engine.pages)


def test_tokens_of_another_callers_steps_are_not_missed(model):
    engine = Engine(model, max_batch_size=2, max_seq_len=128)
    answer, other = Answer(ask([1, 2], 5)), Answer(ask([3], 9))
    engine.submit([answer, other])
    while answer.request.finish_reason is None:
        engine.updates([other])
    read = []
    while not answer.finished:
        read += [update.token_id for update in engine.updates([answer])]
    assert read == answer.request.token_ids and len(read) == 5
    engine.cancel([other.request])


def test_closing_a_run_cancels_the_rest(model):
    engine = Engine(model, max_batch_size=2, max_seq_len=128)
    answers = [Answer(ask([1, row], 50)) for row in range(3)]
    run = engine.run(answers)
    next(run)
    run.close()
    assert {answer.request.finish_reason for answer in answers} == {"abort"}
    assert not engine.busy and engine.pages.free == len(engine.pages)


def test_finish_ends_an_answer_after_what_was_read(model):
    engine = Engine(model, max_batch_size=2, max_seq_len=128, depth=2)
    answer = Answer(ask([1, 2], 50))
    run = engine.run([answer])
    for _ in range(3):
        next(run)
    engine.finish(answer)
    assert len(answer.request.token_ids) == 3 and answer.request.finish_reason == "stop"
    assert list(run) == [] and not engine.busy


def test_a_stop_string_frees_the_slot_before_the_next_step(model):
    engine = Engine(model, max_batch_size=1, max_seq_len=128)
    first = Answer(ask([1, 2], 50), Letters())
    next(run := engine.run([first]))
    stop = first.text
    run.close()
    answer, waiting = Answer(ask([1, 2], 50), Letters(stop)), Answer(ask([5], 2))
    for updates in engine.run([answer, waiting]):
        if updates[0].answer is answer:
            assert engine.pages.free == len(engine.pages)
    assert answer.request.stop_reason == stop and len(answer.request.token_ids) == 1
    assert waiting.request.finish_reason == "length"
