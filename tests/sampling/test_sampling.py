"""Sampling: distributions are transformers', the choice is exact, and a row does not depend on its neighbours."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from internlm3.kernels import reference_sampling
from internlm3.kernels.reference_sampling import filter_logits, penalize, philox, sample

SEEDS = [11, 12, 13]


def floats(*values):
    return torch.tensor(values, dtype=torch.float32)


def ints(*values):
    return torch.tensor(values, dtype=torch.int64)


def keys(rows, seed=0, stream=0):
    """The random numbers of positions 0, 1, ... of one stream."""
    return {
        "seed": torch.full((rows,), seed),
        "stream": torch.full((rows,), stream),
        "position": torch.arange(rows),
    }


def random_logits(rows, vocab, seed, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def random_ids(vocab, count, seed):
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed))


def counts_of(ids, vocab):
    return torch.bincount(ids, minlength=vocab).to(torch.int32)[None]


def by_transformers(logits, ids, **config):
    """Probabilities in float64 after transformers' own list of processors, in its own order."""
    given = GenerationConfig(do_sample=True, num_beams=1, **{"top_k": 0, **config})
    owner: Any = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=False),
        _merge_criteria_processor_list=lambda ours, theirs: ours,
    )
    processors = GenerationMixin._get_logits_processor(owner, given, input_ids_seq_length=len(ids))
    return processors(ids.expand(len(logits), -1), logits.double()).softmax(-1)


def by_us(logits, ids, *, repetition_penalty=None, temperature=1.0, **filters):
    rows, vocab = logits.shape
    per_row = {name: (ints if name == "top_k" else floats)(*[value] * rows) for name, value in filters.items()}
    if repetition_penalty is not None:
        logits = penalize(
            logits,
            repetition_penalty=floats(*[repetition_penalty] * rows),
            prompt_counts=counts_of(ids, vocab).expand(rows, -1),
        )
    return filter_logits(logits, temperature=floats(*[temperature] * rows), **per_row).double().softmax(-1)


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 100.0},
    {"temperature": 1e-4},
    {"repetition_penalty": 1.005},
    {"repetition_penalty": 0.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 5000},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"top_p": 1e-12},
    {"top_p": 0.0},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"typical_p": 0.9},
    {"typical_p": 0.2},
    {"typical_p": 1e-12},
    {"top_k": 30, "typical_p": 0.6},
    {"top_p": 0.9, "min_p": 0.1},
    {"temperature": 1.0, "top_p": 0.8, "top_k": 40, "repetition_penalty": 1.005},
    {"temperature": 1.7, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()) or "plain")
def test_distribution_is_that_of_transformers(setting, seed):
    logits = random_logits(4, 1777, seed)
    ids = random_ids(1777, 100, seed)
    expected = by_transformers(logits, ids, **setting)
    # 3e-6: the float32 scaling of logits up to 14 by 1/temperature; at 1e-4 by 1e4, where only ratios near 1 survive.
    torch.testing.assert_close(by_us(logits, ids, **setting), expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("setting", [{"top_k": 7}, {"top_k": 40}, {"typical_p": 0.5}, {"min_p": 0.2}])
def test_ties_share_one_fate_as_in_transformers(setting, seed):
    logits = random_logits(3, 300, seed).round()  # few distinct values
    expected = by_transformers(logits, ints(0), **setting)
    torch.testing.assert_close(by_us(logits, ints(0), **setting), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.77, 0.95])
def test_top_p_keeps_a_tie_whole(top_p, seed):
    logits = random_logits(1, 300, seed).round()
    probability = logits.double().softmax(-1)[0]
    heavier = torch.stack([probability[logits[0] > value].sum() for value in logits[0]])
    kept = by_us(logits, ints(0), top_p=top_p)[0] > 0
    assert torch.equal(kept, heavier < top_p)


def test_zero_ties_with_minus_zero():
    assert by_us(floats(-0.0, 0.0, -0.0, -1.0)[None], ints(0), top_k=1)[0].tolist() == [1 / 3, 1 / 3, 1 / 3, 0]


def test_weights_are_powers_of_two():
    bits = -torch.rand(100_000, generator=torch.Generator().manual_seed(1)) * 16
    exact = torch.exp2(bits.double() + reference_sampling.UNIT_BITS)
    # 2e-7, the polynomial's share, plus one unit of the last place that the fraction loses for bits near 0.
    torch.testing.assert_close(reference_sampling._weights(bits[None])[0].double(), exact, rtol=2.5e-7, atol=1)
    edges = reference_sampling._weights(floats(0.0, -1e-30, -1.0, -40.0, -41.0, -1e30, -math.inf)[None])
    assert edges[0].tolist() == [2**40, 2**40, 2**39, 1, 0, 0, 0]


def test_bias_penalties_and_mask_by_hand():
    logits = floats(2.0, -2.0, 1.0, 0.5, 0.0)[None]
    out = penalize(
        logits,
        repetition_penalty=floats(2.0),
        frequency_penalty=floats(0.25),
        presence_penalty=floats(0.5),
        prompt_counts=torch.tensor([[3, 1, 0, 0, 0]], dtype=torch.int32),
        output_counts=torch.tensor([[0, 0, 2, 1, 0]], dtype=torch.int32),
        logit_bias=floats(0, 0, 1, 0, -3)[None],
        allowed=torch.tensor([[0b10111]], dtype=torch.int32),
    )
    # Bias comes before the repetition penalty; the prompt does not count for presence and frequency.
    assert out[0].tolist() == [1.0, -4.0, (1.0 + 1.0) / 2 - 2 * 0.25 - 0.5, -math.inf, -3.0]


def test_repetition_penalty_needs_counts():
    with pytest.raises(ValueError, match=r"prompt_counts or output_counts"):
        penalize(torch.zeros(1, 4), repetition_penalty=floats(1.1))


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
def test_allowed_is_one_bit_a_token(vocab):
    allowed = torch.rand(vocab, generator=torch.Generator().manual_seed(vocab)) < 0.5
    bits = [sum(int(bit) << i for i, bit in enumerate(allowed[at : at + 32])) for at in range(0, vocab, 32)]
    words = torch.tensor([bits]).to(torch.int32)
    assert torch.equal(penalize(torch.zeros(1, vocab), allowed=words)[0] == 0, allowed)


# --- the choice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # Known answers of Random123 1.14, philox4x32 with 10 rounds.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    def int64(low, high):
        return torch.tensor([low | high << 32], dtype=torch.uint64).view(torch.int64)

    words = philox(int64(*key), int64(*counter[2:]), int64(*counter[:2]))
    assert tuple(words[:, 0].tolist()) == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("setting", [{}, {"top_p": 0.9}, {"temperature": 0.5, "top_k": 12}, {"typical_p": 0.8}])
def test_choice_is_the_inverse_of_the_distribution(setting, seed):
    rows, vocab = 150, 600
    logits = random_logits(1, vocab, seed).expand(rows, -1)
    per_row = {name: (ints if name == "top_k" else floats)(*[v] * rows) for name, v in setting.items()}
    token, _ = sample(logits, **{"temperature": torch.ones(rows), **per_row}, **keys(rows, seed))
    u = philox(*keys(rows, seed).values())[0].double() / 2**32
    upper = by_transformers(logits[:1], ints(0), **setting)[0].cumsum(0)
    lower = torch.cat([torch.zeros(1), upper[:-1]])
    assert (u >= lower[token] - 1e-6).all() and (u <= upper[token] + 1e-6).all()


@pytest.mark.parametrize("axis", ["position", "stream", "seed"])
def test_choice_frequencies_by_chi_square(axis):
    rows, vocab = 3_000, 20
    logits = random_logits(1, vocab, 5, scale=1.0)
    numbers: Any = {
        "seed": torch.full((rows,), 7),
        "stream": torch.zeros(rows).long(),
        "position": torch.zeros(rows).long(),
    }
    numbers[axis] = torch.arange(rows) * 3 - 100
    token, _ = sample(logits.expand(rows, -1), temperature=torch.ones(rows), **numbers)
    expected = logits.double().softmax(-1)[0] * rows
    assert expected.min() > 5
    chi_square = ((torch.bincount(token, minlength=vocab) - expected) ** 2 / expected).sum()
    # df = 19, standard deviation sqrt(38): beyond 19 + 6 deviations with a probability below 1e-5; the seed is fixed.
    assert chi_square < 19 + 6 * math.sqrt(38)
    # Neighbours are independent: the table of pairs against its margins.
    pairs = (
        torch.bincount((token[:-1] < vocab // 2).long() * 2 + (token[1:] < vocab // 2).long(), minlength=4)
        .view(2, 2)
        .double()
    )
    product = pairs.sum(1, keepdim=True) * pairs.sum(0) / pairs.sum()
    assert ((pairs - product) ** 2 / product).sum() < 30  # df = 1


@pytest.mark.parametrize("random, expected", [(0, 3), (0xFFFFFFFF, 6)])
def test_no_random_number_chooses_what_cannot_be(monkeypatch, random, expected):
    monkeypatch.setattr(reference_sampling, "philox", lambda seed, *_: torch.full((4, len(seed)), random))
    logits = torch.full((1, 10), -math.inf)
    logits[0, 3:7] = floats(0.0, 1.0, -1e30, -1.0)
    assert sample(logits, temperature=floats(1.0), **keys(1))[0].item() == expected


def test_tokens_and_logprobs_do_not_depend_on_the_batch():
    rows, vocab, generator = 7, 33_003, torch.Generator().manual_seed(3)
    logits = random_logits(rows, vocab, 3)
    arguments = {
        "temperature": floats(0, 0.5, 1, 1, 1.3, 2, 0.01),
        "top_k": ints(0, 40, -1, 1, 500, vocab, 3),
        "top_p": floats(1, 0.8, 0.95, 1, 0.5, 0.99, 1e-6),
        "min_p": floats(0, 0, 0.1, 0, 0.01, 1, 0),
        "typical_p": floats(1, 0.9, 1, 0.5, 1, 0.2, 1),
        "repetition_penalty": floats(1, 1.005, 2, 1, 0.5, 1, 1),
        "presence_penalty": floats(0, 1, 0, -1, 0, 0, 2),
        "frequency_penalty": floats(0, 0.5, 0, 0, 0, -2, 2),
        "prompt_counts": torch.randint(0, 3, (rows, vocab), generator=generator, dtype=torch.int32),
        "output_counts": torch.randint(0, 2, (rows, vocab), generator=generator, dtype=torch.int32),
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        "stream": torch.arange(rows),
        "position": torch.arange(rows) * 1000,
    }
    token, logprob = sample(logits, **arguments)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for row in range(rows):
                alone = sample(logits[row : row + 1], **{k: v[row : row + 1] for k, v in arguments.items()})
                assert (alone[0].item(), alone[1].item()) == (token[row].item(), logprob[row].item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(token.tolist())) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_logprob_is_of_the_plain_softmax(dtype):
    logits = random_logits(5, 2000, 21).to(dtype)
    token, logprob = sample(logits, temperature=floats(0, 0.5, 1, 2, 9), top_k=ints(9, 9, 9, 9, 9), **keys(5))
    expected = logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    assert logprob.dtype == torch.float32
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-6, atol=1e-6)


# --- extremes -----------------------------------------------------------------------------------------------------

NOTHING_KEPT = {"top_k": ints(1), "top_p": floats(1e-12), "min_p": floats(1.0), "typical_p": floats(1e-12)}
BIG = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    "row, possible",
    [
        ([5.0, 5.0, 5.0], {0, 1, 2}),
        ([-math.inf, 1.0, -math.inf], {1}),
        ([BIG, -BIG, 0.0], {0}),
        ([-BIG, -math.inf, -BIG], {0, 2}),
        ([math.inf, 3.0, math.inf], {0, 2}),
        ([math.nan, 1e-40, math.nan], {1}),
        ([-0.0, 0.0, -math.inf], {0, 1}),
        ([7.0], {0}),
        ([-math.inf] * 3, {-1}),
        ([math.nan] * 3, {-1}),
    ],
)
def test_extreme_rows(row, possible):
    """At five temperatures, 24 draws each, in one batch."""
    logits = floats(*row)[None].expand(120, -1)
    temperatures = floats(1e-30, 1e-4, 1.0, 100.0, 1e30).repeat_interleave(24)
    token, _ = sample(logits, temperature=temperatures, **keys(120))
    assert all(set(tokens.tolist()) == possible for tokens in token.split(24))
    strict = {name: value.expand(120) for name, value in NOTHING_KEPT.items()}
    assert set(sample(logits, temperature=temperatures, **strict, **keys(120))[0].tolist()) <= possible


@pytest.mark.parametrize("temperature", [None, floats(0.0)])
@pytest.mark.parametrize(
    "row, best",
    [
        ([1.0, 9.0, 9.0], 1),
        ([-math.inf] * 3, -1),
        ([math.nan, -5.0, math.nan], 1),
        ([math.nan] * 3, -1),
        ([1.0, math.inf, math.inf], 1),
        ([-0.0, 0.0], 0),
    ],
)
def test_greedy_takes_the_first_maximum(row, best, temperature):
    assert sample(floats(*row)[None], temperature=temperature, **keys(1))[0].item() == best


def test_a_broken_row_says_so_in_its_logprob():
    logits = torch.tensor([[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf], [0.0, -math.inf]])
    logprob = sample(logits, temperature=None, **keys(4))[1]
    assert logprob.isnan().tolist() == [True, True, True, False] and logprob[3] == 0


@settings(max_examples=60)
@given(
    vocab=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.0, 1e-4, 0.7, 1.0, 100.0]),
    top_k=st.integers(-1, 100),
    top_p=st.floats(1e-6, 1.0),
    min_p=st.floats(0.0, 1.0),
    typical_p=st.floats(1e-6, 1.0),
    masked=st.booleans(),
)
def test_the_token_is_always_a_possible_one(vocab, seed, temperature, top_k, top_p, min_p, typical_p, masked):
    logits = random_logits(1, vocab, seed, scale=10.0)
    if masked:
        logits[0, random_ids(vocab, vocab // 2, seed)] = -math.inf
    filters = {
        "temperature": floats(temperature),
        "top_k": ints(top_k),
        "top_p": floats(top_p),
        "min_p": floats(min_p),
        "typical_p": floats(typical_p),
    }
    token, logprob = sample(logits, **filters, **keys(1, seed))
    kept = filter_logits(logits, **filters)[0] > -math.inf
    assert kept[token] and logprob <= 0
    if 0 < top_k <= vocab and temperature:  # ties are all but impossible in these rows
        assert kept.sum() <= top_k
