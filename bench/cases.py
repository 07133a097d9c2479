"""The ops at InternLM3-8B's shapes: what the audit compiles and the microbenchmarks time.

Rows are sequences of a decode step that hold `context` tokens each, except where a case's name says otherwise.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 10240, 128512
HEADS, KV_HEADS, HEAD_DIM = 32, 2, 128
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
PAGE = 64

Arguments = dict[str, Any]


class Case(NamedTuple):
    op: str
    shape: str
    arguments: Callable[[torch.device], Arguments]  # makes fresh ones, by name


def _random(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device) * scale


def _weight(device: torch.device, outputs: int, inputs: int) -> Tensor:
    return _random(device, outputs, inputs, scale=inputs**-0.5)


def _pages(device: torch.device, sequences: int, context: int) -> Arguments:
    """Sequences of `context` tokens each on shuffled pages."""
    count = context // PAGE
    k_cache, v_cache = _random(device, 2, sequences * count, KV_HEADS, PAGE, HEAD_DIM)
    return {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": torch.randperm(sequences * count, dtype=torch.int32, device=device).view(sequences, count),
        "seq_lens": torch.full((sequences,), context, dtype=torch.int32, device=device),
    }


def _rope(device: torch.device, sequences: int, context: int) -> Arguments:
    return {"inv_freq": torch.rand(sequences, HEAD_DIM // 2, device=device), **_pages(device, sequences, context)}


def _embed(rows: int, device: torch.device) -> Arguments:
    token_ids = torch.randint(VOCABULARY, (rows,), device=device)
    return {"token_ids": token_ids, "table": _weight(device, VOCABULARY, HIDDEN)}


def _rms_norm(rows: int, device: torch.device) -> Arguments:
    return {"x": _random(device, rows, HIDDEN), "weight": _random(device, HIDDEN), "eps": 1e-5}


def _add_rms_norm(rows: int, device: torch.device) -> Arguments:
    return {**_rms_norm(rows, device), "residual": _random(device, rows, HIDDEN)}


def _swiglu(rows: int, device: torch.device) -> Arguments:
    return {"gate_up": _random(device, rows, 2 * INTERMEDIATE)}


def _rope_and_cache(rows: int, context: int, device: torch.device) -> Arguments:
    return {"qkv": _random(device, rows, QKV), **_rope(device, rows, context)}


def _linear(rows: int, outputs: int, inputs: int, device: torch.device) -> Arguments:
    return {"x": _random(device, rows, inputs), "weight": _weight(device, outputs, inputs)}


def _linear_add(rows: int, outputs: int, inputs: int, device: torch.device) -> Arguments:
    return {**_linear(rows, outputs, inputs, device), "residual": _random(device, rows, outputs)}


def _norm_linear(rows: int, outputs: int, device: torch.device) -> Arguments:
    return {**_linear(rows, outputs, HIDDEN, device), "norm": _random(device, HIDDEN), "eps": 1e-5}


def _norm_qkv_rope_cache(rows: int, context: int, device: torch.device) -> Arguments:
    return {**_norm_linear(rows, QKV, device), "bias": None, **_rope(device, rows, context)}


def _attention(sequences: int, tokens: int, context: int, device: torch.device) -> Arguments:
    q = _random(device, sequences * tokens, HEADS, HEAD_DIM)
    return {"q": q, **_pages(device, sequences, context), "scale": HEAD_DIM**-0.5}


def _greedy(rows: int, device: torch.device) -> Arguments:
    keys = ("seed", "stream", "position")
    return {
        "logits": _random(device, rows, VOCABULARY),
        "temperature": None,
        **{key: torch.zeros(rows, dtype=torch.int64, device=device) for key in keys},
    }


def _sampled(rows: int, device: torch.device) -> Arguments:
    """InternLM3's own settings, and its repetition penalty."""
    per_row = {"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.005}
    return {
        **_greedy(rows, device),
        **{name: torch.full((rows,), value, device=device) for name, value in per_row.items()},
        "top_k": torch.full((rows,), 50, device=device),
        "prompt_counts": torch.zeros(rows, VOCABULARY, dtype=torch.int32, device=device),
        "output_counts": torch.zeros(rows, VOCABULARY, dtype=torch.int32, device=device),
    }


def cases(context: int = 1024) -> Iterator[Case]:
    """Every op for one row and for 16; attention also for the tokens of a verification and of a prefill's chunk."""
    for rows in (1, 16):
        name = f"{rows} row{'s' * (rows > 1)}"
        yield Case("embed", name, partial(_embed, rows))
        yield Case("rms_norm", name, partial(_rms_norm, rows))
        yield Case("add_rms_norm", name, partial(_add_rms_norm, rows))
        yield Case("swiglu", name, partial(_swiglu, rows))
        yield Case("rope_and_cache", name, partial(_rope_and_cache, rows, context))
        yield Case("linear", f"{name}, o", partial(_linear, rows, HIDDEN, HIDDEN))
        yield Case("linear_add", f"{name}, o", partial(_linear_add, rows, HIDDEN, HIDDEN))
        yield Case("linear_add", f"{name}, down", partial(_linear_add, rows, HIDDEN, INTERMEDIATE))
        yield Case("rms_norm_linear", f"{name}, head", partial(_norm_linear, rows, VOCABULARY))
        yield Case("rms_norm_swiglu", name, partial(_norm_linear, rows, 2 * INTERMEDIATE))
        yield Case("rms_norm_qkv_rope_cache", name, partial(_norm_qkv_rope_cache, rows, context))
        yield Case("paged_attention", name, partial(_attention, rows, 1, context))
        yield Case("sample", f"{name}, greedy", partial(_greedy, rows))
        yield Case("sample", name, partial(_sampled, rows))
    yield Case("paged_attention", "4 tokens", partial(_attention, 1, 4, context))
    yield Case("paged_attention", "512 tokens", partial(_attention, 1, 512, context))
