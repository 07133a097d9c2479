"""count_prompt, by both backends and the reference, against a count in Python."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import kernels
from internlm3.tests.kernels.support import DEVICE, MODULES, assert_same, embedded, generator, run, seeds


def make(seed, vocab, tokens, biases, spare):
    """The op's arguments by name, and what its outputs must become. Words after the request are no tokens."""
    rng = generator(seed)
    # Few different tokens, the first and the last of the vocabulary among them, so that counts grow.
    some = torch.cat((torch.tensor([0, vocab - 1]), torch.randint(vocab, (5,), generator=rng)))
    prompt = some[torch.randint(len(some), (tokens,), generator=rng)]
    biased = torch.randperm(vocab, generator=rng)[:biases]
    values = torch.randn(len(biased), generator=rng)
    values[:1] = 0.0  # whose bits are those of token 0
    request = torch.full((tokens + 2 * len(biased) + spare,), vocab // 2, dtype=torch.int32)
    request[: tokens + 2 * len(biased)] = torch.cat((prompt.int(), biased.int(), values.view(torch.int32)))
    given = {
        "request": request,
        "lengths": torch.tensor([tokens, len(biased)], dtype=torch.int32),
        "history": torch.randint(9, (tokens + spare,), generator=rng, dtype=torch.int32),
        "prompt_counts": torch.randint(9, (vocab,), generator=rng, dtype=torch.int32),
        "output_counts": torch.randint(9, (vocab,), generator=rng, dtype=torch.int32),
        "logit_bias": torch.randn(vocab, generator=rng),
    }
    counted, bias = Counter(prompt.tolist()), dict(zip(biased.tolist(), values.tolist(), strict=True))
    expected = {
        "history": torch.cat((prompt.int(), given["history"][tokens:])),
        "prompt_counts": torch.tensor([counted[token] for token in range(vocab)], dtype=torch.int32),
        "output_counts": torch.zeros(vocab, dtype=torch.int32),
        "logit_bias": torch.tensor([bias.get(token, 0.0) for token in range(vocab)]),
    }
    return {name: embedded(x.to(DEVICE)) for name, x in given.items()}, expected


def check(*shape):
    for backend in MODULES:
        arguments, expected = make(*shape)
        run(backend, "count_prompt", **arguments, writes=[arguments[name] for name in expected])
        for name, wanted in expected.items():
            assert_same(wanted.to(DEVICE), **{f"{backend}'s {name}": arguments[name]})


@pytest.mark.op(name="count_prompt")
@settings(max_examples=60)
@given(
    seeds,
    st.sampled_from([1, 1023, 1024, 1025]) | st.integers(1, 3000),
    st.sampled_from([0, 1, 1024, 1025]) | st.integers(0, 3000),
    st.integers(0, 5) | st.integers(0, 3000),
    st.sampled_from([0, 7]),
)
def test_count_prompt(seed, vocab, tokens, biases, spare):
    check(seed, vocab, tokens, biases, spare)


def test_a_whole_vocabulary():
    """InternLM3-8B's has 128512 tokens; this is a published fine-tune's, which is odd."""
    check(3, 128133, 3000, 300, 5)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"request": torch.zeros(9, dtype=torch.int64)}, TypeError, "request is torch.int64, must be torch.int32"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, ValueError, r"lengths has shape \[3\], must have \[2\]"),
        ({"output_counts": torch.zeros(8, dtype=torch.int32)}, ValueError, r"output_counts has shape \[8\], must have"),
        ({"history": torch.zeros(9, dtype=torch.int64)}, TypeError, "history is torch.int64, must be torch.int32"),
        ({"logit_bias": torch.zeros(9, dtype=torch.float64)}, TypeError, "logit_bias is torch.float64"),
        ({"prompt_counts": torch.zeros(18, dtype=torch.int32)[::2]}, ValueError, "prompt_counts has strides"),
        ({"lengths": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "lengths is on meta"),
    ],
)
def test_bad_input(bad, error, message):
    good, _ = make(1, 9, 5, 2, 0)
    bad = {name: x if x.is_meta else x.to(DEVICE) for name, x in bad.items()}
    with pytest.raises(error, match=message):
        kernels.count_prompt(**{**good, **bad})
