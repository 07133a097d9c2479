"""The decode step: slots that do not affect each other, and a step that a CUDA graph can hold.

Without a GPU a stand-in for graphs checks that, see tests/support/capture.py.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import InternLM3Config, InternLM3ForCausalLM
from internlm3.kernels import cpu, cpu_cache
from internlm3.kernels.reference import FEW_ROWS
from internlm3.kernels.reference_sampling import FEW_TOKENS
from internlm3.runtime.engine import decode, prefill
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.graphs import Step
from internlm3.runtime.engine.hooks import log_probability, top_logprobs
from internlm3.runtime.engine.layout import state_layout
from internlm3.runtime.engine.request import Request
from internlm3.runtime.engine.staging import Staging
from internlm3.runtime.engine.state import DecodeState, Slot, Tier, tier_of
from internlm3.runtime.model.kv_cache import PAGE, pages_of
from internlm3.runtime.model.rope import inverse_frequencies
from internlm3.runtime.sampling.params import SamplingParams
from internlm3.tests.sampling.test_sampling import floats, random_logits
from internlm3.tests.support.capture import Recorder

CPU = torch.device("cpu")


class Rows:
    """The slots of a state without a model: calling it with logits samples from them. A row: params, prompt, stream."""

    def __init__(self, rows, vocab_size, eos_token_ids=(), tier=None):
        requests = [Request(prompt, params, 1000, frozenset(eos_token_ids), answer) for params, prompt, answer in rows]
        config = InternLM3Config(vocab_size=vocab_size, head_dim=4)
        layout = state_layout(1, vocab_size, config.head_dim)
        buffer = torch.zeros(len(rows) * layout.words, dtype=torch.int32)
        self.state = DecodeState.of(layout, buffer)
        staging = Staging(config, layout, buffer, spare=1, chunk=0)
        self.tier = max(map(tier_of, requests)) if tier is None else tier
        for row, request in enumerate(requests):
            staging.copy(Slot(request, row, [0], self.tier), len(request.prompt_ids), 0)
            staging.count_prompt(cpu)
            staging.store(cpu)

    def __call__(self, logits):
        decode.sample(cpu, logits, self.state, self.tier)
        return self.state.report.clone()

    def keep(self, rows):
        """Moves these rows to slots 0, 1, ..., none of which may come later in the list."""
        for target, source in enumerate(rows):
            if source != target:
                self.state.move(source, target)
        self.state = self.state.slots(0, len(rows))


def tokens_of(words):
    """The tokens whose bits are set in words [W] int32."""
    return {32 * word + bit for word, value in enumerate(words.tolist()) for bit in range(32) if value >> bit & 1}


def test_masks_have_a_bit_for_each_token():
    """Sign bits, the last word, and a token named twice; min_tokens masks the end tokens."""
    params = SamplingParams(allowed_token_ids=[0, 31, 32, 63, 69, 31], suppress_tokens=[32, 64], min_tokens=1)
    state = Rows([(params, [1], 0), (SamplingParams(), [1], 0)], 70, eos_token_ids=[31, 69]).state
    assert tokens_of(state.end_mask[0]) == tokens_of(state.end_mask[1]) == {31, 69}
    assert tokens_of(state.permitted[0]) == {0, 31, 63, 69} and tokens_of(state.allowed[0]) == {0, 63}
    assert tokens_of(state.permitted[1]) == set(range(96))


def run(rows, logits, steps):
    """The tokens of each row, -1 while it is idle."""
    return torch.stack([rows(logits)[:, 0] for _ in range(steps)], dim=1).tolist()


def test_equal_rows_sample_the_same_and_streams_differ():
    logits = random_logits(1, 500, 31).expand(3, -1)
    params = SamplingParams(seed=5)
    rows = [(params, [1, 2], 0), (params, [1, 2], 1), (params, [1, 2], 0)]
    first, second, again = run(Rows(rows, 500), logits, 20)
    assert first == again and first != second and len(set(first)) > 5
    assert [first] == run(Rows(rows[:1], 500), logits[:1], 20)


def test_rows_without_a_seed_follow_torch_manual_seed():
    logits = random_logits(2, 500, 32)

    def generated():
        return run(Rows([(SamplingParams(), [1], 0)] * 2, 500), logits, 10)

    torch.manual_seed(1)
    first = generated()
    assert generated() != first
    torch.manual_seed(1)
    assert generated() == first


def test_a_continued_text_samples_what_the_whole_sampled():
    logits = random_logits(1, 300, 33)
    params = SamplingParams(seed=9, repetition_penalty=1.2)
    whole = run(Rows([(params, [4, 5], 0)], 300), logits, 12)[0]
    assert run(Rows([(params, [4, 5, *whole[:7]], 0)], 300), logits, 5)[0] == whole[7:]


def test_rows_do_not_change_each_other_and_can_move():
    rows = [
        (SamplingParams(seed=1, frequency_penalty=1.0, top_k=20), [1], 0),
        (SamplingParams(temperature=0, min_tokens=4, logit_bias={2: 50.0}), [2, 3], 0),
        (SamplingParams(seed=3, allowed_token_ids=[7, 8, 9], typical_p=0.9), [5], 2),
        (SamplingParams(seed=4, temperature=1.5), [6], 0),
    ]
    logits = random_logits(4, 400, 34)
    assert run(Rows(rows[3:], 400), logits[3:], 8) == run(Rows(rows, 400), logits, 8)[3:]
    whole = run(Rows(rows, 400, [2]), logits, 8)
    rows_ = Rows(rows, 400, [2])
    run(rows_, logits, 3)
    rows_.keep([2, 1])
    assert run(rows_, logits[[2, 1]], 5) == [whole[2][3:], whole[1][3:]]
    assert whole[1][4:] == [2, -1, -1, -1] and 2 not in whole[1][:4]  # it ends, and is idle
    assert set(whole[2]) <= {7, 8, 9}


def test_penalties_count_what_was_generated():
    logits = torch.zeros(1, 5)
    logits[0] = floats(5.0, 4.0, 3.0, 2.0, 1.0)
    greedy = SamplingParams(temperature=0, presence_penalty=2.0)
    assert run(Rows([(greedy, [0, 1], 0)], 5), logits, 4)[0] == [0, 1, 0, 0]
    greedy = SamplingParams(temperature=0, frequency_penalty=1.5)
    assert run(Rows([(greedy, [0, 1], 0)], 5), logits, 4)[0] == [0, 1, 0, 2]
    greedy = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert run(Rows([(greedy, [0], 0)], 5), logits, 4)[0] == [1, 2, 0, 0]


@pytest.mark.parametrize("ignore_eos, expected", [(False, [1, 1, 0]), (True, [0, 0, 0])])
def test_min_tokens_masks_the_end_tokens(ignore_eos, expected):
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[2], ignore_eos=ignore_eos)
    rows_ = Rows([(params, [3], 0)], 4, [0])
    assert run(rows_, floats(9.0, 1.0, 5.0, 0.0)[None], 3)[0] == expected


def test_min_tokens_that_forbids_everything_is_refused():
    params = SamplingParams(min_tokens=1, allowed_token_ids=[2])
    with pytest.raises(ValueError, match=r"min_tokens=1 holds back every token of allowed_token_ids=\[2\]"):
        Rows([(params, [1], 0)], 10, [2])
    params = SamplingParams(allowed_token_ids=[2, 3], suppress_tokens=[3, 2])
    with pytest.raises(ValueError, match=r"suppress_tokens holds all of allowed_token_ids=\[2, 3\]"):
        Rows([(params, [1], 0)], 10, [2])


setting = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 7, 500]),
        "top_p": st.sampled_from([1.0, 0.5, 0.0]),
        "min_p": st.sampled_from([0.0, 0.1, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "seed": st.integers(0, 9),
    }
)


@settings(max_examples=60)
@given(st.lists(setting, min_size=1, max_size=3), st.integers(0, 99))
def test_an_unused_stage_leaves_a_row_bit_identical(given_settings, seed):
    """A batch runs in the highest tier that any row needs, which does not change the others."""
    logits = random_logits(len(given_settings), 150, seed)
    rows = [(SamplingParams(**each), [1, 2, 3], 0) for each in given_settings]
    lowest = Rows(rows, 150, [7])
    higher = [Rows(rows, 150, [7], tier) for tier in Tier if tier > lowest.tier]
    for _ in range(4):
        reports = lowest(logits)
        assert all(torch.equal(each(logits), reports) for each in higher)


@pytest.mark.parametrize(
    ("params", "tier"),
    [
        ({"temperature": 0}, Tier.GREEDY),
        ({"temperature": 0, "top_p": 0.5}, Tier.GREEDY),
        ({"temperature": 0, "top_p": 0.5, "repetition_penalty": 1.1}, Tier.USUAL),
        ({"temperature": 1.0}, Tier.USUAL),
        ({"temperature": 1.0, "top_k": FEW_TOKENS, "top_p": 0.8, "min_p": 0.1}, Tier.USUAL),
        ({"temperature": 1.0, "top_k": FEW_TOKENS + 1}, Tier.WIDE),
        ({"temperature": 1.0, "top_p": 0.8}, Tier.WIDE),
        ({"temperature": 1.0, "top_k": -1, "top_p": 0.8, "repetition_penalty": 1.1}, Tier.WIDE),
        ({"temperature": 1.0, "typical_p": 0.8}, Tier.FULL),
        ({"temperature": 0, "presence_penalty": 0.1}, Tier.FULL),
    ],
)
def test_the_lowest_tier_with_all_stages(params, tier):
    """Only the usual tier tells `sample` that a top-k leaves few candidates."""
    rows = Rows([(SamplingParams(**params), [1], 0)], 10)
    assert rows.tier == tier
    assert rows.state.stages(tier)["few_candidates"] == (tier == Tier.USUAL)


def test_the_device_counts_tokens_against_the_limit():
    rows = [(SamplingParams(temperature=0), [1] * length, 0) for length in (1, 3)]
    rows = Rows(rows, 5)
    rows.state.max_len.copy_(torch.tensor([3, 4]))
    reports = [rows(floats(0, 1, 2, 9, 4).expand(2, -1)).tolist() for _ in range(3)]
    assert [[row[:2] for row in step] for step in reports] == [
        [[3, 0], [3, 2]],
        [[3, 2], [-1, 2]],
        [[-1, 2], [-1, 2]],
    ]


def test_top_logprobs():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(35)) * 3
    token_ids, logprobs = top_logprobs(logits, 3)
    expected = logits.double().log_softmax(-1).topk(3)
    assert torch.equal(token_ids, expected.indices)
    torch.testing.assert_close(logprobs.double(), expected.values, rtol=1e-6, atol=1e-6)
    token_ids, logprobs = top_logprobs(logits, 99)
    assert token_ids.shape == (2, 50)
    for ids, values in zip(token_ids.T, logprobs.T, strict=True):
        assert torch.equal(log_probability(logits, ids), values)  # what a sampled token gets


# -------------------------------------------------------------------- the step in a graph

SHAPE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.3,
    "tie_word_embeddings": False,
}  # fmt: skip
ASKED = [
    {"temperature": 0},
    {"seed": 1, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1},
    {"seed": 2, "frequency_penalty": 0.5, "min_tokens": 6, "logit_bias": {5: 2.0}},
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return InternLM3ForCausalLM(InternLM3Config(**SHAPE), dtype=torch.float32)


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


def answers(model, count=3, engine=None, **options):
    """Answers to some requests of different lengths and settings; and the engine, idle again."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 320, length).tolist() for length in (5, 90, 1, 64, 33)[:count]]
    engine = engine or Engine(model, max_batch_size=4, max_seq_len=160, **options)
    requests = [
        Request(prompt, SamplingParams(**ASKED[index % 3]), 12 + index, frozenset([7]))
        for index, prompt in enumerate(prompts)
    ]
    engine.add(requests)
    while engine.busy:
        engine.step()
    return [(request.token_ids, request.finish_reason) for request in requests], engine


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_captured_steps_give_the_tokens_of_eager_ones(model, recorder, depth):
    expected, _ = answers(model, 5)
    found, engine = answers(model, 5, capture=recorder.capture, depth=depth)
    assert found == expected and engine.pages.free == len(engine.pages)
    assert {len(tokens) for tokens, _ in found} - {12} and recorder.replays > 10


def test_after_a_warm_up_nothing_is_captured(model, recorder):
    """Every batch size and every tier, on idle slots: no page is written, and answers do not change."""
    expected, _ = answers(model, 5)
    captured = []

    def capture(step):
        captured.append(step)
        return recorder.capture(step)

    engine = Engine(model, max_batch_size=4, max_seq_len=160, capture=capture)
    before = [
        kv.fill_(1.0).clone() for kv in engine.kv_cache.layers
    ]  # uninitialised memory may hold NaN, which equals nothing
    engine.warm_up()
    engine.warm_up()
    # Steps of 1, 2 and 4 rows, by tier, and in two parts; chunks of up to 16, 64, 128 and 160 tokens; first tokens, by
    # tier.
    assert len(captured) == (4 + 2) * 3 + 4 + 4
    assert engine.pages.free == len(engine.pages) and all(map(torch.equal, engine.kv_cache.layers, before))
    found, _ = answers(model, 5, engine=engine)
    assert found == expected and len(captured) == 26


def test_a_warm_up_is_refused_while_requests_wait(model):
    engine = Engine(model, max_batch_size=2, max_seq_len=160)
    request = Request([1, 2], SamplingParams(temperature=0), 9)
    engine.add([request])
    with pytest.raises(RuntimeError, match="before requests come"):
        engine.warm_up()
    engine.cancel([request])
    engine.warm_up()


def test_a_step_runs_our_ops_and_nothing_else(model, recorder):
    """Five a layer, embedding, head, sample, advance: no op of PyTorch between them."""
    answers(model, 1, capture=recorder.capture)
    assert [name for name, *_ in recorder.nodes] == [
        "embed",
        *["rms_norm_qkv_rope_cache", "paged_attention", "linear_add", "rms_norm_swiglu", "linear_add"] * 2,
        "rms_norm_linear",
        "sample",
        "advance",
    ]


def test_the_state_stays_at_its_addresses(model, recorder):
    engine = Engine(model, max_batch_size=2, max_seq_len=160, capture=recorder.capture)
    places = [tensor.data_ptr() for tensor in engine._runner._state.advance_arguments().values()]
    engine.add([Request([1, 2], SamplingParams(temperature=0), 9)])
    while engine.busy:
        engine.step()
    assert places == [tensor.data_ptr() for tensor in engine._runner._state.advance_arguments().values()]


def test_late_steps_write_no_page(model):
    """Steps after the end of every answer write no page."""
    _, engine = answers(model, 3)
    before = [kv.clone() for kv in engine.kv_cache.layers]
    with torch.inference_mode():
        engine._runner._steps._run(Step(4, Tier.FULL))
    for kv, old in zip(engine.kv_cache.layers, before, strict=True):
        assert torch.equal(kv.nan_to_num(), old.nan_to_num())
    assert (engine._runner._state.report[:, 0] == -1).all()


def test_a_cancelled_slot_writes_no_page(model, recorder):
    """The captured step still runs its slot, beside three others; its pages may belong to another request by then."""
    engine = Engine(model, max_batch_size=4, max_seq_len=160, capture=recorder.capture, depth=2)
    requests = [Request([row, 1, 2], SamplingParams(temperature=0), 40) for row in range(4)]
    engine.add(requests)
    for _ in range(3):
        engine.step()
    pages = engine._runner.scheduler.slots[1].pages
    engine.cancel([requests[1]])
    before = [kv[:, pages].clone() for kv in engine.kv_cache.layers]
    while engine.busy:
        engine.step()
    for kv, old in zip(engine.kv_cache.layers, before, strict=True):
        assert torch.equal(kv[:, pages].nan_to_num(), old.nan_to_num())


def reads_a_length(step, model, kv_cache, state, tier):
    int(state.batch.seq_lens[0])
    step(model, kv_cache, state, tier)


def branches_on_a_tensor(step, model, kv_cache, state, tier):
    if state.token[0] >= 0:
        step(model, kv_cache, state, tier)


def asks_which_rows_run(step, model, kv_cache, state, tier):
    state.batch.seq_lens.nonzero()
    step(model, kv_cache, state, tier)


def passes_a_length_as_a_number(step, model, kv_cache, state, tier):
    state.batch.seq_lens = torch.full_like(state.batch.seq_lens, 6)
    step(model, kv_cache, state, tier)


@pytest.mark.parametrize(
    "fault", [reads_a_length, branches_on_a_tensor, asks_which_rows_run, passes_a_length_as_a_number]
)
def test_a_value_that_a_graph_would_freeze_is_found(model, recorder, monkeypatch, fault):
    step = decode.step
    monkeypatch.setattr(decode, "step", lambda *args: fault(step, *args))
    with pytest.raises(RuntimeError, match="in a step"):
        answers(model, 2, capture=recorder.capture)


def test_a_replaced_state_tensor_is_found(model, recorder, monkeypatch):
    """Each step reads a tensor of its own: right when it runs eagerly, wrong when it is replayed."""
    expected, _ = answers(model, 2)
    sample, fed = decode.sample, {}

    def rebinding(ops, logits, state, tier):
        token = state.token
        state.token = fed.setdefault(len(token), token.clone()) if recorder.nodes else token
        sample(ops, logits, state, tier)

    with recorder.allowing_torch():
        monkeypatch.setattr(decode, "sample", rebinding)
        found, _ = answers(model, 2, capture=recorder.capture)
    assert found != expected


def test_chunks_end_where_pages_and_query_blocks_end():
    """Otherwise a reused prefix, and a launch of several chunks, would be cut at other places."""
    assert prefill.CHUNK % PAGE == prefill.CHUNK % cpu_cache.QUERY_BLOCK == prefill.LAUNCH_TOKENS % prefill.CHUNK == 0


@pytest.mark.skipif(cpu.ROW_COUNT_CHANGES_BITS, reason="on this CPU the number of rows may change rounding")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_chunks_in_one_launch(monkeypatch, threads, dtype):
    """Bit-identical to one launch for each chunk, for odd shapes and any number of threads."""
    monkeypatch.setattr(prefill, "CHUNK", cpu_cache.QUERY_BLOCK)
    cut, most = prefill.CHUNK, 3 * prefill.CHUNK
    config = InternLM3Config(
        vocab_size=320, hidden_size=72, intermediate_size=97, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=12, initializer_range=0.3,
    )  # fmt: skip
    model = InternLM3ForCausalLM(config, dtype=dtype)
    engine = Engine(model, max_batch_size=1, max_seq_len=4 * most)
    batch = engine._runner._state.slots(0, 1).batch
    pages = engine.pages.allocate(pages_of(4 * most))
    batch.block_table[0, : len(pages)] = torch.tensor(pages)
    batch.inv_freq.copy_(inverse_frequencies(config, 1, CPU))
    launches, through = [], model.model.run
    monkeypatch.setattr(
        model.model, "run", lambda x, *args, **flags: launches.append(len(x)) or through(x, *args, **flags)
    )

    def filled(prompt, begin, together):
        monkeypatch.setattr(prefill, "LAUNCH_TOKENS", together)
        for kv in engine.kv_cache.layers:
            kv.fill_(7)
        if begin:
            prefill.run_chunks(model, engine.kv_cache, batch, [prompt[:begin]], [0])
        launches.clear()
        last = prefill.run_chunks(model, engine.kv_cache, batch, [prompt], [begin])
        return list(launches), last, torch.stack(engine.kv_cache.layers)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for tokens, begin, expected in [
            (2 * cut, 0, [2 * cut]),
            (most + 2 * cut + 1, 0, [most, 2 * cut, 1]),
            (most + FEW_ROWS, 0, [most, FEW_ROWS]),
            (2 * cut + FEW_ROWS + 1, 0, [2 * cut + FEW_ROWS + 1]),
            (most + cut + 100, cut, [most, 100]),
            (most + 101, cut, [2 * cut + 101]),
        ]:
            prompt = torch.randint(320, (tokens,))
            of_chunks, *values = filled(prompt, begin, cut)
            shared, *same = filled(prompt, begin, most)
            assert shared == expected and len(of_chunks) == -(-(tokens - begin) // cut)
            assert all(map(torch.equal, same, values)), (tokens, begin)
    finally:
        torch.set_num_threads(before)
