"""Speculation: the same tokens and log-probabilities, bit by bit, with any drafts; and what decides whether to draft.

The drafts of most tests are planted: the right continuation, of which some tokens are replaced by others.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import InternLM3Config, InternLM3ForCausalLM
from internlm3.kernels import cpu
from internlm3.runtime.engine import decode, gain, speculation
from internlm3.runtime.engine.draft_rows import MOST_SEQUENCES
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.gain import PAUSE, WINDOW, Gain
from internlm3.runtime.engine.graphs import Report
from internlm3.runtime.engine.hooks import LogitsHooks
from internlm3.runtime.engine.request import Request
from internlm3.runtime.engine.speculation import MOST_COST, USUAL_COST, Cost, Speculation
from internlm3.runtime.engine.state import Slot, Tier
from internlm3.runtime.model.kv_cache import PAGE
from internlm3.runtime.sampling.params import SamplingParams
from internlm3.tests.support.capture import Recorder
from internlm3.tests.support.drafts import Planted

VOCAB, END, WINDOW_TOKENS = 160, 7, 200
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = InternLM3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return InternLM3ForCausalLM(config, dtype=torch.bfloat16)


def planted(requests, wrong=0.0, seed=0):
    """Drafts that continue each of these requests' texts."""
    return Planted([each.prompt_ids + each.token_ids for each in requests], VOCAB, END, wrong, seed)


def requests_of(asked, prompts, max_tokens=40):
    """Requests with these settings, in turn; a setting `max_tokens` is that of the request."""
    requests = []
    for index, prompt in enumerate(prompts):
        params = dict(asked[index % len(asked)])
        limit = params.pop("max_tokens", max_tokens)
        own = SamplingParams(**{"seed": index, **params})
        requests.append(Request(prompt, own, limit, frozenset([END]), index))
    return requests


def run(model, requests, engine=None, **options):
    """Runs requests to their end. Returns the engine, whose pages must all be free again."""
    engine = engine or Engine(model, **{"max_batch_size": len(requests), "max_seq_len": WINDOW_TOKENS, **options})
    engine.add(requests)
    while engine.busy:
        engine.step()
    assert engine.pages.free == len(engine.pages)
    return engine


def result(request):
    return request.token_ids, request.logprobs, request.finish_reason, request.stop_reason


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(8, VOCAB, count).tolist()


def both(model, monkeypatch, asked, prompts, wrong=0.0, **options):
    """Runs the same requests without and with planted drafts, compares them, and returns the latter and the engine."""
    plain, drafted = requests_of(asked, prompts), requests_of(asked, prompts)
    run(model, plain, speculation=False)
    monkeypatch.setattr(cpu, "draft", planted(plain, wrong))
    engine = run(model, drafted, speculation=True, **options)
    assert [result(each) for each in drafted] == [result(each) for each in plain]
    return drafted, engine


setting = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.7, 1.0]),
        "max_tokens": st.integers(1, 30),
    },
    optional={
        "top_k": st.sampled_from([3, 100]),
        "top_p": st.just(0.8),
        "min_p": st.just(0.05),
        "typical_p": st.just(0.9),
        "repetition_penalty": st.sampled_from([1.3, 0.8]),
        "presence_penalty": st.just(0.9),
        "frequency_penalty": st.sampled_from([0.7, -0.5]),
        "logit_bias": st.just({9: 5.0, END: 3.0}),
        "allowed_token_ids": st.just([END, 9, 10, 11, 12, 13]),
        "min_tokens": st.integers(1, 12),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.just([10, 55]),
        "speculation": st.booleans(),
    },
)


@settings(max_examples=60)
@given(
    st.lists(setting, min_size=1, max_size=5),
    st.lists(st.sampled_from([1, 2, 30, PAGE - 3, PAGE, PAGE + 1, 150]), min_size=5, max_size=5),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(1, 5),
)
def test_any_drafts_give_the_same_answers(model, asked, lengths, wrong, slots):
    """Any settings, batches, drafts; more requests than slots; nothing is written to pages that no request had."""
    prompts = [ids(length, index) for index, length in enumerate(lengths[: len(asked)])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "USUAL_COST", Cost(-99, 0))  # never switched off
        plain, drafted = requests_of(asked, prompts), requests_of(asked, prompts)
        run(model, plain, speculation=False, max_batch_size=slots)
        patch.setattr(cpu, "draft", planted(plain, wrong, seed=len(asked)))
        engine = Engine(
            model, max_batch_size=slots, max_seq_len=WINDOW_TOKENS, cache_tokens=20 * WINDOW_TOKENS, speculation=True
        )
        for layer in engine.kv_cache.layers:
            layer.fill_(3.0)
        allocated, allocate = set(), engine.pages.allocate
        patch.setattr(engine.pages, "allocate", lambda *args, **kw: allocated.update(x := allocate(*args, **kw)) or x)
        run(model, drafted, engine)
    assert [result(each) for each in drafted] == [result(each) for each in plain]
    for each in drafted:
        assert each.accepted <= min(each.drafted, len(each.token_ids)) and (each.params.speculation or not each.drafted)
    others = [page for page in range(len(engine.pages)) if page not in allocated]
    assert others and all((layer[:, others] == 3).all() for layer in engine.kv_cache.layers)


def test_right_drafts_are_accepted(model, monkeypatch):
    """16 tokens a step after the first two, the first of which made no drafts."""
    [request], _ = both(model, monkeypatch, [{**GREEDY, "ignore_eos": True, "max_tokens": 40}], [ids(20)])
    assert (request.drafted, request.accepted) == (15 + 15 + 5, 15 + 15 + 5)


@pytest.mark.parametrize(("slots", "rows"), [(1, 16), (2, 8), (3, 5), (5, 3), (8, 2), (9, 1)])
def test_slots_share_the_rows(model, monkeypatch, slots, rows):
    """Above MOST_SEQUENCES there are none."""
    asked = [{**GREEDY, "ignore_eos": True, "max_tokens": 2 + 3 * rows}]
    requests, _ = both(model, monkeypatch, asked, [ids(9, seed) for seed in range(slots)])
    # The first token by prefill, the second by a step that drafts, and then all rows of each step.
    assert [each.accepted for each in requests] == [3 * (rows - 1)] * slots and MOST_SEQUENCES == 8


def test_an_end_inside_a_run_ends_the_answer(model, monkeypatch):
    """At an end of text, a stop token, max_tokens and the end of the window, though right drafts follow."""
    [request], _ = both(model, monkeypatch, [{**GREEDY, "ignore_eos": True}], [ids(20)])
    text = request.token_ids
    stop = next(token for token in text[8:14] if token not in text[:8])
    cut = text.index(stop) + 1
    asked = [{**GREEDY, "ignore_eos": True, "stop_token_ids": [stop]}, {**GREEDY, "ignore_eos": True, "max_tokens": 9}]
    for each, count, reason in zip(asked, (cut, 9), ("stop", "length"), strict=True):
        drafted = requests_of([each], [ids(20)])
        monkeypatch.setattr(cpu, "draft", Planted([ids(20) + text], VOCAB, END))
        engine = run(model, drafted, speculation=True)
        assert drafted[0].token_ids == text[:count] and drafted[0].finish_reason == reason
        assert len(drafted[0].logprobs) == len(drafted[0].times) == count
        assert (engine._runner._state.batch.seq_lens == 0).all()
    window = 20 + 17
    drafted = requests_of([{**GREEDY, "ignore_eos": True}], [ids(20)], max_tokens=17)
    run(model, drafted, speculation=True, max_seq_len=window, max_batch_size=1)
    assert drafted[0].token_ids == text[:17] and drafted[0].finish_reason == "length"


def test_an_end_of_text_waits_for_min_tokens(model, monkeypatch):
    """min_tokens counts tokens, not steps. Drafts end where the mask opens, and go on after it."""
    asked = [{**GREEDY, "logit_bias": {END: 100.0}, "min_tokens": 21, "max_tokens": 30}]
    [request], _ = both(model, monkeypatch, asked, [ids(20)])
    assert request.token_ids[21:] == [END] and END not in request.token_ids[:21] and request.accepted > 10


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty", "repetition_penalty"])
def test_what_was_not_accepted_is_not_counted(model, monkeypatch, name):
    asked = [{"temperature": 0.9, "ignore_eos": True, name: 1.5}]
    [request], engine = both(model, monkeypatch, asked, [ids(20)], wrong=0.3)
    assert 0 < request.accepted < request.drafted
    state, tokens = engine._runner._state, torch.tensor(request.token_ids)
    assert torch.equal(state.output_counts[0], torch.bincount(tokens, minlength=VOCAB).int())
    assert state.history[0, : 20 + len(tokens)].tolist() == [*ids(20), *request.token_ids]


def test_a_reused_answer_is_that_of_its_tokens(model, monkeypatch):
    """Pages of an answer that steps with wrong drafts wrote serve the next prompt as others do."""
    asked = [{**GREEDY, "ignore_eos": True, "max_tokens": 100}]
    [first], engine = both(model, monkeypatch, asked, [ids(50)], wrong=0.2)
    prompt = [*ids(50), *first.token_ids, *ids(5, 1)]
    [again] = plain = requests_of([GREEDY], [prompt])
    run(model, plain, engine)
    assert again.cached_tokens == 2 * PAGE
    fresh = requests_of([GREEDY], [ids(50)], 100), requests_of([GREEDY], [prompt])
    fresh[0][0].params.__dict__["ignore_eos"] = True
    other = Engine(model, max_batch_size=1, max_seq_len=WINDOW_TOKENS, speculation=False)
    run(model, requests_of(asked, [ids(50)]), other)
    run(model, fresh[1], other)
    assert result(fresh[1][0]) == result(again) and fresh[1][0].cached_tokens == 2 * PAGE


def test_a_cancelled_slot_writes_no_page(model, monkeypatch):
    """Its rows had drafts; its pages may belong to another request by then."""
    asked, prompts = [{**GREEDY, "ignore_eos": True, "max_tokens": 90}], [ids(9, seed) for seed in range(3)]
    plain = requests_of(asked, prompts)
    run(model, plain, speculation=False)
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(cpu, "draft", planted(plain))
    requests = requests_of(asked, prompts)
    engine = Engine(
        model, max_batch_size=4, max_seq_len=WINDOW_TOKENS, speculation=True, capture=recorder.capture, depth=2
    )
    engine.add(requests)
    while not requests[1].accepted:
        engine.step()
    pages = engine._runner.scheduler.slots[1].pages
    engine.cancel([requests[1]])
    before = [kv[:, pages].clone() for kv in engine.kv_cache.layers]
    late = requests_of(asked, [ids(30, 9)])[0]
    while engine.busy:
        engine.step()
    for kv, old in zip(engine.kv_cache.layers, before, strict=True):
        assert torch.equal(kv[:, pages].nan_to_num(), old.nan_to_num())
    assert requests[0].token_ids == plain[0].token_ids and requests[2].token_ids == plain[2].token_ids
    run(model, [late], engine)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_captured_steps_give_the_tokens_of_eager_ones(model, monkeypatch, depth):
    """No op of a step reads a value on the host; requests come and go meanwhile."""
    asked = [{**GREEDY, "max_tokens": 60}, {"temperature": 0.8, "repetition_penalty": 1.2}, {"frequency_penalty": 0.3}]
    prompts = [ids(length, length) for length in (5, 90, 1, 64, 33)]
    plain = requests_of(asked, prompts)
    recorder = Recorder(monkeypatch)
    options = {"max_batch_size": 4, "capture": recorder.capture, "depth": depth}
    run(model, plain, speculation=False, **options)
    monkeypatch.setattr(cpu, "draft", planted(plain, 0.2))
    drafted = requests_of(asked, prompts)
    run(model, drafted, speculation=True, **options)
    assert [result(each) for each in drafted] == [result(each) for each in plain]
    assert sum(each.accepted for each in drafted) > 20


def test_a_step_with_drafts_runs_our_ops_and_nothing_else(model, monkeypatch):
    recorder = Recorder(monkeypatch)
    requests = requests_of([{**GREEDY, "ignore_eos": True}], [ids(20) * 3])
    nodes = []
    capture = recorder.capture

    def noting(step):
        replay = capture(step)
        nodes.append([name for name, *_ in recorder.nodes])
        return replay

    run(model, requests, speculation=True, capture=noting)
    layers = ["rms_norm_qkv_rope_cache", "paged_attention", "linear_add", "rms_norm_swiglu", "linear_add"] * 2
    step = ["embed", *layers, "rms_norm_linear", "sample", "advance", "draft"]
    assert nodes[-2:] == [step, step]


def reads_a_length(verify, model, kv_cache, state, rows, tier):
    int(rows.batch.seq_lens[0])
    verify(model, kv_cache, state, rows, tier)


def asks_which_drafts_are_right(verify, model, kv_cache, state, rows, tier):
    verify(model, kv_cache, state, rows, tier)
    (rows.drafts[:, 1:] == state.token[:, None]).nonzero()


@pytest.mark.parametrize("fault", [reads_a_length, asks_which_drafts_are_right])
def test_a_value_that_a_graph_would_freeze_is_found(model, monkeypatch, fault):
    recorder, verify = Recorder(monkeypatch), decode.verify
    monkeypatch.setattr(decode, "verify", lambda *args: fault(verify, *args))
    with pytest.raises(RuntimeError, match="in a step"):
        run(model, requests_of([GREEDY], [ids(20) * 3]), speculation=True, capture=recorder.capture)


def attends_as_a_decode_step(model, kv_cache, state, rows, tier):
    rows.batch.seq_lens.clamp_(max=int(state.batch.seq_lens.max()))


def counts_every_draft(model, kv_cache, state, rows, tier):
    state.output_counts.scatter_add_(1, rows.drafts, torch.ones_like(rows.drafts).int())


@pytest.mark.parametrize("fault", [attends_as_a_decode_step, counts_every_draft])
def test_a_fault_changes_the_answer(model, monkeypatch, fault):
    """Else these tests could not fail."""
    verify = decode.verify
    monkeypatch.setattr(decode, "verify", lambda *args: (fault(*args), verify(*args)))
    with pytest.raises(AssertionError):
        both(model, monkeypatch, [{"frequency_penalty": 1.0, "ignore_eos": True}], [ids(20)], wrong=0.3)


def test_a_request_whose_logits_the_host_sees_has_no_drafts(model, monkeypatch):
    """And none that runs beside it; before and after it they have."""
    asked = [{**GREEDY, "ignore_eos": True}, {**GREEDY, "logprobs": 2, "max_tokens": 5}, {**GREEDY, "max_tokens": 5}]
    prompts = [ids(9, seed) for seed in range(3)]
    hooks = [LogitsHooks(torch.tensor([prompts[2]]), 0, processors=[lambda ids, scores: scores]) for _ in range(2)]
    plain, drafted = requests_of(asked, prompts), requests_of(asked, prompts)
    for requests, own in zip((plain, drafted), hooks, strict=True):
        requests[2].hooks, own.requests = own, [requests[2]]
    run(model, plain, speculation=False)
    monkeypatch.setattr(cpu, "draft", planted(plain))
    run(model, drafted, speculation=True)
    assert [result(each) for each in drafted] == [result(each) for each in plain]
    assert [each.drafted > 0 for each in drafted] == [True, False, False]
    assert [len(each.top_logprobs) for each in drafted] == [0, len(drafted[1].token_ids), 0]


def test_drafts_from_before_a_step_on_the_host_are_not_verified(model, monkeypatch):
    """The host samples for a request that comes and goes; then the slots are those that the drafts were for."""
    asked, prompts = [{**GREEDY, "ignore_eos": True, "max_tokens": 90}], [ids(9)]
    [plain], [request] = (requests_of(asked, prompts) for _ in range(2))
    run(model, [plain], speculation=False)
    monkeypatch.setattr(cpu, "draft", planted([plain]))
    engine = Engine(model, max_batch_size=2, max_seq_len=WINDOW_TOKENS, speculation=True)
    engine.add([request])
    while not request.accepted:
        engine.step()
    before = request.accepted
    run(model, requests_of([{**GREEDY, "logprobs": 1, "max_tokens": 5}], [ids(5, 1)]), engine)
    assert result(request) == result(plain) and request.accepted > before


def test_a_text_that_repeats_itself_takes_fewer_steps(model):
    """By the op `draft` itself: a token with a large bias, again and again."""
    asked = [{**GREEDY, "logit_bias": {9: 1000.0}, "max_tokens": 100}]
    plain, drafted = requests_of(asked, [ids(5)]), requests_of(asked, [ids(5)])
    steps = []
    for requests, on in ((plain, False), (drafted, True)):
        engine = Engine(model, max_batch_size=1, max_seq_len=WINDOW_TOKENS, speculation=on)
        engine.add(requests)
        while engine.busy:
            engine.step()
            steps.append(on)
    assert result(plain[0]) == result(drafted[0])
    # Three tokens are the first that end like a part of them; the other 97 take 16 a step.
    assert steps.count(False) == 100 and steps.count(True) <= 3 + -(-97 // 16) + 1


# -------------------------------------------------------------------- whether drafts pay


def test_drafts_that_do_not_pay_pause():
    account = Gain()
    for _ in range(WINDOW - 1):
        account.verified(0, 0.2)
    account.verified(6, 0.2)
    assert account.pause == PAUSE  # 6 tokens for the cost of 6.4
    for _ in range(PAUSE):
        assert account.pause
        account.passed()
    assert account == Gain()
    for _ in range(WINDOW - 1):
        account.verified(0, 0.2)
    account.verified(7, 0.2)
    assert account == Gain()


def slots(count):
    return [Slot(Request([1], SamplingParams(), 9), index, [0], Tier.GREEDY) for index in range(count)]


@pytest.fixture
def chooser(model):
    engine = Engine(model, max_batch_size=12, max_seq_len=64, speculation=True)
    return engine._runner.speculation


def test_the_cost_of_a_step_is_shared_by_those_whose_drafts_it_verified(chooser):
    """It slows all four down."""
    usual, _ = USUAL_COST
    first, *others = running = slots(4)
    first.drafts = others[0].drafts = 3
    chooser.account(True, [(slot, Report([(1, 0.0, 0)] * (1 + (slot is first)), 2)) for slot in running])
    assert first.gain == Gain(1, 1 - 2 * usual) and others[0].gain == Gain(1, -2 * usual)
    assert others[1].gain == others[2].gain == Gain()
    assert [slot.drafts for slot in running] == [2] * 4
    assert [(slot.request.drafted, slot.request.accepted) for slot in running] == [(3, 1), (3, 0), (0, 0), (0, 0)]


def test_when_a_step_verifies_drafts(chooser):
    """Not before a step of the same slots has made drafts, nor while those of all pause."""
    running = slots(3)
    assert not chooser.prepare(running)
    assert not chooser.prepare(running)
    running[1].drafts = 1
    assert chooser.prepare(running) and chooser.prepare(running)
    assert not chooser.prepare(running[1:]) and chooser.prepare(running[1:])
    chooser.drop_drafts()
    assert not chooser.prepare(running[1:]) and chooser.prepare(running[1:])
    running[1].gain.pause = 1
    assert not chooser.prepare(running[1:])
    many = slots(MOST_SEQUENCES + 1)
    many[0].drafts = 1
    assert not chooser.prepare(many) and not chooser.prepare(many)
    assert not chooser.prepare(many[:-1]) and chooser.prepare(many[:-1])


def test_by_default_drafts_that_cost_much_are_not_verified(model, chooser):
    by_default = Speculation(chooser._state, MOST_COST)
    [slot] = slots(1)
    slot.drafts = 1
    slot.request.prompt_ids *= 100
    for cost, expected in ((Cost(0.2, 0.0011), False), (Cost(0.2, 0.0009), True)):
        chooser.costs[1] = by_default.costs[1] = cost
        assert [each.prepare([slot]) or each.prepare([slot]) for each in (by_default, chooser)] == [expected, True]
    assert Engine(model, max_batch_size=1, max_seq_len=64)._runner.speculation is None  # on a CPU


def test_wrong_drafts_are_switched_off_and_tried_again(model, monkeypatch):
    monkeypatch.setattr(gain, "WINDOW", 4)
    monkeypatch.setattr(gain, "PAUSE", 10)
    asked = [{**GREEDY, "ignore_eos": True, "max_tokens": 60}]
    [request], _ = both(model, monkeypatch, asked, [ids(20)], wrong=1.0)
    # A token by prefill, one by a step that drafts, 4 by steps with 15 drafts, 10 without, and so on: 16 steps with
    # drafts, of which the last two have fewer places left.
    assert request.accepted == 0 and request.drafted == 15 * 14 + 13 + 12


def test_a_warm_up_captures_all_steps_and_measures_their_cost(model, monkeypatch):
    recorder, captured = Recorder(monkeypatch), []

    def capture(step):
        captured.append(step)
        return recorder.capture(step)

    engine = Engine(model, max_batch_size=9, max_seq_len=WINDOW_TOKENS, speculation=True, capture=capture)
    engine.warm_up()
    engine.warm_up()
    assert engine.pages.free == len(engine.pages) and not engine._runner.speculation.rows.batch.seq_lens.any()
    # Steps of 1, 2, 4, 8 and 9 rows, by tier, and in two parts; with drafts up to 8; chunks of up to 16, 64, 128 and
    # 256 tokens; first tokens, by tier.
    assert len(captured) == (4 + 2) * 5 + 4 * 4 + 4 + 4
    assert [*engine._runner.speculation.costs] == [*range(1, MOST_SEQUENCES + 1)]
    run(model, requests_of([GREEDY], [ids(20) * 3, ids(9)]), engine)
    assert len(captured) == 54


def test_a_warm_up_after_a_cancel_spoils_no_prefix(model, monkeypatch):
    """The cancelled request had drafts. What the warm-up writes to is reused by nobody."""
    asked, prompts = [{**GREEDY, "ignore_eos": True, "max_tokens": 50}], [ids(150)]
    [plain] = requests_of(asked, prompts)
    run(model, [plain], speculation=False)
    monkeypatch.setattr(cpu, "draft", planted([plain]))
    recorder, [request, again] = Recorder(monkeypatch), requests_of(asked, prompts * 2)
    options = {"max_batch_size": 2, "max_seq_len": WINDOW_TOKENS, "speculation": True, "capture": recorder.capture}
    engine = Engine(model, **options)
    engine.add([request])
    while not request.accepted:
        engine.step()
    engine.cancel([request])
    assert (engine._runner.speculation.rows.batch.seq_lens > 0).any()
    engine.warm_up()
    run(model, [again], engine)
    assert again.cached_tokens and again.token_ids == plain.token_ids
