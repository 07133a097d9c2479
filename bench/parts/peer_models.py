"""A decode step of the whole model as others do it, in one run with ours: greedy, which is less than our step does.

transformers' own Llama, of the same shapes, with random weights; PlainModel with our weights, in a CUDA graph and
through torch.compile. A peer that is missing, crashes or takes too long to get ready is a row that says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import peers
import torch
from internlm3 import InternLM3ForCausalLM
from parts.bare_step import Steps, device_of, random_model
from parts.decode_times import name_of, step_bytes, step_figure, step_times
from parts.plain_model import PlainModel
from rows import Part, Row, first_line
from timing import Call, measure_floor, replayed, rounds_of

SECONDS = 150  # that a peer may take to get ready, its compiler included
Peer = Callable[[InternLM3ForCausalLM, int, int], Call]


def rows(small: bool) -> Iterator[Row]:
    part, device = Part("peers"), device_of(small)
    model = random_model(small)
    yield part.check("the plain model gives the step's logits", lambda: _same(model, small))
    read = measure_floor(device, [model.dtype], 5).read
    # What takes a compiler minutes comes last, in case that the box is too small.
    known = {
        "cuBLAS and SDPA, CUDA graph" + ", without it on a CPU" * small: _plain_graph,
        "transformers, eager": _transformers_dynamic,
        "transformers, static cache": _transformers_static(None),
        "cuBLAS and SDPA, torch.compile reduce-overhead": _plain_compiled("reduce-overhead"),
        "transformers, static cache, torch.compile": _transformers_static("reduce-overhead"),
        "cuBLAS and SDPA, torch.compile max-autotune": _plain_compiled("max-autotune"),
    }
    shapes = [(16, 1)] if small else [(1024, 1), (1024, 4), (1024, 16), (32768, 1)]
    for context, rows in shapes:
        ours = step_times(model, rows, context, small)
        floor = step_bytes(model, rows, context) / read
        yield step_figure(part, ours, floor, engine="internlm3", rows=rows, context=context)
    for engine, make in known.items():
        for context, rows in shapes:
            about = {"engine": engine, "rows": rows, "context": context}
            try:
                with peers.time_limit(SECONDS), torch.inference_mode():
                    call = make(model, rows, context)
                    call()
                    times = [time / 1e3 for time in islice(rounds_of(call, 1), 3 if small else 50)]
            except Exception as error:
                yield part.missing(name_of(**about), first_line(error), **about)
                continue
            finally:
                call = None
                if not small:
                    torch.cuda.empty_cache()
            yield step_figure(part, times, step_bytes(model, rows, context) / read, **about)


def _same(model: InternLM3ForCausalLM, small: bool) -> str:
    """What is wrong with PlainModel, beside a prompt and a step of ours: nothing may be fast because it is another."""
    ids = torch.randint(1, model.config.vocab_size, (12 if small else 100,)).tolist()
    steps, plain = Steps(model, 1, len(ids)), PlainModel(model, 1, len(ids) - 1)
    steps.prefill(ids[:-1])
    for layer in range(model.config.num_hidden_layers):
        for held, cache in zip(plain.kv[layer], steps.pages.layer(layer), strict=True):
            pages = steps.state.batch.block_table[0].long()
            held[0, :, : plain.context] = cache[pages].transpose(0, 1).flatten(1, 2)[:, : plain.context]
    expected = steps.follow(ids[-1]).float()
    plain.token[0] = ids[-1]
    with torch.inference_mode():
        found = plain.logits().float()
    off = ((found - expected).norm() / expected.norm()).item()
    return "" if off < 0.05 else f"its logits are off by {off:.3g} of their norm"


def _plain_graph(model: InternLM3ForCausalLM, rows: int, context: int) -> Call:
    plain = PlainModel(model, rows, context)
    return replayed([plain.step]) if model.device.type == "cuda" else plain.step


def _plain_compiled(mode: str) -> Peer:
    def make(model: InternLM3ForCausalLM, rows: int, context: int) -> Call:
        torch._dynamo.reset()
        return torch.compile(PlainModel(model, rows, context).step, mode=mode, fullgraph=True)

    return make


@functools.lru_cache(maxsize=1)
def _llama(model: InternLM3ForCausalLM) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        max_position_embeddings=2**17,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with torch.device(model.device), torch.inference_mode(False):
            return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(before)


def _transformers_dynamic(model: InternLM3ForCausalLM, rows: int, context: int) -> Call:
    from transformers import DynamicCache

    llama, c = _llama(model), model.config
    cache = DynamicCache()
    for layer in range(c.num_hidden_layers):
        shape = (rows, c.num_key_value_heads, context, c.head_dim)
        held = torch.zeros(shape, dtype=model.dtype, device=model.device)
        cache.update(held, held.clone(), layer)
    token = torch.ones(rows, 1, dtype=torch.int64, device=model.device)
    return lambda: token.copy_(llama(token, past_key_values=cache).logits.argmax(-1))


def _transformers_static(mode: str | None) -> Peer:
    def make(model: InternLM3ForCausalLM, rows: int, context: int) -> Call:
        from transformers import StaticCache

        llama = _llama(model)
        cache = StaticCache(config=llama.config, max_cache_len=context + 1)
        token = torch.ones(rows, 1, dtype=torch.int64, device=model.device)
        place = torch.tensor([context], device=model.device)

        def step() -> None:
            out = llama(token, past_key_values=cache, cache_position=place, position_ids=place[None])
            token.copy_(out.logits.argmax(-1))

        if mode is None:
            return step
        torch._dynamo.reset()
        return torch.compile(step, mode=mode)

    return make
