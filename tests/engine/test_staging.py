"""A request on its way to its slot: what the host packs, and where it is in the batch's buffer."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import InternLM3Config
from internlm3.kernels import cpu
from internlm3.runtime.engine.layout import state_layout
from internlm3.runtime.engine.request import Request
from internlm3.runtime.engine.staging import Staging
from internlm3.runtime.engine.state import DecodeState, Slot, Tier
from internlm3.runtime.model.kv_cache import PAGE, pages_of
from internlm3.runtime.model.rope import inverse_frequencies
from internlm3.runtime.sampling.params import SamplingParams
from internlm3.runtime.sampling.settings import STATE

PAGES, SPARE, CHUNK = 5, 99, 2 * PAGE


def make(slots, vocab_size=70, head_dim=12):
    config = InternLM3Config(
        vocab_size=vocab_size, head_dim=head_dim, max_position_embeddings=PAGE,
        rope_scaling={"rope_type": "dynamic", "factor": 3.0},
    )  # fmt: skip
    layout = state_layout(PAGES, vocab_size, head_dim)
    rows = torch.zeros(slots * layout.words, dtype=torch.int32)
    return DecodeState.of(layout, rows), Staging(config, layout, rows, SPARE, CHUNK), config


def fields(state):
    return {**{name: x for name, x in vars(state).items() if name != "batch"}, **vars(state.batch)}


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 400), st.integers(1, 20))
def test_places_of_fields(slots, pages, vocab_size, half_dim):
    """Every vector begins at a multiple of 16 bytes in every slot, every number at one of its size; none overlap."""
    layout = state_layout(pages, vocab_size, 2 * half_dim)
    buffer = torch.zeros(slots * layout.words, dtype=torch.int32)
    for number, (name, x) in enumerate(layout.views(buffer).items(), start=1):
        place = x.storage_offset() * x.element_size()
        if x.dim() == 2 and name != "report":
            assert place % 16 == 0 and (x.stride(0) * x.element_size()) % 16 == 0
        assert place % x.element_size() == 0 and (x == 0).all()
        x.fill_(number)
    for number, x in enumerate(layout.views(buffer).values(), start=1):
        assert (x == number).all()
    assert all(start < end for start, end in pairwise(layout.starts))
    assert layout.views(buffer)["report"].is_contiguous()  # it is copied to the host at once


def expected(request, pages, config):
    """The fields of a request's slot. `block_table` and `history` only as far as its own go."""
    p, ids = request.params, request.prompt_ids
    vocab = config.vocab_size
    words = -(-vocab // 32)

    def bits(tokens):
        values = [sum(1 << token % 32 for token in set(tokens) if token // 32 == word) for word in range(words)]
        return [value - (value >> 31 << 32) for value in values]

    permitted = set(range(32 * words) if p.allowed_token_ids is None else p.allowed_token_ids)
    permitted -= set(p.suppress_tokens or ())
    settings = {name: getattr(p, name) for name in STATE}
    return {
        **{name: torch.tensor(value, dtype=getattr(torch, STATE[name])).item() for name, value in settings.items()},
        "top_k": min(max(p.top_k, 0), 2**31 - 1),
        "token": 0,
        "report": [0, 0, 0, 0],
        "history": ids,
        "most_drafts": 2**31 - 1,
        "seq_lens": len(ids),
        "max_len": len(ids) + request.max_tokens,
        "min_len": len(ids) + p.min_tokens,
        "seed": request.seed,
        "stream": request.answer,
        "end_mask": bits(request.ends),
        "permitted": bits(permitted),
        "allowed": bits(permitted - request.ends if p.min_tokens else permitted),
        "block_table": pages,
        "inv_freq": inverse_frequencies(config, len(ids)).tolist(),
        "prompt_counts": [ids.count(token) for token in range(vocab)],
        "output_counts": [0] * vocab,
        "logit_bias": [(p.logit_bias or {}).get(token, 0.0) for token in range(vocab)],
    }


token = st.integers(0, 69)
tokens = st.lists(token, min_size=1, max_size=9)
asked = st.fixed_dictionaries(
    {"seed": st.sampled_from([0, -(2**63), 2**63 - 1])},
    optional={
        "temperature": st.sampled_from([0, 0.1, 1]),
        "top_k": st.sampled_from([-1, 0, 7, 2**40]),
        "top_p": st.sampled_from([0.3, 1]),
        "min_p": st.sampled_from([0.1, 1]),
        "typical_p": st.just(0.7),
        "repetition_penalty": st.just(1.1),
        "presence_penalty": st.just(-0.3),
        "frequency_penalty": st.just(0.7),
        "min_tokens": st.integers(0, 3),
        "stop_token_ids": tokens,
        "allowed_token_ids": st.lists(token, min_size=30, max_size=40, unique=True),
        "suppress_tokens": tokens,
        "logit_bias": st.dictionaries(token, st.sampled_from([0.1, -2.5]), max_size=9),
    },
)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(asked, st.integers(1, PAGES * PAGE), st.integers(0, 2), st.randoms()), min_size=1, max_size=5)
)
def test_each_request_fills_its_slot_and_no_other(requests):
    """Whatever had the slot, and the host's buffers, before."""
    state, staging, config = make(3)
    known = {}
    for params, length, index, rng in requests:
        ids = [rng.choice([0, 1, 5, 69]) for _ in range(length)]
        request = Request(ids, SamplingParams(**params), 9, frozenset([3, 64]), index)
        pages = rng.sample(range(90), pages_of(length))
        staging.copy(Slot(request, index, pages, Tier.FULL), length, 0)
        staging.count_prompt(cpu)
        staging.store(cpu)
        known[index] = expected(request, pages, config)
        for slot, wanted in known.items():
            found = {name: x[slot].tolist() for name, x in fields(state).items() if x is not None}
            for name in ("block_table", "history"):
                found[name] = found[name][: len(wanted[name])]
            for name, value in wanted.items():
                value = torch.tensor(value, dtype=torch.float32).tolist() if name == "logit_bias" else value
                assert found[name] == value, name
        for slot in {0, 1, 2} - known.keys():
            assert all((x[slot] == 0).all() for x in fields(state).values() if x is not None)


@pytest.mark.parametrize(("begin", "width"), [(0, 64), (0, 128), (64, 64), (128, 128)])
def test_chunks_are_padded_on_the_left(begin, width):
    """Padding is written to the spare page where it coincides with cached tokens."""
    _, staging, _ = make(1)
    ids, pages = list(range(1, 70)) * 3, [7, 8, 9, 10]  # 207 tokens
    slot = Slot(Request(ids, SamplingParams(), 9), 0, pages, Tier.GREEDY)
    staging.copy(slot, begin, width)
    chunk = ids[begin : begin + width]
    assert staging.tokens[:width].tolist() == [0] * (width - len(chunk)) + chunk
    assert staging.batch.seq_lens.tolist() == [begin + len(chunk)]
    assert staging.batch.block_table[0, :4].tolist() == pages
    spared = begin // PAGE
    assert staging.batch.write_table[0, :4].tolist() == [SPARE] * spared + pages[spared:]
