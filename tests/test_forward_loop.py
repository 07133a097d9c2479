"""The engine's answers are those of `forward` in a loop: each token by a pass over all before it, without a cache."""

import random

import pytest
import torch
from internlm3 import InternLM3Config, InternLM3ForCausalLM
from internlm3.kernels import sampling_reference
from internlm3.runtime import decode
from internlm3.runtime.pages import PAGE
from internlm3.runtime.request import Request
from internlm3.runtime.sampling import SamplingParams

SETTINGS = [
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.005},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.3, "typical_p": 0.9},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 0, "min_tokens": 8},
    {"temperature": 1.0, "logit_bias": {5: 3.0, 9: -100.0}},
    {"temperature": 1.0, "allowed_token_ids": list(range(0, 320, 3))},
    {"temperature": 1.0, "stop_token_ids": [3, 4, 5, 6], "ignore_eos": True},
]
ENDS = frozenset(range(300, 320))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = InternLM3Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.3,
        tie_word_embeddings=False,
    )  # fmt: skip
    return InternLM3ForCausalLM(config, dtype=torch.float32)


def looped(model, request):
    """The same answer by `forward`, the sampling written out here from its settings."""
    p, ids, token_ids = request.params, list(request.prompt_ids), []
    vocab = model.config.vocab_size
    while True:
        logits = model(torch.tensor([ids])).logits[:, -1].float()
        counts = [torch.bincount(torch.tensor(x, dtype=torch.int64), minlength=vocab)[None] for x in (ids, token_ids)]
        x = logits.clone()
        for token, bias in (p.logit_bias or {}).items():
            x[0, token] += bias
        x = torch.where(counts[0] > 0, torch.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty), x)
        x -= p.frequency_penalty * counts[1] + p.presence_penalty * (counts[1] > 0)
        banned = torch.zeros(vocab, dtype=torch.bool)
        if p.allowed_token_ids is not None:
            banned[:] = True
            banned[list(p.allowed_token_ids)] = False
        if len(token_ids) < p.min_tokens:
            banned[list(request.ends)] = True
        x[0, banned] = -torch.inf
        keys = {name: torch.tensor([value]) for name, value in (
            ("seed", request.seed), ("stream", request.answer), ("position", len(ids)))}  # fmt: skip
        filters = {name: torch.tensor([getattr(p, name)]) for name in ("temperature", "top_p", "min_p", "typical_p")}
        token = int(sampling_reference.sample(x, **filters, top_k=torch.tensor([p.top_k]), **keys)[0])
        ids.append(token)
        token_ids.append(token)
        if token in request.ends:
            return token_ids, "stop"
        if len(token_ids) == request.max_tokens:
            return token_ids, "length"


def test_every_setting_in_ragged_batches_with_beginnings_that_recur(model, monkeypatch):
    """50 prompts, some of them edits of others in the middle, five settings in a batch, rows that join and leave."""
    monkeypatch.setattr(decode, "CHUNK", PAGE)
    dice = random.Random(0)
    story = [dice.randrange(300) for _ in range(220)]
    prompts = []
    for index in range(50):
        prompt = story[: dice.choice([1, 30, 64, 90, 128, 150, 200])]
        if index % 3 == 0:  # an edit somewhere
            prompt[dice.randrange(len(prompt))] = 299
        prompts.append(prompt + [dice.randrange(300) for _ in range(dice.randrange(1, 20))])
    requests = [
        Request(prompt, SamplingParams(**{"seed": index, **SETTINGS[index % 10]}), dice.randrange(1, 24), ENDS)
        for index, prompt in enumerate(prompts)
    ]
    engine = model.reserve(8, 512)
    with engine.running(requests):
        while any(request.finish_reason is None for request in requests):
            engine.step()
    assert sum(request.cached_tokens > 0 for request in requests) > 10
    assert {request.finish_reason for request in requests} == {"stop", "length"}
    wrong = [
        index
        for index, request in enumerate(requests)
        if (request.token_ids, request.finish_reason) != looped(model, request)
    ]
    assert not wrong
