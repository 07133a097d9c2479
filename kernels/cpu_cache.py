"""The CPU backend's ops over the paged cache: rotary embedding with the cache write, and attention."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Attention processes a chunk in blocks of this many tokens. A causal block also computes the scores that its mask
# hides: half of all scores of 512 tokens in one block, a quarter in blocks of 256. Smaller blocks compute fewer of
# them, but more slowly: from 768 query rows on (256 tokens of 3 heads, say) PyTorch uses its largest tiles.
QUERY_BLOCK = 256


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
            b, page, slot = torch.tensor(live, dtype=torch.int64, device="cpu").view(-1, 3).T
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


class _RopeTables(NamedTuple):
    """The tables of a launch, and copies of the arguments that they were computed from."""

    key: tuple[int, bool, torch.dtype, torch.dtype]
    positions: Tensor
    inv_freq: Tensor
    cos: Tensor
    sin: Tensor


def _cos_sin(
    seq_lens: Tensor, positions: Tensor | None, tokens: int, inv_freq: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The tables of `_rotate`: cosines and signed sines [B, T, D] of each token's angles.

    The sign of the sines' first half is the minus sign of the rotation. All layers of a launch pass the same
    `seq_lens`, so the tables are kept on that tensor, and are used again if no argument has changed. To check that
    takes 2 us, to compute them 22 us for one row: 3% of a decode step of the demo model.
    """
    given = seq_lens if positions is None else positions
    key = tokens, positions is None, given.dtype, dtype
    kept: _RopeTables | None = getattr(seq_lens, "rope_tables", None)
    if kept and kept.key == key and torch.equal(kept.positions, given) and torch.equal(kept.inv_freq, inv_freq):
        return kept.cos, kept.sin
    if positions is None:
        positions = seq_lens[:, None] + torch.arange(-tokens, 0, dtype=torch.int32, device="cpu")
    frequencies = torch.cat((-inv_freq, inv_freq), dim=-1)[:, None]
    angles = positions.view(len(seq_lens), tokens, 1) * frequencies
    tables = _RopeTables(key, given.clone(), inv_freq.clone(), angles.cos().to(dtype), angles.sin().to(dtype))
    seq_lens.rope_tables = tables  # type: ignore[attr-defined]
    return tables.cos, tables.sin


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (x with the halves of each head swapped) * signed sine. x [B, T, heads, D] -> like x."""
    return x.roll(x.shape[-1] // 2, dims=-1).mul_(sin.unsqueeze(-2)).add_(x * cos.unsqueeze(-2))


def _contexts(block_table: Tensor, seq_lens: Tensor, page_size: int) -> list[tuple[int, list[int]]]:
    """For each sequence its context length and its pages."""
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


def _keys_and_values(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each sequence its context length L, and its keys and values [K, L, D]."""
    page_size = k_cache.shape[2]
    k_cache, v_cache = (cache.transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache))
    for length, pages in _contexts(block_table, seq_lens, page_size):
        yield length, _read(k_cache, pages, length, page_size), _read(v_cache, pages, length, page_size)


def _read(cache: Tensor, pages: list[int], length: int, page_size: int) -> Tensor:
    """The context on these pages. cache [K, P * S, D] -> [K, L, D]; a view where the pages are contiguous."""
    if not pages:
        return cache[:, :0]
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
    decode_step: bool = False,
) -> Tensor:
    """`reference.paged_attention`, computed by PyTorch's flash attention for a CPU."""
    sequences, kv_heads, dim = block_table.shape[0], k_cache.shape[1], k_cache.shape[3]
    tokens = len(q) // sequences
    contexts = _keys_and_values(k_cache, v_cache, block_table, seq_lens)
    if tokens == 1:
        rows = [
            _attention_of_token(query, k, v, scale) if length else torch.zeros_like(query)
            for query, (length, k, v) in zip(q.view(sequences, kv_heads, -1, dim).split(1), contexts, strict=True)
        ]
        return torch.cat(rows).view(sequences, -1)
    out = q.new_empty(q.shape)
    for query, result, (length, k, v) in zip(q.split(tokens), out.split(tokens), contexts, strict=True):
        if length < tokens:
            result[: tokens - length] = 0
        if length:
            _attention(query[-length:], k, v, scale, result[-length:])
    return out.view(len(q), -1)


def _attention_of_token(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one token over its sequence. q [1, K, H/K, D], k and v [K, L, D] -> like q.

    The heads of a group share their keys, so they are passed as query tokens and no key is repeated.
    """
    return F.scaled_dot_product_attention(q, k[None], v[None], scale=scale)


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
