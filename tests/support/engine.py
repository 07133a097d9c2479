"""A small model with random weights, and requests to engines that run it."""

import time

import torch

from internlm3 import InternLM3Config, InternLM3ForCausalLM
from internlm3.kernels import cpu_cache
from internlm3.runtime.engine import prefill
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.request import Request
from internlm3.runtime.engine.runner import Runner
from internlm3.runtime.sampling.params import SamplingParams

SHAPE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.3,
    "tie_word_embeddings": False,
}  # fmt: skip


def random_model(dtype=torch.bfloat16, **changes):
    """bfloat16 by default: on a CPU a row's bits do not depend on its batch there."""
    torch.manual_seed(1)
    return InternLM3ForCausalLM(InternLM3Config(**{**SHAPE, **changes}), dtype=dtype)


def shorten_chunks(monkeypatch, chunk, launch=None):
    """Chunks of `chunk` tokens, so that short prompts have several, and launches of at most `launch`.

    The CPU's blocks of queries end where chunks end, as they do in the runtime: else a prompt's bits would depend on
    where its launches begin, on a CPU that runs several chunks in one.
    """
    monkeypatch.setattr(prefill, "CHUNK", chunk)
    monkeypatch.setattr(cpu_cache, "QUERY_BLOCK", chunk)
    if launch is not None:
        monkeypatch.setattr(prefill, "LAUNCH_TOKENS", launch)


def slow_steps(monkeypatch, seconds=0.02):
    """Steps take longer, so that a long answer is under way for many seconds: it never ends before a test ends it."""
    step = Runner.step
    monkeypatch.setattr(Runner, "step", lambda self: (time.sleep(seconds), step(self))[1])


def ids(length, seed=0):
    return torch.randint(320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(prompt, max_tokens=8, answer=0, ends=(), **params):
    return Request(prompt, SamplingParams(**{"temperature": 0, **params}), max_tokens, frozenset(ends), answer)


def run(engine, *requests):
    engine.add(requests)
    while any(request.finish_reason is None for request in requests):
        engine.step()
    return requests


def result(request):
    """All of an answer, log-probabilities included."""
    return request.token_ids, request.logprobs, request.top_logprobs, request.finish_reason, request.stop_reason


def alone(model, request):
    """The result of the same request in an engine of its own."""
    twin = Request(
        request.prompt_ids, request.params, request.max_tokens, request.eos_token_ids, request.answer, request.hooks
    )
    twin.seed = request.seed
    return result(*run(Engine(model, max_batch_size=1, max_seq_len=1024), twin))


def count_tokens(monkeypatch, model):
    """A list of the number of tokens of each pass through the blocks."""
    tokens, through = [], model.model.run

    def counting(x, *args, **options):
        tokens.append(len(x))
        return through(x, *args, **options)

    monkeypatch.setattr(model.model, "run", counting)
    return tokens
