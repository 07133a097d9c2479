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
from .reference import FEW_ROWS
from .reference import advance as advance

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
# Whether the bits of a row may depend on how many rows a launch of more than FEW_ROWS rows has. They do not on the
# EPYC, for 17 to 2048 rows of 7 to 14336 numbers on 1 to 7 threads; other CPUs have not been tested.
ROW_COUNT_CHANGES_BITS = not _AVX512_BF16
# Attention processes a chunk in blocks of this many tokens. A causal block also computes the scores that its mask
# hides: half of all scores of 512 tokens in one block, a quarter in blocks of 256. Smaller blocks compute fewer of
# them, but more slowly: from 768 query rows on (256 tokens of 3 heads, say) PyTorch uses its largest tiles.
QUERY_BLOCK = 256
# The settings with which a stage of sampling changes nothing; so does any top_k below 0.
NEUTRAL = {
    "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1,
    "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
}  # fmt: skip


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False) -> Tensor:
    """`reference.linear`. The number of rows and the dtype decide how it is computed."""
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


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(x @ weight^T + bias) of float32."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


def linear_add(
    x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """`reference.linear_add`."""
    return linear(x, weight, bias).add_(residual)


def swiglu(gate_up: Tensor) -> Tensor:
    """`reference.swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rms_norm_linear(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """`reference.rms_norm_linear`."""
    return linear(rms_norm(x, norm, eps), weight, bias)


def rms_norm_swiglu(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """`reference.rms_norm_swiglu`."""
    h = rms_norm(x, norm, eps)
    rows = h.numel() // h.shape[-1]
    if ONEDNN_FLOAT32 and h.dtype == torch.float32 and rows > TRANSPOSED_ROWS[h.dtype]:
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
    weight: Tensor,
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


def rope_and_cache(
    qkv: Tensor,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """`reference.rope_and_cache`."""
    sequences, kv_heads, page_size, dim = block_table.shape[0], *k_cache.shape[1:]
    tokens, heads = qkv.shape[0] // sequences, qkv.shape[1] // dim - 2 * kv_heads
    x = qkv.view(sequences, tokens, -1, dim)
    cos, sin = _cos_sin(seq_lens, positions, tokens, inv_freq, qkv.dtype)
    qk, v = _rotate(x[:, :, : heads + kv_heads], cos, sin), x[:, :, heads + kv_heads :]
    k = qk[:, :, heads:]
    contexts = _contexts(block_table, seq_lens, page_size)
    if tokens == 1:
        # All sequences at once: 16 take 76 us, one by one they take 190 (the demo model's shapes on the EPYC).
        live = [
            (b, pages[-1], (length - 1) % page_size)
            for b, (length, pages) in enumerate(contexts)
            if 0 < length <= len(pages) * page_size
        ]
        if len(live) == 1:  # needs no tensor of indices
            b, page, slot = live[0]
        else:
            b, page, slot = torch.tensor(live, dtype=torch.int64).view(-1, 3).T
        k_cache[page, :, slot], v_cache[page, :, slot] = k[b, 0], v[b, 0]
        if idle := [b for b, (length, _) in enumerate(contexts) if not length]:
            qk[idle] = 0
        return qk[:, :, :heads].flatten(0, 1)
    for b, (length, pages) in enumerate(contexts):
        padding = max(tokens - length, 0)
        if padding:
            qk[b, :padding] = 0
        if length:
            start = max(length - tokens, 0)
            _write(k_cache, pages, start, k[b, padding:])
            _write(v_cache, pages, start, v[b, padding:])
    return qk[:, :, :heads].flatten(0, 1)


def _cos_sin(
    seq_lens: Tensor, positions: Tensor | None, tokens: int, inv_freq: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The tables of `_rotate`: cosines and signed sines [B, T, D] of each token's angles.

    The sign of the sines' first half is the minus sign of the rotation.
    """
    if positions is None:
        positions = seq_lens[:, None] + torch.arange(-tokens, 0, dtype=torch.int32)
    frequencies = torch.cat((-inv_freq, inv_freq), dim=-1)[:, None]
    angles = positions.view(len(seq_lens), tokens, 1) * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (x with the halves of each head swapped) * signed sine. x [B, T, heads, D] -> like x."""
    return x.roll(x.shape[-1] // 2, dims=-1).mul_(sin.unsqueeze(-2)).add_(x * cos.unsqueeze(-2))


def _contexts(block_table: Tensor, seq_lens: Tensor, page_size: int) -> list[tuple[int, list[int]]]:
    """For each sequence its context length and the pages that hold it."""
    lengths = seq_lens.tolist()
    table = block_table[:, : -(-max(lengths) // page_size)].tolist()
    return [(length, pages[: -(-length // page_size)]) for length, pages in zip(lengths, table, strict=True)]


def _contiguous(pages: list[int]) -> bool:
    return pages == list(range(pages[0], pages[-1] + 1))


def _write(cache: Tensor, pages: list[int], start: int, rows: Tensor) -> None:
    """Writes rows [T, K, D] to a sequence's positions from `start` on, as far as it has pages. cache [P, K, S, D].

    Contiguous pages in a cache that is contiguous for each head are written by one copy, since one per page is slower.
    """
    size = cache.shape[2]
    pages = pages[start // size : (start + len(rows) - 1) // size + 1]
    if len(pages) > 1 and _contiguous(pages) and cache.stride(0) == size * cache.stride(2):
        targets = [cache[pages[0] : pages[-1] + 1].transpose(0, 1).flatten(1, 2)]
    else:
        targets = [cache[page] for page in pages]
    first = start % size
    for target in targets:
        fitting = rows[: target.shape[1] - first]
        target[:, first : first + len(fitting)] = fitting.transpose(0, 1)
        rows, first = rows[len(fitting) :], 0


def _read(cache: Tensor, pages: list[int], length: int, page_size: int) -> Tensor:
    """The context on these pages. cache [K, P * S, D] -> [K, L, D]; a view where the pages are contiguous."""
    if _contiguous(pages):
        first = pages[0] * page_size
        return cache[:, first : first + length]
    return cache.unflatten(1, (-1, page_size))[:, pages].flatten(1, 2)[:, :length]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """`reference.paged_attention`, computed by PyTorch's flash attention for a CPU."""
    sequences, kv_heads, page_size, dim = block_table.shape[0], *k_cache.shape[1:]
    tokens = len(q) // sequences
    k_cache, v_cache = (cache.transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache))
    out = q.new_empty(q.shape)
    parts = zip(q.split(tokens), out.split(tokens), _contexts(block_table, seq_lens, page_size), strict=True)
    for queries, result, (length, pages) in parts:
        if length < tokens:
            result[: tokens - length] = 0
        if length == 0:
            continue
        k, v = (_read(cache, pages, length, page_size) for cache in (k_cache, v_cache))
        if tokens == 1:
            # The heads of a group share their keys, so they are passed as query tokens and no key is repeated.
            grouped = queries.view(1, kv_heads, -1, dim)
            result[:] = F.scaled_dot_product_attention(grouped, k[None], v[None], scale=scale).view(queries.shape)
        else:
            _attention(queries[-length:], k, v, scale, result[-length:])
    return out.view(len(q), -1)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """Causal attention of a sequence's last T tokens over its L. q [T, H, D], k and v [K, L, D]; writes out, like q."""
    tokens, past = q.shape[0], k.shape[1] - q.shape[0]
    q, out = q.transpose(0, 1), out.transpose(0, 1)
    for first in range(0, tokens, QUERY_BLOCK):
        block = slice(first, first + QUERY_BLOCK)
        out[:, block] = _attention_of_block(q[:, block], k, v, past + first, scale)


def _attention_of_block(q: Tensor, k: Tensor, v: Tensor, past: int, scale: float) -> Tensor:
    """Attention of q [H, T, D], whose first token is at position `past`. k and v [K, L, D] -> [H, T, D].

    The tokens before the block need no mask, so they are a call of their own. The softmax over both parts is the mean
    of the softmax over each, weighted by their sums of exponentials; it is computed and returned in float32.
    """
    tokens, kv_heads = q.shape[1], k.shape[0]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    grouped = q.unflatten(0, (kv_heads, -1))
    block_k, block_v = (x[:, None, past : past + tokens].expand(-1, grouped.shape[1], -1, -1) for x in (k, v))
    of_block, block_sum = flash(grouped, block_k, block_v, is_causal=True, scale=scale)
    if past == 0:
        return of_block.flatten(0, 1)
    # As for a single token, the heads of a group are passed as query tokens.
    of_past, past_sum = flash(grouped.flatten(1, 2)[None], k[None, :, :past], v[None, :, :past], scale=scale)
    share = (past_sum.view(block_sum.shape) - block_sum).sigmoid().unsqueeze(-1)
    return of_block.float().lerp_(of_past.view(of_block.shape).float(), share).flatten(0, 1)


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
    seed: Tensor,
    stream: Tensor,
    position: Tensor,
    few_candidates: bool = False,
) -> tuple[Tensor, Tensor]:
    """`reference.sample`, row by row: the vectors of one row stay in a CPU's caches.

    Four rows of 49152 tokens at once take twice as long as one by one.
    """
    arguments: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "prompt_counts": prompt_counts, "output_counts": output_counts,
        "logit_bias": logit_bias, "allowed": allowed, "seed": seed, "stream": stream, "position": position,
    }  # fmt: skip
    results = []
    for row in range(len(logits)):
        own: dict[str, Any] = {name: None if x is None else x[row : row + 1] for name, x in arguments.items()}
        # A stage whose setting changes nothing is turned off: over a whole vocabulary it takes milliseconds.
        for name, neutral in NEUTRAL.items():
            setting = own[name]
            if setting is not None and bool(setting <= 0 if name == "top_k" else setting == neutral):
                own[name] = None
        results.append(reference_sampling.sample(logits[row : row + 1], **own))
    tokens, logprobs = zip(*results, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)
