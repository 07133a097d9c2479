"""The time of a decode step of the whole model, captured as the engine captures it, by context length and batch size.

Weights, keys and values are random: their values don't change what a step does. Each step reads all weights and the
whole KV cache once; the time of that at the record's read ceiling is its lower bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch

from internlm3 import InternLM3ForCausalLM
from internlm3.runtime.engine.graphs import cuda_graphs, eager
from internlm3.runtime.engine.state import Tier

from ..record import Part, Row, first_line
from ..roofline import nbytes
from ..timing import name_of, rounds_of
from .bare_step import Steps, random_model

CONTEXTS = (128, 1024, 8192, 32768)
BATCHES = (1, 2, 4, 8, 16, 32)
# The shapes that the README names come first, in case the part runs out of time.
FIRST = ((1024, 1), (32768, 1), (1024, 16))


def rows(small: bool, name: str) -> Iterator[Row]:
    part = Part("decode")
    model = random_model(small, name)
    rest = [(context, batch) for batch in BATCHES for context in CONTEXTS]
    shapes = [(16, 1), (32, 2)] if small else [*FIRST, *(shape for shape in rest if shape not in FIRST)]
    for context, batch in shapes:
        shape = shape_of(batch, context)
        try:
            times = step_times(model, batch, context, small)
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            yield part.missing(f"{shape}, internlm3", first_line(error), engine="internlm3", shape=shape)
            continue
        yield step_row(part, times, model, "internlm3", batch, context)
    if not small:
        yield part.figure("peak memory", [torch.cuda.max_memory_allocated() / 2**30], "GiB")
    for tier in Tier:
        times = step_times(model, 1, 16 if small else 1024, small, tier)
        yield part.figure(f"batch 1, sampling {tier.name.lower()}", times, "ms", tier=tier.name)


def shape_of(batch: int, context: int) -> str:
    return f"batch {batch}, context {context}"


def step_row(part: Part, times: list[float], model: InternLM3ForCausalLM, engine: str, batch: int, context: int) -> Row:
    """A measured step."""
    shape = shape_of(batch, context)
    about = needs(model, batch, context)
    about |= {"op": "decode step", "shape": shape, "tokens": batch, "context": context, "engine": engine}
    return part.figure(f"{shape}, {engine}", times, "ms", **about)


def needs(model: InternLM3ForCausalLM, batch: int, context: int) -> dict[str, Any]:
    """What a share of the read ceiling is computed from. The operations never bound a step."""
    return {"dtype": name_of(model.dtype), "bytes": step_bytes(model, batch, context), "flops": 0}


def step_bytes(model: InternLM3ForCausalLM, batch: int, context: int) -> int:
    """What a step must read: every weight except the embedding's table, and all keys and values."""
    weights = nbytes(*model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= nbytes(model.model.embed_tokens.weight)
    config = model.config
    token = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize * config.num_hidden_layers
    return weights + batch * context * token


def ready(model: InternLM3ForCausalLM, batch: int, tokens: int) -> Steps:
    """Sequences of up to `tokens` tokens, with InternLM3's recommended sampling."""
    steps = Steps(model, batch, tokens)
    steps.state.temperature.fill_(1.0)
    steps.state.top_k.fill_(50)
    steps.state.top_p.fill_(0.8)
    steps.state.repetition_penalty.fill_(1.005)
    return steps


def step_times(
    model: InternLM3ForCausalLM, batch: int, context: int, small: bool, tier: Tier = Tier.USUAL
) -> list[float]:
    """Milliseconds of each of a number of replays, in the middle of which the context length is `context`."""
    rounds = 3 if small else 50
    steps = ready(model, batch, context + rounds + 4)
    steps.set_context(max(context - rounds // 2, 1))
    capture = eager if small else cuda_graphs()
    with torch.inference_mode():
        replay = capture(partial(steps.step, tier))
        times = [time / 1e3 for time in islice(rounds_of(replay, 1), rounds)]
    if (reached := int(steps.state.batch.seq_lens.min())) < context:
        raise RuntimeError(f"a sequence has only {reached} tokens at the end: the steps timed were not of {context}")
    return times
