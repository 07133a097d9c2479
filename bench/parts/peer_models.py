"""A decode step of the whole model by other implementations, measured in the same run as ours.

Theirs are greedy, which is less work than our step does. They are the Llama of transformers at the same shapes, with
random weights, and PlainModel with our weights, in a CUDA graph and through torch.compile. A peer that is not
installed, fails or takes too long to compile is a row that says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from internlm3 import InternLM3ForCausalLM

from .. import peers
from ..record import Part, Row, first_line
from ..timing import Call, replayed, rounds_of
from .bare_step import Steps, random_model
from .decode import shape_of, step_row, step_times
from .plain_model import PlainModel

SECONDS = 150  # time limit for a peer to get ready, compiling included
Peer = Callable[[InternLM3ForCausalLM, int, int], Call]


def rows(small: bool, name: str) -> Iterator[Row]:
    part = Part("peers")
    model = random_model(small, name)
    yield part.check("the plain model gives the step's logits", lambda: _same(model, small))
    # Peers that compile for minutes come last, in case the part runs out of time.
    known = {
        "cuBLAS and SDPA, CUDA graph" + ", without it on a CPU" * small: _plain_graph,
        "transformers, eager": _transformers_dynamic,
        "transformers, static cache": _transformers_static(None),
        "cuBLAS and SDPA, torch.compile reduce-overhead": _plain_compiled("reduce-overhead"),
        "transformers, static cache, torch.compile": _transformers_static("reduce-overhead"),
        "cuBLAS and SDPA, torch.compile max-autotune": _plain_compiled("max-autotune"),
    }
    shapes = [(16, 1)] if small else [(1024, 1), (1024, 4), (1024, 16), (32768, 1)]
    for context, batch in shapes:
        yield step_row(part, step_times(model, batch, context, small), model, "internlm3", batch, context)
    for engine, make in known.items():
        for context, batch in shapes:
            shape = shape_of(batch, context)
            call: Call | None = None
            try:
                with peers.time_limit(SECONDS), torch.inference_mode():
                    call = make(model, batch, context)
                    call()
                    times = [time / 1e3 for time in islice(rounds_of(call, 1), 3 if small else 50)]
            except Exception as error:
                yield part.missing(f"{shape}, {engine}", first_line(error), engine=engine, shape=shape)
                continue
            finally:
                call = None  # frees its memory
                if not small:
                    torch.cuda.empty_cache()
            yield step_row(part, times, model, engine, batch, context)


def _same(model: InternLM3ForCausalLM, small: bool) -> str:
    """What is wrong with PlainModel's logits, compared with ours after the same prompt; a peer must do the same."""
    ids = torch.randint(1, model.config.vocab_size, (12 if small else 100,)).tolist()
    steps, plain = Steps(model, 1, len(ids)), PlainModel(model, 1, len(ids) - 1)
    steps.prefill(ids[:-1])
    for layer in range(model.config.num_hidden_layers):
        for kv, cache in zip(plain.kv[layer], steps.kv_cache.layer(layer), strict=True):
            pages = steps.state.batch.block_table[0].long()
            kv[0, :, : plain.context] = cache[pages].transpose(0, 1).flatten(1, 2)[:, : plain.context]
    expected = steps.follow(ids[-1]).float()
    plain.token[0] = ids[-1]
    with torch.inference_mode():
        found = plain.logits().float()
    off = ((found - expected).norm() / expected.norm()).item()
    return "" if off < 0.05 else f"its logits are off by {off:.3g} of their norm"


def _plain_graph(model: InternLM3ForCausalLM, batch: int, context: int) -> Call:
    plain = PlainModel(model, batch, context)
    return replayed([plain.step]) if model.device.type == "cuda" else plain.step


def _plain_compiled(mode: str) -> Peer:
    def make(model: InternLM3ForCausalLM, batch: int, context: int) -> Call:
        torch._dynamo.reset()
        return torch.compile(PlainModel(model, batch, context).step, mode=mode, fullgraph=True)

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


def _transformers_dynamic(model: InternLM3ForCausalLM, batch: int, context: int) -> Call:
    from transformers import DynamicCache

    llama, c = _llama(model), model.config
    cache = DynamicCache()
    for layer in range(c.num_hidden_layers):
        shape = (batch, c.num_key_value_heads, context, c.head_dim)
        keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        cache.update(keys, keys.clone(), layer)
    token = torch.ones(batch, 1, dtype=torch.int64, device=model.device)
    return lambda: token.copy_(llama(token, past_key_values=cache).logits.argmax(-1))


def _transformers_static(mode: str | None) -> Peer:
    def make(model: InternLM3ForCausalLM, batch: int, context: int) -> Call:
        from transformers import StaticCache

        llama = _llama(model)
        cache = StaticCache(config=llama.config, max_cache_len=context + 1)
        token = torch.ones(batch, 1, dtype=torch.int64, device=model.device)
        place = torch.tensor([context], device=model.device)

        def step() -> None:
            out = llama(token, past_key_values=cache, cache_position=place, position_ids=place[None])
            token.copy_(out.logits.argmax(-1))

        if mode is None:
            return step
        torch._dynamo.reset()
        return torch.compile(step, mode=mode)

    return make
