"""A vocabulary of 128133 tokens, which is odd and no multiple of a word of a mask or a block of a kernel."""

from collections import Counter

import pytest
import torch

from internlm3.kernels import reference_sampling
from internlm3.runtime.engine.engine import Engine
from internlm3.tests.support.engine import ask, random_model, run

VOCAB, LAST = 128133, 128132
EDGES = [LAST, LAST - 1, 128096, 128095, 31, 32, 0]  # the last word of a mask begins with 128096
PROMPT = [5, LAST, 7, LAST, 128096, 9]


@pytest.fixture(scope="module")
def model():
    """The tokens at the edges are the likeliest, and change from place to place."""
    made = random_model(
        torch.float32, vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    made.lm_head.weight[EDGES] *= 10
    return made


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, max_batch_size=4, max_seq_len=64)


def as_mask(tokens):
    words = [0] * (VOCAB // 32 + 1)
    for token in tokens:
        words[token // 32] |= 1 << token % 32
    return torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32)[None]


def expected(model, request, permitted=None):
    """Each token from the logits of the whole text before it, which are counted, biased and masked one by one."""
    p, every = request.params, range(VOCAB)
    permitted = every if permitted is None else permitted
    tokens, logprobs = [], []
    for place in range(request.max_tokens):
        text = request.prompt_ids + tokens
        logits = model(torch.tensor([text]), logits_to_keep=1).logits[0]
        counts = [torch.zeros(1, VOCAB, dtype=torch.int32) for _ in range(2)]
        for table, part in zip(counts, (request.prompt_ids, tokens), strict=True):
            for token, count in Counter(part).items():
                table[0, token] = count
        bias = torch.zeros(1, VOCAB)
        for token, value in (p.logit_bias or {}).items():
            bias[0, token] = value
        ends = request.ends if place < p.min_tokens else ()
        floats = {name: torch.tensor([float(getattr(p, name))]) for name in (
            "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
        )}  # fmt: skip
        keys = {"seed": request.seed, "stream": request.answer, "position": len(text)}
        token, logprob = reference_sampling.sample(
            logits,
            top_k=torch.tensor([p.top_k]),
            **floats,
            prompt_counts=counts[0],
            output_counts=counts[1],
            logit_bias=bias,
            allowed=as_mask(token for token in permitted if token not in ends),
            **{name: torch.tensor([key]) for name, key in keys.items()},
        )
        tokens.append(token.item())
        logprobs.append(logprob.item())
        if tokens[-1] in request.ends:
            break
    return tokens, logprobs


SETTINGS = {
    "greedy": {},
    "recommended": {"temperature": 1.0, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.005},
    "any top-k": {"temperature": 2.0, "top_k": 5000, "top_p": 0.95},
    "all": {"temperature": 2.0, "top_p": 0.95, "min_p": 0.001, "typical_p": 0.9, "presence_penalty": 0.5,
            "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "counts": {"presence_penalty": 2.0, "frequency_penalty": 2.0},
    "prompt counts": {"repetition_penalty": 10.0},
    "bias": {"logit_bias": {LAST: 30.0, 128096: 29.0, 3: -5.0}, "temperature": 1.0, "presence_penalty": 2.0},
    "ends held back": {"stop_token_ids": [LAST], "min_tokens": 5, "logit_bias": {LAST: 100.0}},
}  # fmt: skip
ALLOWED = [LAST, 128096, 128095, 64]


@pytest.mark.parametrize("name", SETTINGS)
def test_sampling(model, engine, name):
    """Through the head, the filters, the counts of prompt and answer, and the bits of masks."""
    request = ask(PROMPT, 8, seed=11, answer=1, **SETTINGS[name])
    run(engine, request)
    tokens, logprobs = expected(model, request)
    assert request.token_ids == tokens
    assert request.logprobs == pytest.approx(logprobs, abs=1e-4)
    if name == "ends held back":
        assert tokens.index(LAST) == 5 and request.finish_reason == "stop"


def test_allowed_and_banned_tokens(model, engine):
    bans = [LAST, 128096]
    (only,) = run(engine, ask(PROMPT, 12, allowed_token_ids=ALLOWED, temperature=100.0, seed=3))
    (without,) = run(engine, ask(PROMPT, 8, suppress_tokens=bans, frequency_penalty=1.0))
    assert only.token_ids == expected(model, only, ALLOWED)[0] and {*only.token_ids} >= {LAST, 128096}
    others = [token for token in range(VOCAB) if token not in bans]
    assert without.token_ids == expected(model, without, others)[0]
    (last,) = run(engine, ask(PROMPT, 3, allowed_token_ids=[LAST], temperature=1.0))
    assert last.token_ids == [LAST] * 3


def test_log_probabilities_of_alternatives(model, engine):
    (request,) = run(engine, ask(PROMPT, 4, logprobs=5))
    text = torch.tensor([PROMPT + request.token_ids])
    exact = model(text).logits[0, len(PROMPT) - 1 :].double().log_softmax(-1)
    seen = set()
    for row, token, logprob, top in zip(exact, request.token_ids, request.logprobs, request.top_logprobs, strict=False):
        best = row.topk(5)
        assert [*top] == best.indices.tolist() and [*top.values()] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert top[token] == logprob
        seen |= {*top}
    assert LAST in seen


def test_bans_of_transformers(model):
    """Words, repeated n-grams and scores, through `generate`."""
    flags = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    ids = torch.tensor([[5, 9]])
    free, unlike, banned = (
        model.generate(ids, **bans, **flags)
        for bans in ({}, {"no_repeat_ngram_size": 1}, {"bad_words_ids": [[LAST], [128096]]})
    )
    assert free.sequences[0, 2:4].tolist() == [LAST, LAST] and 128096 in free.sequences
    assert unlike.sequences[0, 2] == LAST and unlike.sequences.unique().numel() == 8
    for scores in banned.scores:
        assert scores.shape == (1, VOCAB) and scores.isinf().nonzero()[:, 1].tolist() == [128096, LAST]
