"""The engine's answers equal, token for token, those of a loop over `forward` with one prompt at a time.

In bfloat16, where on a CPU rows are bit-identical in any batch and on any pages: the tokens must be equal as long as
prompts are cut into chunks at the same places.
"""

import random

import pytest
import torch

from internlm3 import LLM, InternLM3Config, InternLM3ForCausalLM
from internlm3.kernels import reference_sampling
from internlm3.runtime.engine import prefill
from internlm3.runtime.engine.answer import Answer
from internlm3.runtime.engine.request import Request
from internlm3.runtime.model.kv_cache import PAGE
from internlm3.runtime.sampling.params import SamplingParams
from internlm3.tests.support.engine import shorten_chunks
from internlm3.tests.support.prompts import real_prompts

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
    return InternLM3ForCausalLM(config, dtype=torch.bfloat16)


def looped(model, prompt, p, max_tokens, ends, seed, tokenizer=None):
    """The answer by `forward`, with the order of the sampling stages written out here: tokens and finish reason."""
    ends = (frozenset() if p.ignore_eos else ends) | set(p.stop_token_ids or ())
    cache, vocab, token_ids = None, model.config.vocab_size, []
    *chunks, last = torch.tensor([prompt]).split(prefill.CHUNK, dim=1)
    for chunk in chunks:
        cache = model(chunk, past_key_values=cache).past_key_values
    logits, cache = last_logits(model, last, cache)
    while True:
        x = logits.float()
        counts = [
            torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocab)[None] for ids in (prompt, token_ids)
        ]
        for token, bias in (p.logit_bias or {}).items():
            x[0, token] += bias
        seen = counts[0] + counts[1] > 0
        x = torch.where(seen, torch.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty), x)
        x = x - p.frequency_penalty * counts[1]
        x = x - p.presence_penalty * (counts[1] > 0)
        banned = torch.full((vocab,), p.allowed_token_ids is not None)
        banned[list(p.allowed_token_ids or ())] = False
        if len(token_ids) < p.min_tokens:
            banned[list(ends)] = True
        x[0, banned] = -torch.inf
        keys = {"seed": seed, "stream": 0, "position": len(prompt) + len(token_ids)}
        filters = {name: torch.tensor([getattr(p, name)]) for name in ("temperature", "top_p", "min_p", "typical_p")}
        filters |= {"top_k": torch.tensor([p.top_k]), **{name: torch.tensor([key]) for name, key in keys.items()}}
        token_ids.append(int(reference_sampling.sample(x, **filters)[0]))
        if token_ids[-1] in ends:
            return token_ids, "stop"
        if p.stops and any(stop in tokenizer.decode(token_ids) for stop in p.stops):
            return token_ids, "stop"
        if len(token_ids) == max_tokens:
            return token_ids, "length"
        logits = model(torch.tensor([token_ids[-1:]]), past_key_values=cache).logits[:, -1]


def last_logits(model, chunk, cache):
    """Logits [1, V] after a prompt's last chunk [1, T]; as in prefill, the last block runs its last row only."""
    kept = model(chunk, past_key_values=cache).past_key_values
    batch = kept.batch([0], 0, None)
    x = model.model.ops.embed(chunk[0], model.model.embed_tokens.weight)
    return model.head(
        model.model.run(x, batch, kept.kv_cache, last_rows=True)
    ), kept  # writes the same keys and values again


def test_every_setting_in_batches_with_shared_prefixes(model, monkeypatch):
    """50 prompts with shared prefixes, some edited in the middle, ten settings, in batches of up to 8."""
    shorten_chunks(monkeypatch, PAGE, PAGE)
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
    for _ in model.engine(8, 512).run([Answer(request) for request in requests]):
        pass
    assert sum(request.cached_tokens > 0 for request in requests) > 10
    assert {request.finish_reason for request in requests} == {"stop", "length"}
    wrong = [
        index
        for index, asked in enumerate(requests)
        if (asked.token_ids, asked.finish_reason)
        != looped(model, asked.prompt_ids, asked.params, asked.max_tokens, ENDS, asked.seed)
    ]
    assert not wrong


def test_real_prompts_with_every_setting(demo_model, monkeypatch):
    """Real prompts through one call of LLM.generate on the demo model: one for each setting, some with stop strings."""
    shorten_chunks(monkeypatch, PAGE, PAGE)
    llm = LLM(demo_model, dtype="bfloat16", device="cpu", max_batch_size=8, progress=False)
    prompts = real_prompts(llm.tokenizer)[::10] * 2  # the second time a prefix is cached
    scale = llm.config.vocab_size // 320
    params = []
    for index in range(10):
        wanted = {"seed": index, "max_tokens": 8, **SETTINGS[index % 10]}
        if "allowed_token_ids" in wanted:
            wanted["allowed_token_ids"] = [token * scale for token in wanted["allowed_token_ids"]]
        wanted |= {"stop": [" the", "\n", "1"]} if index % 4 == 0 and not wanted.get("min_tokens") else {}
        params.append(SamplingParams(**wanted))
    outputs = llm.generate(prompts, params)
    model = InternLM3ForCausalLM.from_pretrained(demo_model, dtype="bfloat16", device="cpu", progress=False)
    ends = frozenset(llm.eos_token_ids)
    for index, (output, prompt, p) in enumerate(zip(outputs, prompts, params, strict=True)):
        answer = output.outputs[0]
        expected = looped(model, prompt, p, p.max_tokens, ends, p.seed, llm.tokenizer)
        assert (answer.token_ids, answer.finish_reason) == expected, index
    assert sum(output.cached_tokens > 0 for output in outputs) > 0 or max(map(len, prompts)) <= PAGE
