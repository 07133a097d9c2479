"""The ops at a model's shapes: what the audit compiles and the microbenchmarks time.

Rows are sequences of a decode step that hold `context` tokens each, except where a case's name says otherwise.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

PAGE = 64


class Size(NamedTuple):
    """A model's shapes."""

    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


INTERNLM3_8B = Size(4096, 10240, 128512, 32, 2, 128)

Arguments = dict[str, Any]


class Case(NamedTuple):
    op: str
    shape: str
    arguments: Callable[[torch.device], Arguments]  # makes fresh ones, by name


def _random(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device) * scale


def _weight(device: torch.device, outputs: int, inputs: int) -> Tensor:
    return _random(device, outputs, inputs, scale=inputs**-0.5)


def _pages(size: Size, device: torch.device, sequences: int, context: int) -> Arguments:
    """Sequences of `context` tokens each on shuffled pages, which lie in memory as the runtime's do, head by head."""
    count = context // PAGE
    k_cache, v_cache = _random(device, 2, size.kv_heads, sequences * count, PAGE, size.head_dim).transpose(1, 2)
    return {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": torch.randperm(sequences * count, dtype=torch.int32, device=device).view(sequences, count),
        "seq_lens": torch.full((sequences,), context, dtype=torch.int32, device=device),
    }


def _rope(size: Size, device: torch.device, sequences: int, context: int) -> Arguments:
    return {
        "inv_freq": torch.rand(sequences, size.head_dim // 2, device=device),
        **_pages(size, device, sequences, context),
    }


def _embed(size: Size, rows: int, device: torch.device) -> Arguments:
    token_ids = torch.randint(size.vocabulary, (rows,), device=device)
    return {"token_ids": token_ids, "table": _weight(device, size.vocabulary, size.hidden)}


def _rms_norm(size: Size, rows: int, device: torch.device) -> Arguments:
    return {"x": _random(device, rows, size.hidden), "weight": _random(device, size.hidden), "eps": 1e-5}


def _swiglu(size: Size, rows: int, device: torch.device) -> Arguments:
    return {"gate_up": _random(device, rows, 2 * size.intermediate)}


def _rope_and_cache(size: Size, rows: int, context: int, device: torch.device) -> Arguments:
    return {"qkv": _random(device, rows, size.qkv), **_rope(size, device, rows, context)}


def _linear(rows: int, outputs: int, inputs: int, device: torch.device) -> Arguments:
    return {"x": _random(device, rows, inputs), "weight": _weight(device, outputs, inputs)}


def _linear_add(rows: int, outputs: int, inputs: int, device: torch.device) -> Arguments:
    return {**_linear(rows, outputs, inputs, device), "residual": _random(device, rows, outputs)}


def _norm_linear(size: Size, rows: int, outputs: int, device: torch.device) -> Arguments:
    return {**_linear(rows, outputs, size.hidden, device), "norm": _random(device, size.hidden), "eps": 1e-5}


def _norm_qkv_rope_cache(size: Size, rows: int, context: int, device: torch.device) -> Arguments:
    return {**_norm_linear(size, rows, size.qkv, device), "bias": None, **_rope(size, device, rows, context)}


def _attention(size: Size, sequences: int, tokens: int, context: int, device: torch.device) -> Arguments:
    q = _random(device, sequences * tokens, size.heads, size.head_dim)
    return {"q": q, **_pages(size, device, sequences, context), "scale": size.head_dim**-0.5}


def _greedy(size: Size, rows: int, device: torch.device) -> Arguments:
    keys = ("seed", "stream", "position")
    return {
        "logits": _random(device, rows, size.vocabulary),
        "temperature": None,
        **{key: torch.zeros(rows, dtype=torch.int64, device=device) for key in keys},
    }


def _sampled(size: Size, rows: int, device: torch.device) -> Arguments:
    """InternLM3's own settings, and its repetition penalty."""
    per_row = {"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.005}
    return {
        **_greedy(size, rows, device),
        **{name: torch.full((rows,), value, device=device) for name, value in per_row.items()},
        "top_k": torch.full((rows,), 50, device=device),
        "prompt_counts": torch.zeros(rows, size.vocabulary, dtype=torch.int32, device=device),
        "output_counts": torch.zeros(rows, size.vocabulary, dtype=torch.int32, device=device),
    }


def _filtered(which: str, size: Size, rows: int, device: torch.device) -> Arguments:
    """One filter alone, which leaves the whole vocabulary to search."""
    name = {"top-p alone": "top_p", "typical-p alone": "typical_p"}[which]
    return {
        **_greedy(size, rows, device),
        "temperature": torch.full((rows,), 1.0, device=device),
        name: torch.full((rows,), 0.8, device=device),
    }


def _advance(size: Size, rows: int, device: torch.device) -> Arguments:
    """Rows that neither end nor open their mask."""
    words = -(-size.vocabulary // 32)
    integers = {"seq_lens": 1, "limit": 2**31 - 1, "free_from": 0}
    return {
        "drawn": torch.zeros(rows, dtype=torch.int64, device=device),
        "logprob": torch.zeros(rows, device=device),
        "token": torch.zeros(rows, dtype=torch.int64, device=device),
        **{name: torch.full((rows,), value, dtype=torch.int32, device=device) for name, value in integers.items()},
        "said": torch.zeros(rows, 3, dtype=torch.int32, device=device),
        "output_counts": torch.zeros(rows, size.vocabulary, dtype=torch.int32, device=device),
        **{
            name: torch.zeros(rows, words, dtype=torch.int32, device=device)
            for name in ("ends", "permitted", "allowed")
        },
    }


def cases(size: Size = INTERNLM3_8B, context: int = 1024) -> Iterator[Case]:
    """Every op for one row and for 16; attention also for the tokens of a verification and of a prefill's chunk."""
    for rows in (1, 16):
        name = f"{rows} row{'s' * (rows > 1)}"
        yield Case("embed", name, partial(_embed, size, rows))
        yield Case("rms_norm", name, partial(_rms_norm, size, rows))
        yield Case("swiglu", name, partial(_swiglu, size, rows))
        yield Case("rope_and_cache", name, partial(_rope_and_cache, size, rows, context))
        yield Case("linear", f"{name}, o", partial(_linear, rows, size.hidden, size.hidden))
        yield Case("linear_add", f"{name}, o", partial(_linear_add, rows, size.hidden, size.hidden))
        yield Case("linear_add", f"{name}, down", partial(_linear_add, rows, size.hidden, size.intermediate))
        yield Case("rms_norm_linear", f"{name}, head", partial(_norm_linear, size, rows, size.vocabulary))
        yield Case("rms_norm_swiglu", name, partial(_norm_linear, size, rows, 2 * size.intermediate))
        yield Case("rms_norm_qkv_rope_cache", name, partial(_norm_qkv_rope_cache, size, rows, context))
        yield Case("paged_attention", name, partial(_attention, size, rows, 1, context))
        yield Case("sample", f"{name}, greedy", partial(_greedy, size, rows))
        yield Case("sample", name, partial(_sampled, size, rows))
        yield Case("advance", name, partial(_advance, size, rows))
    yield Case("paged_attention", "4 tokens", partial(_attention, size, 1, 4, context))
    yield Case("paged_attention", "512 tokens", partial(_attention, size, 1, 512, context))
