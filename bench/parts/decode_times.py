"""Milliseconds of a decode step of the whole model, captured as the engine captures it, by context and rows.

Weights are random, and so is what is held: neither changes what a step does. Each step reads all weights and all that
is held once, which at this card's read ceiling is its floor.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from internlm3 import InternLM3ForCausalLM
from internlm3.runtime.engine.graphs import cuda_graphs, eager
from internlm3.runtime.engine.state import Tier
from parts.bare_step import Steps, device_of, random_model
from rows import Part, Row, first_line
from timing import measure_floor, rounds_of
from work import nbytes

CONTEXTS = (128, 1024, 8192, 32768)
ROWS = (1, 2, 4, 8, 16, 32)
# A goal's figures come first, in case that the box is too small.
FIRST = ((1024, 1), (32768, 1), (1024, 16))


def rows(small: bool) -> Iterator[Row]:
    part, device = Part("decode"), device_of(small)
    model = random_model(small)
    rest = [(context, rows) for rows in ROWS for context in CONTEXTS]
    shapes = [(16, 1), (32, 2)] if small else [*FIRST, *(shape for shape in rest if shape not in FIRST)]
    read = measure_floor(device, [model.dtype], 5).read
    for context, rows in shapes:
        about = {"engine": "internlm3", "context": context, "rows": rows}
        try:
            times = step_times(model, rows, context, small)
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            yield part.missing(name_of(**about), first_line(error), **about)
            continue
        yield step_figure(part, times, step_bytes(model, rows, context) / read, **about)
    if not small:
        yield part.figure("most memory", [torch.cuda.max_memory_allocated() / 2**30], "GiB")
    for tier in Tier:
        times = step_times(model, 1, 16 if small else 1024, small, tier)
        yield part.figure(f"1 row, sampling {tier.name.lower()}", times, "ms", engine="internlm3", tier=tier.name)


def name_of(engine: str, rows: int, context: int) -> str:
    return f"{rows} row{'s' * (rows > 1)}, {context} held, {engine}"


def step_figure(part: Part, times: list[float], floor: float, **about: Any) -> Row:
    """The figure of a step by an engine, at so many rows and tokens; `floor`: the seconds of its reads."""
    share = 1e3 * floor / statistics.median(times)
    return part.figure(name_of(**about), times, "ms", f"{share:.1%} of the read ceiling", **about, share=share)


def step_bytes(model: InternLM3ForCausalLM, rows: int, context: int) -> int:
    """What a step must read: every weight but the embedding's table, and all keys and values."""
    weights = nbytes(*model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= nbytes(model.model.embed_tokens.weight)
    config = model.config
    held = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize * config.num_hidden_layers
    return weights + rows * context * held


def ready(model: InternLM3ForCausalLM, rows: int, tokens: int) -> Steps:
    """Rows of up to so many tokens, sampled as InternLM3 recommends."""
    steps = Steps(model, rows, tokens)
    steps.state.temperature.fill_(1.0)
    steps.state.top_k.fill_(50)
    steps.state.top_p.fill_(0.8)
    steps.state.repetition_penalty.fill_(1.005)
    return steps


def step_times(
    model: InternLM3ForCausalLM, rows: int, context: int, small: bool, tier: Tier = Tier.USUAL
) -> list[float]:
    """Milliseconds of each of some replays, in the middle of which the rows hold `context` tokens."""
    rounds = 3 if small else 50
    steps = ready(model, rows, context + rounds + 4)
    steps.hold(max(context - rounds // 2, 1))
    capture = eager if small else cuda_graphs()
    with torch.inference_mode():
        replay = capture(partial(steps.step, tier))
        times = [time / 1e3 for time in islice(rounds_of(replay, 1), rounds)]
    if (held := int(steps.state.batch.seq_lens.min())) < context:
        raise RuntimeError(f"a row holds {held} tokens at the end: what was timed is not a step at {context}")
    return times
