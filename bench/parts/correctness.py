"""Whole models on this GPU: Triton against PyTorch, graphs against eager steps, single requests against batches.

The logits of a step are compared with those of the same model in float32. Triton's error may be at most 1.5 times that
of the PyTorch ops in the same dtype, and the greedy token must be the float32 model's wherever its lead is larger than
the error.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from internlm3 import InternLM3ForCausalLM, kernels
from internlm3.kernels import reference
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.graphs import Capture, cuda_graphs, eager
from internlm3.runtime.engine.request import Request
from internlm3.runtime.engine.state import Tier
from internlm3.runtime.sampling.params import SamplingParams

from ..record import Part, Row
from .bare_step import Steps, config_of, on_ops, random_model

STEPS = 4  # after a prompt
SETTINGS = (
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.8, "top_k": 50, "repetition_penalty": 1.005, "seed": 1},
    {"temperature": 1.0, "typical_p": 0.9, "frequency_penalty": 0.3, "seed": 2},
    {"temperature": 0.7, "top_p": 0.95, "seed": 3, "min_tokens": 4},
)


def rows(small: bool, name: str) -> Iterator[Row]:
    part = Part("correctness")
    whole = config_of(name, small).num_hidden_layers
    # The last prompt is longer than InternLM3's trained window, here and in a dry run.
    for layers, tokens in [(2, 40)] if small else [(2, 700), (whole, 700), (2, 32_760), (2, 40_000)]:
        checked = f"{layers} layers: logits of a prompt of {tokens} tokens and of the steps after it"
        yield part.check(checked, partial(_logits, small, layers, tokens, name))
    model = random_model(small, name, layers=4)
    capture = (lambda: eager) if small else cuda_graphs
    yield part.check("graphs and eager steps give the same tokens and bits", lambda: _graphs(model, small, capture))
    yield from _replays(part, model, small)
    model.model.batch_invariant = True  # for every engine created from here on
    yield part.check(
        "batch_invariant: bit-identical alone and in a batch of 16", lambda: _invariant(model, small, capture)
    )
    yield part.check(
        "cancelled requests leave the other answers bit-identical", lambda: _cancels(model, small, capture)
    )


def _ids(count: int, vocab_size: int, seed: int) -> list[int]:
    return torch.randint(1, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _logits(small: bool, layers: int, prompt: int, name: str) -> str:
    model = random_model(small, name, layers=layers)
    ids = _ids(prompt + (1 if small else STEPS), model.config.vocab_size, prompt)

    def logits(model: InternLM3ForCausalLM) -> Tensor:
        steps = Steps(model, 1, len(ids))
        found = [steps.prefill(ids[:prompt]), *(steps.follow(token).clone() for token in ids[prompt:])]
        return torch.cat(found).float()

    with on_ops(kernels.for_device(torch.device("cuda"))):
        ours = logits(model)
    with on_ops(reference):
        plain = logits(model)
        exact = logits(model.float())
    far = {name: (x - exact).norm(dim=1) / exact.norm(dim=1) for name, x in (("Triton", ours), ("PyTorch", plain))}
    bound = 1.5 * far["PyTorch"].max()
    if not (far["Triton"] <= bound).all():
        return f"off by {far['Triton'].max():.3g} of the logits' norm, PyTorch's ops by {far['PyTorch'].max():.3g}"
    best, second = exact.topk(2, dim=1).values.unbind(1)
    sure = best - second > 4 * (plain - exact).abs().amax(1)
    wrong = sure & (ours.argmax(1) != exact.argmax(1))
    return f"a different greedy token at steps {wrong.nonzero()[:, 0].tolist()}" if wrong.any() else ""


Answer = tuple[list[int], list[float], str | None]


def _requests(vocab_size: int, window: int, count: int, seed: int) -> list[Request]:
    dice = random.Random(seed)
    lengths = [dice.randint(1, window // 2) for _ in range(count)]
    return [
        Request(
            _ids(length, vocab_size, seed + place),
            SamplingParams(**SETTINGS[place % len(SETTINGS)]),
            dice.randint(4, window // 2),
            frozenset([7]),
        )
        for place, length in enumerate(lengths)
    ]


def _answers(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    engine.add(requests)
    while engine.busy:
        engine.step()
    return [(request.token_ids, request.logprobs, request.finish_reason) for request in requests]


def _graphs(model: InternLM3ForCausalLM, small: bool, capture: Callable[[], Capture]) -> str:
    window = 64 if small else 1024
    found = []
    # Both pad prompts as graphs do and have the same depth, which decides when a slot is free and so what is batched.
    for made in (lambda step: eager(step), capture()):
        engine = Engine(model, max_batch_size=8, max_seq_len=window, capture=made, depth=3)
        engine.warm_up()
        found.append(_answers(engine, _requests(model.config.vocab_size, window, 20, 5)))
        if engine.pages.free != len(engine.pages):
            return f"{len(engine.pages) - engine.pages.free} pages were not freed"
    different = [place for place, (one, other) in enumerate(zip(*found, strict=True)) if one != other]
    return f"answers {different} of 20 differ" if different else ""


def _replays(part: Part, model: InternLM3ForCausalLM, small: bool) -> Iterator[Row]:
    name = "1000 replays neither allocate nor synchronize"
    if small:
        yield part.missing(name, "needs a GPU's allocator and graphs")
        return

    def wrong() -> str:
        steps = Steps(model, 4, 2048)
        steps.set_context(64)
        replay = cuda_graphs()(lambda: steps.step(Tier.FULL))
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(1000):
                replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        made = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        lengths = steps.state.batch.seq_lens.tolist()
        # The first run and each replay append a token; the capture executes nothing.
        if lengths != [64 + 1001] * 4:
            return f"the context lengths are {lengths}, not {64 + 1001}"
        return f"{made} allocations" if made else ""

    yield part.check(name, wrong)


def _cancels(model: InternLM3ForCausalLM, small: bool, capture: Callable[[], Capture]) -> str:
    """On a batch-invariant model, every answer, complete or cancelled, is bit-identical to the answer alone."""
    window, dice = (64 if small else 512), random.Random(9)
    engine = Engine(model, max_batch_size=4, max_seq_len=window, capture=capture(), depth=3)
    requests = _requests(model.config.vocab_size, window, 30, 6)
    engine.add(requests)
    while engine.busy:
        engine.step()
        if dice.random() < 0.15:
            engine.cancel([dice.choice(requests)])
    if engine.pages.free != len(engine.pages):
        return f"{len(engine.pages) - engine.pages.free} pages were not freed"
    alone = Engine(model, max_batch_size=1, max_seq_len=window, capture=capture())
    again = _requests(model.config.vocab_size, window, 30, 6)
    for place, (request, (ids, logprobs, reason)) in enumerate(
        (request, _answers(alone, [other])[0]) for request, other in zip(requests, again, strict=True)
    ):
        count = len(request.token_ids)
        if (request.token_ids, request.logprobs) != (ids[:count], logprobs[:count]):
            return f"answer {place} differs from the answer alone"
        if request.finish_reason not in (reason, "abort"):
            return f"answer {place} ended with {request.finish_reason}, alone with {reason}"
    return ""


def _invariant(model: InternLM3ForCausalLM, small: bool, capture: Callable[[], Capture]) -> str:
    window = 64 if small else 512

    def requests() -> list[Request]:
        return _requests(model.config.vocab_size, window, 16, 8)

    together = _answers(Engine(model, max_batch_size=16, max_seq_len=window, capture=capture()), requests())
    engine = Engine(model, max_batch_size=1, max_seq_len=window, capture=capture())
    alone = [_answers(engine, [request])[0] for request in requests()]
    different = [place for place, (one, other) in enumerate(zip(together, alone, strict=True)) if one != other]
    return f"answers {different} of 16 differ" if different else ""
