"""Every op in the plainest PyTorch: its meaning, and the backend of a machine without an accelerator.

The order of rounding is part of an op's meaning and follows InternLM3's published implementation: what is computed in
float32 and what is cast to the activation dtype, and when, is written out here.

Shapes use one letter per axis:
    R rows (tokens of one launch)       C hidden size            I intermediate size     V vocabulary
    B sequences, T tokens of each       H query heads            K key/value heads       D head dimension
    P pages, S tokens in a page         N pages a sequence may hold

The paged cache of one layer is two tensors [P, K, S, D]. `block_table` [B, N] int32 names the pages of each sequence
in order; `seq_lens` [B] int32 counts the tokens a sequence holds *including* those of this launch, so query token t
of sequence b stands at position seq_lens[b] - T + t. Sequences with seq_lens[b] == 0 are idle: nothing is read or
written for them.

`batch_invariant` asks a linear op to give one row the very bits it has among up to 16. It changes nothing here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampling_reference import sample as sample

# Up to this many rows a linear layer streams its weights once, whatever the number of rows.
SKINNY_ROWS = 16
# What a CPU is fast at was measured at the stand-in's shapes on two: a Xeon with AMX (2026-11-23, 16 bits alone) and an
# EPYC with AVX512-BF16 and without AMX (2026-11-25).
_AMX = torch.cpu._is_amx_tile_supported()
_AVX512_BF16 = torch.cpu._is_avx512_bf16_supported() and not _AMX
# Up to so many rows it computes weight @ x^T, where that streams the weights faster than x @ weight^T does: without AMX
# it takes 2.2 times as long in bfloat16, and in float32 0.7 of the time up to 4 rows.
if _AMX:
    TRANSPOSED_ROWS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 0}
else:
    TRANSPOSED_ROWS = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 4}
# PyTorch gives float32 products to MKL, which is fast on Intel's CPUs alone. oneDNN, which has the 16-bit ones, takes
# 0.45 to 0.65 of its time on the EPYC, for 5 rows as for 2048.
ONEDNN_FLOAT32 = _AVX512_BF16 and torch.backends.mkldnn.is_available()
# Whether, of more than SKINNY_ROWS rows, each has the same bits however many there are. So it is on the EPYC, for 17 to
# 2048 rows of 7 to 14336 numbers on 1 to 7 threads; elsewhere nobody has looked.
ROWS_ALIKE = _AVX512_BF16
# So many tokens of a chunk go through a CPU's attention together. It computes what its mask hides too: of 512 tokens in
# one go that is half of all scores, in blocks of 256 a quarter. Smaller blocks compute less of it, and slower: with 768
# rows of queries and more (256 tokens of 3 heads, say) PyTorch takes the largest tiles that it has.
QUERY_BLOCK = 256


def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """Rows of the embedding table. token_ids [R] int64, table [V, C] -> [R, C]."""
    return F.embedding(token_ids, table)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) in float32, cast to x's dtype, then times weight in that dtype. [..., C] -> [..., C].

    Zhang and Sennrich 2019 (RMSNorm). Casting before the weight multiplies is InternLM3's order; F.rms_norm with a
    weight would multiply in float32.
    """
    if x.numel() <= SKINNY_ROWS * x.shape[-1]:
        return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
    # The same with fewer temporaries: prompts of 4 x 128 tokens take 1.08 of the time with F.rms_norm.
    wide = x.to(torch.float32, copy=True)
    mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return wide.mul_(mean.add_(eps).rsqrt_()).to(x.dtype).mul_(weight)


def _by_onednn(x: Tensor) -> bool:
    few = x.numel() <= TRANSPOSED_ROWS[x.dtype] * x.shape[-1]
    return ONEDNN_FLOAT32 and x.is_cpu and x.dtype == torch.float32 and not few


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False) -> Tensor:
    """x @ weight^T (+ bias), accumulated in float32. x [..., C], weight [O, C], bias [O] -> [..., O].

    A CPU goes the way that is fastest there (`TRANSPOSED_ROWS`, `ONEDNN_FLOAT32`). In 16 bits one row goes as two, so
    that it has the same bits whatever rows ride along: alone it would be a product of another kind.
    """
    if _by_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    rows = x.numel() // x.shape[-1]
    transposed = rows <= TRANSPOSED_ROWS[x.dtype]
    if not x.is_cpu or (x.dtype == torch.float32 and not transposed):
        return F.linear(x, weight, bias)
    if rows == 1:
        x = torch.stack((x, x))
    if transposed:
        y = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous().view(*x.shape[:-1], len(weight))
        y = y if bias is None else y + bias
    else:
        y = F.linear(x, weight, bias)
    return y[0] if rows == 1 else y


def linear_add(
    x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """residual + linear(x), the product rounded to the dtype before the sum. [R, C], [O, C], [R, O] -> [R, O]."""
    return linear(x, weight, bias).add_(residual)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, silu rounded to the dtype first. gate_up [..., 2I], gate in front -> [..., I]. Shazeer 2020."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rms_norm_linear(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """linear(rms_norm(x)). x [R, C], norm [C], weight [O, C] -> [R, O]."""
    return linear(rms_norm(x, norm, eps), weight, bias)


def rms_norm_swiglu(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """swiglu(linear(rms_norm(x))), the first half of an MLP. weight [2I, C], gate rows in front -> [R, I]."""
    h = rms_norm(x, norm, eps)
    if _by_onednn(h):
        # With silu in the product. PyTorch's own rounds the last numbers of a thread's share in another way, in
        # float32 alone, and where a share ends the number of rows decides.
        of_gate, of_up = zip(weight.chunk(2), (None, None) if bias is None else bias.chunk(2), strict=True)
        gate = torch.ops.mkldnn._linear_pointwise(h, *of_gate, "swish", [], "")
        return gate.mul_(linear(h, *of_up))
    gate, up = linear(h, weight, bias).chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)  # `swiglu` in place: fresh memory takes a CPU longer than the arithmetic


def _rope_tables(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tables for `_rotary`: cosines and signed sines of position * frequency.

    positions [...] int, inv_freq [..., D/2] float32 -> two [..., D] of `dtype`. The angle is the float32 product; its
    cosine and sine are exact to float32 however large it is, and then cast. The sine's first half carries rotate_half's
    minus sign, which is its frequencies' here.
    """
    angles = positions.unsqueeze(-1) * torch.cat((-inv_freq, inv_freq), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


_last_tables: tuple[tuple[object, ...], Tensor, Tensor, tuple[Tensor, Tensor]] | None = None


def _launch_tables(
    seq_lens: Tensor, positions: Tensor | None, tokens: int, inv_freq: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`_rope_tables` [B, T, D] of a launch, kept until another asks for others: all its layers ask for the same.

    To see that they are the same takes a CPU 2 us; to compute them for one row 22, for 512 rows 140.
    """
    global _last_tables
    places = seq_lens if positions is None else positions
    asked = tokens, positions is None, places.dtype, dtype
    if places.is_cpu and _last_tables is not None:
        last_asked, last_places, last_inv_freq, tables = _last_tables
        if last_asked == asked and torch.equal(last_places, places) and torch.equal(last_inv_freq, inv_freq):
            return tables
    if positions is None:
        positions = seq_lens[:, None] + torch.arange(-tokens, 0, dtype=torch.int32, device=seq_lens.device)
    tables = _rope_tables(positions.view(len(seq_lens), tokens), inv_freq[:, None], dtype)
    if places.is_cpu:
        _last_tables = asked, places.clone(), inv_freq.clone(), tables
    return tables


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-rotation (NeoX layout) of every head: x * cos + rotate_half(x) * sin, each product rounded to x's dtype.

    x [..., T, heads, D], tables [..., T, D] from `_rope_tables` -> like x. Su et al. 2021.
    """
    # Swapped halves times the signed sine are rotate_half(x) * sin.
    return x.roll(x.shape[-1] // 2, dims=-1).mul_(sin.unsqueeze(-2)).add_(x * cos.unsqueeze(-2))


def _attention_of_one(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one token over all tokens of its sequence. q [1, K, H/K, D], k and v [K, L, D] -> like q.

    The heads of a group share their keys, so they stand as query tokens and nothing is repeated.
    """
    return F.scaled_dot_product_attention(q, k[None], v[None], scale=scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """Causal attention of one sequence's last T tokens over all its L. q [T, H, D], k and v [K, L, D], `out` like q.

    Query head h reads key/value head h // (H / K). Scores and softmax in float32. Vaswani et al. 2017, Ainslie et al.
    2023 (grouped queries).
    """
    tokens, length = q.shape[0], k.shape[1]
    past, queries, out = length - tokens, q.transpose(0, 1), out.transpose(0, 1)
    if q.is_cpu:
        for first in range(0, tokens, QUERY_BLOCK):
            block = slice(first, first + QUERY_BLOCK)
            out[:, block] = _joined(queries[:, block], k, v, past + first, scale)
        return
    mask = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril(past) if past else None
    out[:] = F.scaled_dot_product_attention(
        queries[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )[0]


def _joined(q: Tensor, k: Tensor, v: Tensor, past: int, scale: float) -> Tensor:
    """Attention of q [H, T, D], whose tokens stand behind `past` others; k and v [K, L, D] -> [H, T, D], in float32
    where there is a past. No mask over that.

    softmax over both is the mean of the softmax over each, weighted by their sums of exponentials, in float32.
    """
    tokens, kv_heads = q.shape[1], k.shape[0]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    grouped = q.unflatten(0, (kv_heads, -1))
    own_k, own_v = (x[:, None, past : past + tokens].expand(-1, grouped.shape[1], -1, -1) for x in (k, v))
    of_own, own_sum = flash(grouped, own_k, own_v, is_causal=True, scale=scale)
    if past == 0:
        return of_own.flatten(0, 1)
    # As in one token's attention, the heads of a group stand as query tokens; among themselves the tokens have a mask.
    of_past, past_sum = flash(grouped.flatten(1, 2)[None], k[None, :, :past], v[None, :, :past], scale=scale)
    share = (past_sum.view(own_sum.shape) - own_sum).sigmoid().unsqueeze(-1)
    return of_own.float().lerp_(of_past.view(of_own.shape).float(), share).flatten(0, 1)


def _on_host(block_table: Tensor, seq_lens: Tensor, page_size: int) -> list[tuple[int, list[int]]]:
    """For each sequence its length and the pages that it fills."""
    lengths = seq_lens.tolist()
    table = block_table[:, : -(-max(lengths) // page_size)].tolist()
    return [(length, pages[: -(-length // page_size)]) for length, pages in zip(lengths, table, strict=True)]


def _in_a_run(pages: list[int]) -> bool:
    return pages == list(range(pages[0], pages[-1] + 1))


def _held(cache: Tensor, pages: list[int], length: int, page_size: int) -> Tensor:
    """What a sequence holds on its pages. cache [K, P * S, D] -> [K, L, D]; a view where they lie in a run."""
    if _in_a_run(pages):
        first = pages[0] * page_size
        return cache[:, first : first + length]
    return cache.unflatten(1, (-1, page_size))[:, pages].flatten(1, 2)[:, :length]


def _write(cache: Tensor, pages: list[int], start: int, rows: Tensor) -> None:
    """Rows [T, K, D] into a sequence's places from `start` on, as far as it has pages. cache [P, K, S, D].

    In one piece where the pages lie in a run, of which each head's part does: a copy for each page takes a CPU longer.
    """
    size = cache.shape[2]
    pages = pages[start // size : (start + len(rows) - 1) // size + 1]
    if len(pages) > 1 and _in_a_run(pages) and cache.stride(0) == size * cache.stride(2):
        pieces = [cache[pages[0] : pages[-1] + 1].transpose(0, 1).flatten(1, 2)]
    else:
        pieces = [cache[page] for page in pages]
    first = start % size
    for piece in pieces:
        fitting = rows[: piece.shape[1] - first]
        piece[:, first : first + len(fitting)] = fitting.transpose(0, 1)
        rows, first = rows[len(fitting) :], 0


def rope_and_cache(
    qkv: Tensor,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """Rotate q and k, write k and v into their pages, return q.

    qkv [B*T, (H + 2K) * D], q heads in front, then k, then v; inv_freq [B, D/2] float32, a row per sequence (dynamic
    NTK fixes a sequence's frequencies when it begins) -> q [B*T, H, D]. A row is turned by its place in its sequence,
    or by `positions` [B*T] int32 where given. Rows at negative places, all rows of an idle sequence among them, write
    nothing; their q is zero.
    """
    sequences, kv_heads, page_size, dim = block_table.shape[0], *k_cache.shape[1:]
    tokens, heads = qkv.shape[0] // sequences, qkv.shape[1] // dim - 2 * kv_heads
    x = qkv.view(sequences, tokens, -1, dim)
    cos, sin = _launch_tables(seq_lens, positions, tokens, inv_freq, qkv.dtype)
    qk, v = _rotary(x[:, :, : heads + kv_heads], cos, sin), x[:, :, heads + kv_heads :]
    k = qk[:, :, heads:]
    held = _on_host(block_table, seq_lens, page_size)
    if tokens == 1:
        # A decode step, all rows at once: 16 take 76 us and not 190 (the stand-in's shapes, the same EPYC). One
        # row needs no indices.
        live = [
            (b, pages[-1], (length - 1) % page_size)
            for b, (length, pages) in enumerate(held)
            if 0 < length <= len(pages) * page_size
        ]
        if len(live) == 1:
            b, page, slot = live[0]
        else:
            b, page, slot = torch.tensor(live, dtype=torch.int64, device=qkv.device).view(-1, 3).T
        k_cache[page, :, slot], v_cache[page, :, slot] = k[b, 0], v[b, 0]
        if idle := [b for b, (length, _) in enumerate(held) if not length]:
            qk[idle] = 0
        return qk[:, :, :heads].flatten(0, 1)
    for b, (length, pages) in enumerate(held):
        padding = max(tokens - length, 0)
        if padding:
            qk[b, :padding] = 0
        if length:
            start = max(length - tokens, 0)
            _write(k_cache, pages, start, k[b, padding:])
            _write(v_cache, pages, start, v[b, padding:])
    return qk[:, :, :heads].flatten(0, 1)


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
    """rope_and_cache(linear(rms_norm(x))), a block up to its attention. weight [(H + 2K) * D, C] -> q [R, H, D]."""
    qkv = linear(rms_norm(x, norm, eps), weight, bias)
    return rope_and_cache(qkv, inv_freq, k_cache, v_cache, block_table, seq_lens, positions)


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
    """Causal attention of each sequence's last T tokens over its pages. q [B*T, H, D] -> [B*T, H*D], idle rows zero."""
    sequences, kv_heads, page_size, dim = block_table.shape[0], *k_cache.shape[1:]
    tokens = len(q) // sequences
    k_cache, v_cache = (cache.transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache))
    held = (
        (length, [_held(cache, pages, length, page_size) for cache in (k_cache, v_cache) if length])
        for length, pages in _on_host(block_table, seq_lens, page_size)
    )
    if tokens == 1:
        rows = [
            _attention_of_one(mine, kv[0], kv[1], scale) if length else torch.zeros_like(mine)
            for mine, (length, kv) in zip(q.view(sequences, kv_heads, -1, dim).split(1), held, strict=True)
        ]
        return torch.cat(rows).view(sequences, -1)
    out = q.new_empty(q.shape)
    for mine, seen, (length, kv) in zip(q.split(tokens), out.split(tokens), held, strict=True):
        if length < tokens:
            seen[: tokens - length] = 0
        if length:
            _attention(mine[-length:], kv[0], kv[1], scale, seen[-length:])
    return out.view(len(q), -1)


def advance(
    sampled: Tensor,
    logprob: Tensor,
    *,
    token: Tensor,
    seq_lens: Tensor,
    max_len: Tensor,
    end_mask: Tensor,
    report: Tensor,
    output_counts: Tensor,
    min_len: Tensor,
    permitted: Tensor,
    allowed: Tensor,
) -> None:
    """End a decode step, in place: write the tokens that `sample` returned into the state of the next step.

    B rows, each one sequence or idle (seq_lens 0). V: vocabulary size, W = ceil(V / 32) words of a bit mask, in which
    token i is bit i % 32 of word i // 32.

        sampled        [B] int64       the next token of each row
        logprob        [B] float32     its log-probability
        token          [B] int64       becomes `sampled`
        seq_lens       [B] int32       grows by one, or becomes 0 if the row ends
        max_len        [B] int32       a row ends when it has this many tokens
        end_mask       [B, W] int32    tokens that end a row
        report         [B, 3] int32    for the host: the token; why the row ended; the bits of its log-probability
        output_counts  [B, V] int32    how often each token was generated: one more for this one
        min_len        [B] int32       a row may end once it has this many tokens
        permitted      [B, W] int32    tokens that may be sampled then
        allowed        [B, W] int32    tokens that may be sampled now; becomes `permitted` at min_len

    Why a row ended: 0 it did not, 1 a token of `end_mask`, 2 `max_len`, 3 its log-probability is NaN: no token can be
    sampled from such logits. For an idle row only the reported token changes, to -1.
    """
    live = seq_lens > 0
    words = end_mask.gather(1, (sampled // 32)[:, None])[:, 0]
    length = seq_lens + 1
    end = torch.where((words >> (sampled % 32) & 1).bool(), 1, 2 * (length >= max_len))
    end = end.masked_fill(logprob.isnan(), 3)
    fresh = torch.stack((sampled.int(), end.int(), logprob.view(torch.int32)), 1)
    report.copy_(torch.where(live[:, None], fresh, report))
    report[:, 0].masked_fill_(~live, -1)
    token.copy_(torch.where(live, sampled, token))
    output_counts.scatter_add_(1, sampled[:, None], live.int()[:, None])
    allowed.copy_(torch.where((live & (length == min_len))[:, None], permitted, allowed))
    seq_lens.copy_(torch.where(live & (end == 0), length, 0))
