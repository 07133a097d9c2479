"""Perplexity by a sliding window: transformers' loop over the same windows, and its definition token by token."""

import math

import pytest
import torch
import transformers

from internlm3 import LLM
from internlm3.runtime.api.perplexity import perplexity
from internlm3.runtime.model.model import LanguageModel
from internlm3.tests.support.checkpoints import make

TEXT = (
    "The tower is 324 metres tall, about the same height as an 81-storey building, and the tallest structure in "
    "Paris. Its base is square, measuring 125 metres on each side. It was the first structure to reach a height of "
    "300 metres. 今天天气很好，我们去公园散步。\n\ndef fibonacci(n):\n    return n if n < 2 else "
    "fibonacci(n - 1) + fibonacci(n - 2)\n"
)


@pytest.fixture(scope="module")
def llm(demo_model):
    return LLM(demo_model, dtype="float32", device="cpu", progress=False, max_seq_len=256)


def by_transformers(model, ids, window, stride):
    """The loop of its documentation: labels of -100 where a token was predicted before."""
    total, count, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        tokens = torch.tensor([ids[begin:end]])
        labels = tokens.clone()
        labels[:, : -(end - done)] = -100
        new = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(tokens, labels=labels).loss.item() * new if new else 0.0
        count, done = count + new, end
        if end == len(ids):
            return math.exp(total / count), count


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (64, 32), (100, 7), (256, 128)])
def test_as_transformers_computes_it(llm, demo_model, window, stride):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    ids = llm.tokenizer.encode(TEXT)
    expected, count = by_transformers(theirs, ids, window, stride)
    found = llm.perplexity(TEXT, window=window, stride=stride)
    assert found.predicted == count
    assert found.value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 2, 1), (70, 9, 4), (70, 10, 10), (70, 70, 70), (70, 64, 1), (600, 600, 1)]
)
def test_every_token_given_those_before_it_in_its_window(length, window, stride):
    """Random weights, token by token; one window has more than one launch."""
    source = make(max_position_embeddings=1024)
    model = LanguageModel(source.config)
    model.load_state_dict(source.state_dict())
    ids = torch.randint(0, 64, (length,)).tolist()
    losses = []
    for token in range(1, length):
        begin = next(start for start in range(0, length, stride) if min(start + window, length) > token)
        if token > begin:  # else nothing stands before it in its window
            logits = source(torch.tensor([ids[begin:token]])).logits[0, -1].double()
            losses.append(-logits.log_softmax(-1)[ids[token]].item())
    found = perplexity(model, ids, window, stride, progress=False)
    assert found.predicted == len(losses)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.value == pytest.approx(math.exp(found.loss))
    if len(losses) > 1:
        error = torch.tensor(losses).std().item() / math.sqrt(len(losses))
        assert found.standard_error == pytest.approx(found.value * error, rel=1e-3)


def test_bad_input(llm):
    for options, words in [
        ({"window": 1}, "window must be"),
        ({"window": 257}, "window must be"),
        ({"window": 64, "stride": 65}, "stride must be"),
        ({"stride": 0}, "stride must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            llm.perplexity(TEXT, **options)
    with pytest.raises(ValueError, match="one token"):
        llm.perplexity([5])
    with pytest.raises(ValueError, match="empty"):
        llm.perplexity("")
    with pytest.raises(ValueError, match="vocabulary"):
        llm.perplexity([1, 10**7])
    with pytest.raises(TypeError):
        llm.perplexity([{"role": "user", "content": "a"}])
