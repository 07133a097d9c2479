"""sample by both backends: the reference's tokens, and log-probabilities against float64."""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import kernels
from internlm3.kernels import reference_sampling
from internlm3.kernels.triton import sample_search
from internlm3.kernels.triton.sample_weights import share_of, weight_of
from internlm3.tests.kernels.support import (
    DEVICE,
    assert_near,
    assert_same,
    call,
    dtypes,
    embedded,
    generator,
    module_of,
    run_all,
    seeds,
)

launcher = module_of(kernels.sample)

# Sizes of blocks and chunks, and a vocabulary size. With small blocks a small vocabulary has several of them, and with
# small chunks a search has several iterations. Larger vocabularies are near multiples of a block.
small_vocabs = st.integers(1, 200)
blocks_and_vocabs = st.one_of(
    st.tuples(st.sampled_from([(32, 64), (64, 32), (256, 128), (1024, 1024)]), small_vocabs),
    st.tuples(st.sampled_from([(32, 64), (64, 32)]), small_vocabs),
    st.sampled_from([((256, 128), 511), ((256, 128), 512), ((256, 128), 513), ((1024, 1024), 1025)]),
)
STAGES = {
    "top_k": st.sampled_from([0, -1, 1, 2, 5, 40, 200, 5000]),
    "top_p": st.sampled_from([1.0, 0.9999, 0.95, 0.8, 0.3, 1e-6, 1e-12]),
    "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    "typical_p": st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-12]),
    "repetition_penalty": st.sampled_from([1.0, 1.005, 1.5, 0.6]),
    "presence_penalty": st.sampled_from([0.0, 0.7, -2.0]),
    "frequency_penalty": st.sampled_from([0.0, 0.3, -1.1]),
}
temperatures = st.sampled_from([0.0, 1e-30, 1e-4, 0.7, 1.0, 1.0, 1.3, 100.0])
# Equal logits, nearly equal ones (where every kept token counts), ordinary, few distinct and very large ones.
shapes = st.sampled_from(["equal", "flat", "ordinary", "tied", "large"])


def make_logits(rng, rows, vocab, shape, dtype, ascending=False):
    logits = torch.randn(rows, vocab, generator=rng)
    if ascending:
        logits = logits.sort(-1).values
    scaled = {
        "equal": logits * 0 + 3,
        "flat": logits * 0.1,
        "ordinary": logits * 4,
        "tied": (logits * 2).round(),
        "large": logits * 1e4,
    }
    return scaled[shape].to(DEVICE, dtype)


# At seed 0 and stream 0 these positions give the smallest and the largest random number: the first and last kept token.
SMALLEST, LARGEST = 5045761891, 410702502
EXTREMES = {"extreme": [SMALLEST, LARGEST], "smallest": [SMALLEST], "largest": [LARGEST]}
ONE_BIT = reference_sampling.LOG2_E  # the temperature at which a logit of -1 halves a weight


def random_numbers(rng, rows, draws="any"):
    """Keys of the random number, with all 64 bits in use; or keys that give extreme numbers, in turn."""
    names = ("seed", "stream", "position")
    if draws == "any":
        return {name: torch.randint(-(2**63), 2**63 - 1, (rows,), generator=rng).to(DEVICE) for name in names}
    extremes = torch.tensor(EXTREMES[draws] * rows, device=DEVICE)[:rows]
    return {"seed": extremes * 0, "stream": extremes * 0, "position": extremes}


@st.composite
def stages(draw, rows):
    """The temperature and some of the other stages, with a value for each row."""
    chosen = draw(st.sets(st.sampled_from(sorted(STAGES))))
    arguments = {}
    for name in ("temperature", *sorted(chosen)):
        values = draw(st.lists(temperatures if name == "temperature" else STAGES[name], min_size=rows, max_size=rows))
        dtype = torch.int64 if name == "top_k" else torch.float32
        arguments[name] = torch.tensor(values, dtype=dtype, device=DEVICE)
    if draw(st.integers(0, 5)) == 0:
        arguments["temperature"] = None
    arguments["few_candidates"] = draw(st.booleans())  # the hint may be wrong
    return arguments


def add_tables(draw, rng, arguments, rows, vocab, padding):
    """Adds counts where a penalty needs them, and sometimes a bias and a mask."""
    if arguments.keys() & {"repetition_penalty", "presence_penalty", "frequency_penalty"}:
        for name in ("prompt_counts", "output_counts"):
            counts = torch.randint(-2, 4, (rows, vocab), generator=rng, dtype=torch.int32).clamp(min=0)
            arguments[name] = embedded(counts.to(DEVICE), padding)
        if draw(st.booleans()):
            del arguments["prompt_counts"]
    if draw(st.integers(0, 3)) == 0:
        arguments["logit_bias"] = embedded(torch.randn(rows, vocab, generator=rng).to(DEVICE), padding)
    if draw(st.integers(0, 3)) == 0:
        words = torch.randint(-(2**31), 2**31, (rows, -(-vocab // 32)), generator=rng).to(torch.int32)
        if draw(st.booleans()):
            words &= torch.randint(-(2**31), 2**31, words.shape, generator=rng).to(torch.int32)
        arguments["allowed"] = embedded(words.to(DEVICE), padding)


def compare(logits, arguments):
    results = run_all("sample", logits, **arguments)
    expected, expected_logprob = results["reference"]
    assert_same(expected, **{backend: token for backend, (token, _) in results.items()})
    logprobs = {backend: logprob for backend, (_, logprob) in results.items()}
    if not expected_logprob.isnan().any():
        exact = logits.double().log_softmax(-1).gather(1, expected.clamp(min=0)[:, None])[:, 0]
        exact = exact.masked_fill(expected < 0, -math.inf)
        # float32: the difference to the maximum, half an ulp of a logit, and the logarithm of a sum, a few ulp.
        magnitude = logits.double().abs().amax(-1) + math.log(logits.shape[1])
        assert_near(exact, 4.0, magnitude, **logprobs)
    assert_same(expected_logprob.isnan(), **{backend: logprob.isnan() for backend, logprob in logprobs.items()})
    return expected


@pytest.mark.op(name="sample")
@settings(max_examples=30)
@given(st.data(), seeds, dtypes, st.integers(1, 3), blocks_and_vocabs, shapes, st.sampled_from([0, 5]))
def test_sample(data, seed, dtype, rows, sizes_and_vocab, shape, padding):
    rng, (sizes, vocab) = generator(seed), sizes_and_vocab
    logits = embedded(make_logits(rng, rows, vocab, shape, dtype), padding)
    arguments = {**data.draw(stages(rows)), **random_numbers(rng, rows)}
    add_tables(data.draw, rng, arguments, rows, vocab, padding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "BLOCK", sizes[0])
        patch.setattr(sample_search, "CHUNK", sizes[1])
        patch.setattr(sample_search, "FEW", sizes[1])
        compare(logits, arguments)


@pytest.mark.op(name="sample")
@settings(max_examples=30)
@given(st.data(), seeds, st.integers(1, 3), st.integers(1, 5), blocks_and_vocabs)
def test_drafts(data, seed, sequences, rows, sizes_and_vocab):
    """Each row samples as if its sequence's drafts before it had been generated one by one."""
    rng, (sizes, vocab) = generator(seed), sizes_and_vocab
    arguments = {**data.draw(stages(sequences * rows)), **random_numbers(rng, sequences * rows)}
    penalty = data.draw(st.sampled_from(["repetition_penalty", "presence_penalty", "frequency_penalty"]))
    arguments[penalty] = torch.full((sequences * rows,), 2.0, device=DEVICE)
    tables = dict.fromkeys(arguments)
    add_tables(data.draw, rng, tables, sequences, vocab, 3)
    tables = {name: x for name, x in tables.items() if x is not None}
    logits = make_logits(rng, sequences * rows, vocab, "ordinary", torch.float32)
    # Few different drafts, so that a row counts some twice; and about as likely as one another.
    logits[:, :4] = 30 + torch.rand(sequences * rows, min(vocab, 4), generator=rng).to(DEVICE)
    drafts = torch.randint(min(vocab, 4), (sequences, rows), generator=rng).to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "BLOCK", sizes[0])
        patch.setattr(sample_search, "CHUNK", sizes[1])
        patch.setattr(sample_search, "FEW", sizes[1])
        found = compare(logits, {**arguments, **tables, "drafts": drafts})
    for row in range(sequences * rows):
        sequence, before = divmod(row, rows)
        own = {name: x[row : row + 1] if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        own |= {name: x[sequence : sequence + 1].clone() for name, x in tables.items()}
        for draft in drafts[sequence, 1 : before + 1].tolist() if "output_counts" in own else ():
            own["output_counts"][0, draft] += 1
        assert_same(found[row : row + 1], alone=reference_sampling.sample(logits[row : row + 1], **own)[0])


FILTERS = ("top_k", "top_p", "min_p", "typical_p")


@pytest.mark.op(name="sample")
@settings(max_examples=30)
@given(st.data(), seeds, blocks_and_vocabs, shapes, st.sets(st.sampled_from(FILTERS), min_size=1, max_size=3))
def test_both_ends_of_what_the_filters_keep(data, seed, sizes_and_vocab, shape, chosen):
    """With ascending logits, the smallest random number samples the token at the threshold, the largest the best."""
    rng, rows, (sizes, vocab) = generator(seed), 2, sizes_and_vocab
    arguments = random_numbers(rng, rows, "extreme")
    for name in sorted(chosen):
        values = [data.draw(STAGES[name])] * rows
        dtype = torch.int64 if name == "top_k" else torch.float32
        arguments[name] = torch.tensor(values, dtype=dtype, device=DEVICE)
    arguments["temperature"] = torch.tensor([data.draw(st.sampled_from([0.3, 1.0, 2.0]))] * rows, device=DEVICE)
    arguments["few_candidates"] = data.draw(st.booleans())
    logits = make_logits(rng, 1, vocab, shape, torch.float32, ascending=True).repeat(rows, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "BLOCK", sizes[0])
        patch.setattr(sample_search, "CHUNK", sizes[1])
        patch.setattr(sample_search, "FEW", sizes[1])
        compare(logits, arguments)


@pytest.mark.parametrize("few_candidates", [False, True])
@pytest.mark.parametrize("neutral", [{"top_k": 0}, {"top_k": -1}, {"top_k": 300}, {"top_k": 301}, {"top_p": 1.0},
                                     {"typical_p": 1.0}, {"top_k": 0, "top_p": 1.0, "typical_p": 1.0}])  # fmt: skip
def test_a_row_without_filters_keeps_all_beside_one_with(neutral, few_candidates):
    rng, rows = generator(4), 8
    logits = make_logits(rng, rows, 300, "flat", torch.float32)
    drawn = {"temperature": torch.ones(rows, device=DEVICE), **random_numbers(rng, rows)}
    without = compare(logits, drawn)
    filters = {"top_k": 2, "top_p": 0.01, "typical_p": 0.01}
    arguments = {name: torch.tensor([neutral[name], filters[name]] * (rows // 2), device=DEVICE) for name in neutral}
    found = compare(logits, {**drawn, **arguments, "few_candidates": few_candidates})
    assert_same(without[::2], found=found[::2])


@pytest.mark.parametrize("few_candidates", [False, True])
@pytest.mark.parametrize(
    ("setting", "kept"),
    [({"top_k": 4}, [1, 4]), ({"top_p": 0.0}, [4, 4]), ({"top_p": -0.5}, [4, 4]), ({"typical_p": 0.0}, None),
     ({"top_k": 4, "top_p": 0.0}, [4, 4]), ({"typical_p": -0.5}, None),
     ({"top_k": -1, "top_p": 0.0}, [4, 4])],
)  # fmt: skip
@pytest.mark.parametrize("few", [2, 128])
def test_the_ends_of_a_filters_range(setting, kept, few_candidates, few, monkeypatch):
    monkeypatch.setattr(sample_search, "FEW", few)
    logits = torch.tensor([[0.0, 0.01, 0.02, 0.03, 0.04]] * 2, device=DEVICE)
    arguments = {name: torch.tensor([value] * 2, device=DEVICE) for name, value in setting.items()}
    arguments |= {"temperature": torch.ones(2, device=DEVICE), **random_numbers(generator(1), 2, "extreme")}
    found = compare(logits, {**arguments, "few_candidates": few_candidates}).tolist()
    assert found == kept or (kept is None and found[0] == found[1])


@pytest.mark.parametrize("chosen", [c for n in (2, 3, 4) for c in itertools.combinations(FILTERS, n)], ids="-".join)
def test_filters_in_their_order(chosen):
    """Each filter uses the mass that the one before it kept."""
    values = {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.5}
    logits = make_logits(generator(6), 1, 100, "ordinary", torch.float32, ascending=True).repeat(2, 1) / 3
    arguments = {name: torch.tensor([values[name]] * 2, device=DEVICE) for name in chosen}
    arguments |= {"temperature": torch.ones(2, device=DEVICE), **random_numbers(generator(1), 2, "extreme")}
    for few_candidates in (False, True):
        compare(logits, {**arguments, "few_candidates": few_candidates})


@pytest.mark.parametrize("few_candidates", [False, True])
@pytest.mark.parametrize("k", [1, 3, 12, 13])
def test_a_row_takes_its_candidates_by_its_own_maxima(k, few_candidates):
    """Of 13 blocks, each of which has one large logit, in rows between others with larger and smaller ones."""
    rng, rows = generator(3), 8
    blocks = torch.randn(rows, 13, 32, generator=rng) * 0.1
    blocks[:, :, 7] = 5 + torch.rand(rows, 13, generator=rng)
    logits = blocks.view(rows, -1)[:, :400].to(DEVICE)
    logits += torch.tensor([900.0, 0.0, -900.0, 0.0], device=DEVICE).repeat(2)[:, None]
    arguments = {"top_k": torch.full((rows,), k, device=DEVICE), "temperature": torch.full((rows,), 9.0, device=DEVICE)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "BLOCK", 32)
        for drawn in (random_numbers(generator(1), rows, "extreme"), random_numbers(generator(2), rows)):
            compare(logits, {**arguments, **drawn, "few_candidates": few_candidates})


@pytest.mark.parametrize("few_candidates", [False, True])
def test_a_long_tail_is_kept_by_top_p(few_candidates, monkeypatch):
    """Of many blocks, whose tokens weigh little one by one, and together more than top-p drops."""
    monkeypatch.setattr(launcher, "BLOCK", 32)
    weights = torch.tensor([1.0] + [1e-3 - 1e-7 * number for number in range(399)])
    arguments = {"top_k": torch.tensor([-1] * 2), "top_p": torch.tensor([0.9] * 2), "temperature": torch.ones(2)}
    arguments = {name: x.to(DEVICE) for name, x in arguments.items()}
    drawn = random_numbers(generator(1), 2, "extreme")
    logits = weights.log().repeat(2, 1).to(DEVICE)
    assert 200 < compare(logits, {**arguments, **drawn, "few_candidates": few_candidates})[1] < 300


@pytest.mark.parametrize("few_candidates", [False, True])
def test_light_tokens_count_in_top_p_after_top_k(few_candidates):
    """Half of the two best is less than the best; half of all that top-k keeps is more."""
    weights = torch.tensor([1.0, 0.99] + [2.2e-4] * 900 + [1e-9])
    arguments = {"top_k": torch.tensor([902] * 2), "top_p": torch.tensor([0.5] * 2), "temperature": torch.ones(2)}
    arguments = {name: x.to(DEVICE) for name, x in arguments.items()}
    drawn = random_numbers(generator(1), 2, "extreme")
    logits = weights.log().repeat(2, 1).to(DEVICE)
    assert compare(logits, {**arguments, **drawn, "few_candidates": few_candidates}).tolist() == [0, 1]


@pytest.mark.parametrize(
    "chosen", [c for n in (1, 2, 3) for c in itertools.combinations(("top_k", "top_p", "typical_p"), n)]
)
def test_thresholds_are_right_to_their_last_bit(chosen):
    """The tokens after the best are one ulp apart, and the largest random number samples the last one that is kept."""
    logits = torch.tensor([[0.0] + [-5 - number * 2.0**-21 for number in range(39)]] * 2, device=DEVICE)
    # Thresholds that are 16 steps apart: a digit before the last is even in one and odd in the other.
    for top_k, few_candidates in ((14, False), (14, True), (30, False), (30, True)):
        values = {"top_k": top_k, "top_p": 0.95, "typical_p": 0.9}
        arguments = {name: torch.tensor([values[name]] * 2, device=DEVICE) for name in chosen}
        arguments |= {"temperature": torch.ones(2, device=DEVICE), **random_numbers(generator(1), 2, "extreme")}
        found = compare(logits, {**arguments, "few_candidates": few_candidates})
        assert 3 < found[1] < 39 or top_k == 14


@pytest.mark.parametrize(("few_candidates", "few"), [(False, 16), (True, 16), (True, 32)])
def test_what_is_no_candidate_counts_in_top_p(few_candidates, few, monkeypatch):
    """In a row without top-k: half of the 20 heavy tokens is less than the first ten, half of all tokens is more."""
    monkeypatch.setattr(sample_search, "FEW", few)
    weights = torch.tensor([1 - 1e-3 * number for number in range(20)] + [2.2e-4] * 900)
    arguments = {"top_k": torch.tensor([-1] * 2), "top_p": torch.tensor([0.5] * 2), "temperature": torch.ones(2)}
    arguments = {name: x.to(DEVICE) for name, x in arguments.items()}
    drawn = random_numbers(generator(1), 2, "extreme")
    logits = weights.log().repeat(2, 1).to(DEVICE)
    assert compare(logits, {**arguments, **drawn, "few_candidates": few_candidates}).tolist() == [0, 10]


@pytest.mark.parametrize("top_k", [-1, 4])
@pytest.mark.parametrize(("few_candidates", "few"), [(False, 16), (True, 16), (True, 2)])
def test_a_mass_that_is_just_sufficient_for_top_p(few_candidates, few, top_k, monkeypatch):
    """The best token has 2^40 units, half of 2^41 + 1 rounded down. In the other row half of 2^41 + 2 is more."""
    monkeypatch.setattr(sample_search, "FEW", few)
    logits = torch.tensor([[0.0, -1.0, -1.0, -40.0, -50.0], [0.0, -1.0, -1.0, -39.0, -50.0]], device=DEVICE)
    arguments = {"temperature": ONE_BIT, "top_p": 0.5, "top_k": top_k}
    arguments = {name: torch.tensor([value] * 2, device=DEVICE) for name, value in arguments.items()}
    drawn = random_numbers(generator(1), 2, "largest")
    assert compare(logits, {**arguments, **drawn, "few_candidates": few_candidates}).tolist() == [0, 2]


def test_the_mean_of_typical_p_is_of_integers():
    """A sum of floats would depend on its order."""
    x = (torch.randn(2, 1500, generator=generator(3)) * 5).to(DEVICE)
    ones, best = torch.ones(2, device=DEVICE), x.amax(-1, keepdim=True)
    search = torch.zeros((2, sample_search.NUMBERS), dtype=torch.int64, device=DEVICE)
    sample_search.find_thresholds(x, best, ones, None, None, None, ones / 2, search, 2048, False)
    scaled = (x - best) * reference_sampling.LOG2_E
    weights = reference_sampling._weights(scaled.clone())
    moment = (scaled * weights.float()).long().sum(-1)
    assert_same(torch.stack([weights.sum(-1), moment], -1), found=search[:, -2:])


@pytest.mark.parametrize("vocab", [16, 17, 33])
def test_every_chunk_counts_in_the_mean_of_typical_p(vocab):
    """A chunk has 16 candidates; the last one may have a single one, which moves the mean."""
    rows = 40
    logits = make_logits(generator(9), rows, vocab, "ordinary", torch.float32) / 4
    arguments = {"typical_p": torch.full((rows,), 0.1, device=DEVICE), "temperature": torch.ones(rows, device=DEVICE)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "BLOCK", 16)
        patch.setattr(sample_search, "CHUNK", 16)
        compare(logits, {**arguments, **random_numbers(generator(1), rows, "extreme")})


def test_every_stage_at_once():
    rng, rows, vocab = generator(1), 8, 200
    values = {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.5}
    values |= {"presence_penalty": 0.5, "frequency_penalty": -0.3, "temperature": 1.2}
    arguments = {name: torch.tensor([value] * rows, device=DEVICE) for name, value in values.items()}
    for name in ("prompt_counts", "output_counts"):
        arguments[name] = torch.randint(0, 2, (rows, vocab), generator=rng, dtype=torch.int32).to(DEVICE)
    arguments["logit_bias"] = torch.randn(rows, vocab, generator=rng).to(DEVICE)
    arguments["allowed"] = torch.randint(-(2**31), 2**31, (rows, 7), generator=rng).to(DEVICE, torch.int32)
    compare(make_logits(rng, rows, vocab, "ordinary", torch.bfloat16), {**arguments, **random_numbers(rng, rows)})


@pytest.mark.parametrize("counts", ["prompt_counts", "output_counts"])
def test_a_penalty_moves_positive_and_negative_logits_the_same_way(counts):
    """A penalty of 2 makes a seen token less likely than the next one, and one of 0.5 makes it more likely."""
    pairs = [[2.0, 1.5], [-1.0, -1.5], [1.0, 1.5], [-1.5, -1.0], [-1.0, -1.5]]
    logits = torch.cat([torch.tensor(pairs), torch.full((5, 3), -9.0)], dim=1).to(DEVICE)
    seen = torch.tensor([[1, 0, 0, 0, 0]] * 4 + [[0] * 5], dtype=torch.int32, device=DEVICE)
    penalties = torch.tensor([2.0, 2.0, 0.5, 0.5, 2.0], device=DEVICE)
    arguments = {"temperature": None, "repetition_penalty": penalties, "output_counts": torch.zeros_like(seen)}
    found = compare(logits, {**arguments, counts: seen, **random_numbers(generator(1), 5)})
    assert found.tolist() == [1, 1, 0, 0, 0]


def test_zero_ties_with_minus_zero():
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, -1.0]] * 2, device=DEVICE)
    arguments = {"temperature": torch.ones(2, device=DEVICE), "top_k": torch.ones(2, dtype=torch.int64, device=DEVICE)}
    assert compare(logits, {**arguments, **random_numbers(generator(1), 2, "extreme")}).tolist() == [1, 3]


def test_extreme_random_numbers_sample_no_dropped_token():
    """The random number 0 samples no token of weight 0, and the largest none after the last kept one; in two blocks."""
    rows, vocab = 2, 40
    logits = torch.full((rows, vocab), -math.inf, device=DEVICE)
    logits[:, 20:23] = torch.tensor([0.0, -1e30, 1.0], device=DEVICE)
    arguments = {"temperature": torch.ones(rows, device=DEVICE), **random_numbers(generator(1), rows, "extreme")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "BLOCK", 16)
        assert compare(logits, arguments).tolist() == [20, 22]


@pytest.mark.parametrize("heavy", [1, 20])
def test_the_random_number_0_samples_a_token_of_the_smallest_weight(heavy):
    """Token 0 has one unit of 2^40 in all, in the block of the other token or in one before."""
    logits = torch.full((1, 40), -math.inf, device=DEVICE)
    logits[0, 0], logits[0, heavy] = -39.5 * math.log(2), 0.0
    arguments = {"temperature": torch.ones(1, device=DEVICE), **random_numbers(generator(1), 1, "smallest")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "BLOCK", 16)
        assert compare(logits, arguments).tolist() == [0]


def test_the_largest_random_number_samples_the_last_token_that_reaches_it():
    """It is 1 - 2^-31: of 2^40 + 512 units that is less than 2^40, of 2^40 + 513 it is 2^40, in the next block."""
    logits = torch.full((2, 40), -math.inf, device=DEVICE)
    logits[:, 0], logits[:, 20], logits[1, 21] = 0.0, -31.0, -40.0
    arguments = {"temperature": torch.full((2,), ONE_BIT, device=DEVICE)}
    drawn = random_numbers(generator(1), 2, "largest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "BLOCK", 16)
        assert compare(logits, {**arguments, **drawn}).tolist() == [0, 20]


def test_min_p_is_a_whole_number_of_units():
    """Token 0 has 3 units of 2^40: 3.5 units let it pass, 4 do not."""
    logits = torch.tensor([[-38.4 * math.log(2), 0.0]] * 2, device=DEVICE)
    arguments = {"min_p": torch.tensor([3.5 * 2.0**-40, 4 * 2.0**-40], device=DEVICE)}
    arguments |= {"temperature": torch.ones(2, device=DEVICE), **random_numbers(generator(1), 2, "smallest")}
    assert compare(logits, arguments).tolist() == [0, 1]


def test_the_whole_vocabulary():
    """The launch configuration of InternLM3-8B, with a published fine-tune's vocabulary, which is odd.

    One row has the recommended settings, the other all stages. The last token is the best, and the largest random
    number samples it.
    """
    rng, rows, vocab = generator(1), 2, 128133
    off_and_on = {"top_k": [40, 0], "top_p": [0.8, 0.95], "min_p": [0.0, 0.001], "typical_p": [1.0, 0.9]}
    off_and_on |= {"presence_penalty": [0.0, 0.5], "frequency_penalty": [0.0, 0.3], "repetition_penalty": [1.005, 1.2]}
    arguments = {name: torch.tensor(values, device=DEVICE) for name, values in off_and_on.items()}
    for name in ("prompt_counts", "output_counts"):
        counts = torch.randint(-50, 2, (rows, vocab), generator=rng, dtype=torch.int32).clamp(min=0)
        arguments[name] = embedded(counts.to(DEVICE))
    arguments["logit_bias"] = embedded(torch.randn(rows, vocab, generator=rng).to(DEVICE))
    words = torch.randint(-(2**31), 2**31, (rows, vocab // 32 + 1), generator=rng)
    words[:, -1] |= 1 << (vocab - 1) % 32
    arguments["allowed"] = embedded(words.to(DEVICE, torch.int32))
    logits = make_logits(rng, rows, vocab, "ordinary", torch.bfloat16)
    logits[:, -1] = logits.max() + 3
    drawn = random_numbers(rng, rows, "extreme")
    token = compare(embedded(logits), {"temperature": torch.ones(rows, device=DEVICE), **arguments, **drawn})
    assert token[1] == vocab - 1


@pytest.mark.parametrize("temperature", [None, 0.0, 1e-45, 1e-30, 1.0, 1e30])
def test_extreme_rows(temperature):
    big, inf, nan = torch.finfo(torch.float32).max, math.inf, math.nan
    logits = torch.tensor(
        [
            [5.0, 5.0, 5.0, 5.0],
            [-inf, 1.0, -inf, -inf],
            [big, -big, 0.0, -0.0],
            [-big, -inf, -big, -inf],
            [inf, 3.0, inf, -inf],
            [nan, 1e-40, nan, -inf],
            [-0.0, 0.0, -inf, -inf],
            [-inf, -inf, -inf, -inf],
            [nan, nan, nan, nan],
            [1e-40, -1e-40, 0.0, 1e-45],
        ],
        device=DEVICE,
    )
    rows = len(logits)
    strict = {"top_k": 1, "top_p": 1e-12, "min_p": 1.0, "typical_p": 1e-12}
    for filters in ({}, strict, {"top_k": 2, "typical_p": 0.9}, {"min_p": 2.0}):  # the last one keeps no token
        arguments = {name: torch.full((rows,), value, device=DEVICE) for name, value in filters.items()}
        arguments["temperature"] = None if temperature is None else torch.full((rows,), temperature, device=DEVICE)
        compare(logits, {**arguments, **random_numbers(generator(3), rows)})


def test_a_row_does_not_depend_on_its_batch():
    rng, rows, vocab = generator(8), 6, 2500
    logits = make_logits(rng, rows, vocab, "ordinary", torch.bfloat16)
    arguments = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 1.0], device=DEVICE),
        "top_k": torch.tensor([0, 40, 0, 7, 900, 1], device=DEVICE),
        "top_p": torch.tensor([1.0, 0.8, 0.95, 1.0, 0.7, 1.0], device=DEVICE),
        **random_numbers(rng, rows),
    }
    token, logprob = call(lambda x: kernels.sample(x, **arguments), logits)
    for row in range(rows):
        own = {name: values[row : row + 1] for name, values in arguments.items()}
        alone = call(lambda x, own=own: kernels.sample(x, **own), logits[row : row + 1])
        assert (alone[0].item(), alone[1].item()) == (token[row].item(), logprob[row].item())


def test_the_order_of_tokens_changes_no_bits():
    """Sums are of integers: a sum of floats depends on their order, and so on the layout that the compiler chooses."""
    rng = generator(5)
    logits = torch.randn(1000, generator=rng)
    logits[7] = 9.0  # the others weigh little: then no bit of their sum is lost in its logarithm
    rows = torch.stack([logits[torch.randperm(1000, generator=rng)] for _ in range(16)]).to(DEVICE)
    arguments = {"temperature": None, **random_numbers(rng, 16)}
    token, logprob = call(lambda x: kernels.sample(x, **arguments), rows)
    assert_same(rows.argmax(-1), found=token)
    assert logprob.unique().numel() == 1


def test_a_position_may_be_a_length():
    """A position of int32, as in the state of a decode step, gives the same token."""
    logits = make_logits(generator(2), 3, 500, "ordinary", torch.float32)
    numbers = random_numbers(generator(1), 3) | {"position": torch.tensor([7, 2**31 - 1, 0], device=DEVICE)}
    arguments = {"temperature": torch.ones(3, device=DEVICE), **numbers}
    token = compare(logits, arguments)
    assert_same(token, found=compare(logits, arguments | {"position": numbers["position"].int()}))


@triton.jit
def _first_words(seed_ptr, stream_ptr, position_ptr, word_ptr):
    row = tl.program_id(0)
    seed, stream, position = tl.load(seed_ptr + row), tl.load(stream_ptr + row), tl.load(position_ptr + row)
    word, _, _, _ = tl.philox(
        seed,
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
        stream.to(tl.uint32),
        (stream >> 32).to(tl.uint32),
    )
    tl.store(word_ptr + row, word.to(tl.int64))


def test_philox_is_that_of_triton():
    numbers = random_numbers(generator(4), 50)
    words = torch.empty(50, dtype=torch.int64, device=DEVICE)
    _first_words[(50,)](*numbers.values(), words)
    assert_same(reference_sampling.philox(**numbers)[0], found=words)


@triton.jit
def _weights(scaled_ptr, weight_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(weight_ptr + at, weight_of(tl.load(scaled_ptr + at)))


def test_weights_are_the_references():
    """In each bit. A sampled token shows only the first ones."""
    scaled = torch.cat([-64 * torch.rand(4080, generator=generator(7)), torch.arange(-15.0, 1.0)])
    scaled[:2] = torch.tensor([-math.inf, -1e30])
    scaled = scaled.to(DEVICE)
    weights = torch.empty(4096, dtype=torch.int64, device=DEVICE)
    _weights[(1,)](scaled, weights, 4096, enable_fp_fusion=False)
    assert_same(reference_sampling._weights(scaled.clone()), found=weights)


@triton.jit
def _shares(total_ptr, share_ptr, part_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(part_ptr + at, share_of(tl.load(total_ptr + at), tl.load(share_ptr + at)))


def test_shares_are_exact():
    rng = generator(8)
    totals = torch.randint(2**57, (1024,), generator=rng) >> torch.randint(57, (1024,), generator=rng)
    shares = torch.cat([torch.randint(2**31, (1020,), generator=rng), torch.tensor([0, 1, 2**31 - 1, 2**31 - 2])])
    parts = torch.empty(1024, dtype=torch.int64, device=DEVICE)
    _shares[(1,)](totals.to(DEVICE), shares.to(DEVICE), parts, 1024)
    assert parts.tolist() == [t * s >> 31 for t, s in zip(totals.tolist(), shares.tolist(), strict=True)]


def good_arguments(rows=2, vocab=40):
    return {
        "temperature": torch.ones(rows, device=DEVICE),
        "output_counts": torch.zeros(rows, vocab, dtype=torch.int32, device=DEVICE),
        **{name: torch.zeros(rows, dtype=torch.int64, device=DEVICE) for name in ("seed", "stream", "position")},
    }


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"temperature": torch.ones(2).double()}, TypeError, "temperature is torch.float64, must be torch.float32"),
        ({"top_k": torch.ones(2)}, TypeError, "top_k is torch.float32, must be torch.int64"),
        ({"top_p": torch.ones(3)}, ValueError, r"top_p has shape \[3\], must have \[2\]"),
        ({"seed": torch.ones(2, dtype=torch.int32)}, TypeError, "seed is torch.int32, must be torch.int64"),
        ({"position": torch.ones(4).long()[::2]}, ValueError, r"position has strides \(2,\)"),
        (
            {"allowed": torch.zeros(2, 1, dtype=torch.int32)},
            ValueError,
            r"allowed has shape \[2, 1\], must have \[2, 2\]",
        ),
        ({"logit_bias": torch.zeros(2, 41)}, ValueError, r"logit_bias has shape \[2, 41\], must have \[2, 40\]"),
        ({"prompt_counts": torch.zeros(2, 40)}, TypeError, "prompt_counts is torch.float32, must be torch.int32"),
        ({"min_p": torch.ones(2, device="meta")}, ValueError, "min_p is on meta"),
        (
            {"frequency_penalty": torch.ones(2), "output_counts": None},
            ValueError,
            "frequency_penalty needs output_counts",
        ),
        (
            {"repetition_penalty": torch.ones(2), "output_counts": None},
            ValueError,
            "repetition_penalty needs prompt_counts",
        ),
    ],
)
def test_bad_input(bad, error, message):
    bad = {name: x if x is None or x.is_meta else x.to(DEVICE) for name, x in bad.items()}
    if "position" in bad:
        bad["position"] = torch.ones(4, dtype=torch.int64, device=DEVICE)[::2]
    with pytest.raises(error, match=message):
        kernels.sample(torch.zeros(2, 40, device=DEVICE), **{**good_arguments(), **bad})


def test_bad_logits():
    with pytest.raises(TypeError, match=r"logits is torch.float64"):
        kernels.sample(torch.zeros(2, 40, device=DEVICE).double(), **good_arguments())
    with pytest.raises(ValueError, match=r"logits has shape \[40\]"):
        kernels.sample(torch.zeros(40, device=DEVICE), **good_arguments())
