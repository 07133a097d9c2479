"""The ops tuned for a CPU: the names, signatures and meaning of `kernels.reference`, where shapes are explained.

What is fast was measured at the demo model's shapes on two CPUs: a Xeon with AMX (16-bit dtypes only) and an EPYC with
AVX512-BF16 and without AMX. A row's bits do not depend on the other sequences of its launch; `batch_invariant` changes
nothing here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference_sampling
from .cpu_cache import paged_attention as paged_attention
from .cpu_cache import rope_and_cache as rope_and_cache
from .quantised import QuantisedWeight, Weight
from .reference import FEW_ROWS
from .reference import advance as advance
from .reference import count_prompt as count_prompt
from .reference import draft as draft
from .reference import store_row as store_row

_AMX = torch.cpu._is_amx_tile_supported()
_AVX512_BF16 = torch.cpu._is_avx512_bf16_supported() and not _AMX

# Up to this many rows `linear` computes weight @ x^T, where that streams the weights faster than x @ weight^T. Without
# AMX it would take 2.2 times as long in bfloat16; in float32 it takes 0.7 of the time up to 4 rows.
if _AMX:
    TRANSPOSED_ROWS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 0}
else:
    TRANSPOSED_ROWS = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 4}
# PyTorch computes float32 products with MKL, which is fast on Intel's CPUs only. oneDNN, which computes the 16-bit
# ones, takes 0.45 to 0.65 of MKL's time on the EPYC, for 5 rows as for 2048.
ONEDNN_FLOAT32 = _AVX512_BF16 and torch.backends.mkldnn.is_available()
DENSE_NUMBERS = 1 << 22  # of a quantised weight that are in memory as float32 at a time
INVARIANT_ROWS = FEW_ROWS
# Whether the bits of a row may depend on how many rows a launch of more than INVARIANT_ROWS has. They do not on the
# EPYC, for 17 to 2048 rows of 7 to 14336 numbers on 1 to 7 threads; other CPUs have not been tested.
ROW_COUNT_CHANGES_BITS = not _AVX512_BF16
# The settings with which a stage of sampling changes nothing; so does any top_k below 0.
NEUTRAL = {
    "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1,
    "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
}  # fmt: skip
# Those that use how often a token was generated.
COUNTING = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """`reference.embed`."""
    return F.embedding(token_ids, table)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    if x.numel() <= FEW_ROWS * x.shape[-1]:
        return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
    # The same with fewer temporaries: prompts of 4 x 128 tokens take 1.08 of the time with F.rms_norm.
    wide = x.to(torch.float32, copy=True)
    mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return wide.mul_(mean.add_(eps).rsqrt_()).to(x.dtype).mul_(weight)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, batch_invariant: bool = False) -> Tensor:
    """`reference.linear`. The number of rows and the dtype decide how it is computed."""
    if isinstance(weight, QuantisedWeight):
        return _quantised(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    transposed = rows <= TRANSPOSED_ROWS[x.dtype]
    if x.dtype == torch.float32 and not transposed:
        return _onednn(x, weight, bias) if ONEDNN_FLOAT32 else F.linear(x, weight, bias)
    # A 16-bit row alone would be a matrix-vector product, which rounds differently. Computed twice, it is bit-identical
    # alone and in a batch.
    if rows == 1:
        x = torch.stack((x, x))
    if transposed:
        y = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous().view(*x.shape[:-1], len(weight))
        y = y if bias is None else y + bias
    else:
        y = F.linear(x, weight, bias)
    return y[0] if rows == 1 else y


def _quantised(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """The product in float32, with some rows of the weight at a time, and rounded once."""
    wide = x.float()
    step = max(DENSE_NUMBERS // weight.shape[1], 1)
    y = torch.cat(
        [linear(wide, weight.rows(first, first + step).dense()) for first in range(0, weight.shape[0], step)], -1
    )
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _onednn(x: Tensor, weight: Weight, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(x @ weight^T + bias) of float32."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


def linear_add(
    x: Tensor, weight: Weight, residual: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """`reference.linear_add`."""
    return linear(x, weight, bias).add_(residual)


def swiglu(gate_up: Tensor) -> Tensor:
    """`reference.swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rms_norm_linear(
    x: Tensor, norm: Tensor, eps: float, weight: Weight, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """`reference.rms_norm_linear`."""
    return linear(rms_norm(x, norm, eps), weight, bias)


def rms_norm_swiglu(
    x: Tensor, norm: Tensor, eps: float, weight: Weight, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """`reference.rms_norm_swiglu`."""
    h = rms_norm(x, norm, eps)
    rows = h.numel() // h.shape[-1]
    if ONEDNN_FLOAT32 and isinstance(weight, Tensor) and h.dtype == torch.float32 and rows > TRANSPOSED_ROWS[h.dtype]:
        # silu as part of the product. F.silu rounds the last numbers of each thread's share differently in float32, and
        # the number of rows decides where a share ends.
        gate_weight, up_weight = weight.chunk(2)
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        return _onednn(h, gate_weight, gate_bias, "swish").mul_(linear(h, up_weight, up_bias))
    gate, up = linear(h, weight, bias).chunk(2, dim=-1)
    # `swiglu` in place: allocating memory takes a CPU longer than the arithmetic.
    return F.silu(gate, inplace=True).mul_(up)


def rms_norm_qkv_rope_cache(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """`reference.rms_norm_qkv_rope_cache`."""
    qkv = linear(rms_norm(x, norm, eps), weight, bias)
    return rope_and_cache(qkv, inv_freq, k_cache, v_cache, block_table, seq_lens, positions)


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    typical_p: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    prompt_counts: Tensor | None = None,
    output_counts: Tensor | None = None,
    logit_bias: Tensor | None = None,
    allowed: Tensor | None = None,
    drafts: Tensor | None = None,
    seed: Tensor,
    stream: Tensor,
    position: Tensor,
    few_candidates: bool = False,
) -> tuple[Tensor, Tensor]:
    """`reference.sample`, row by row: the vectors of one row stay in a CPU's caches.

    Four rows of 49152 tokens at once take twice as long as one by one.
    """
    settings: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "seed": seed, "stream": stream, "position": position,
    }  # fmt: skip
    tables = {
        "prompt_counts": prompt_counts, "output_counts": output_counts, "logit_bias": logit_bias, "allowed": allowed,
    }  # fmt: skip
    results = []
    rows_of_each = 1 if drafts is None else drafts.shape[1]
    for row in range(len(logits)):
        sequence, draft = divmod(row, rows_of_each)
        own: dict[str, Any] = {name: None if x is None else x[row : row + 1] for name, x in settings.items()}
        own |= {name: None if x is None else x[sequence : sequence + 1] for name, x in tables.items()}
        # A stage whose setting changes nothing is turned off: over a whole vocabulary it takes milliseconds.
        for name, neutral in NEUTRAL.items():
            setting = own[name]
            if setting is not None and bool(setting <= 0 if name == "top_k" else setting == neutral):
                own[name] = None
        if (
            drafts is not None
            and draft
            and output_counts is not None
            and any(own[name] is not None for name in COUNTING)
        ):
            counted = drafts[sequence, None, 1 : draft + 1]
            own["output_counts"] = own["output_counts"].scatter_add(1, counted, torch.ones_like(counted).int())
        results.append(reference_sampling.sample(logits[row : row + 1], **own))
    tokens, logprobs = zip(*results, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)
