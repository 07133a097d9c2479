"""What every op means, in plain PyTorch. Both backends, `kernels.cpu` and `kernels.triton`, are tested against it.

It is written to be read, not to be fast. The order of rounding is part of an op's meaning and follows InternLM3's
published implementation, so casts are explicit: `.float()` where the arithmetic is float32, `.to(dtype)` where a result
is rounded to the activation dtype. Arithmetic between tensors of the activation dtype rounds once per operation.

Shapes use one letter per axis:
    R rows (tokens of one launch)       C hidden size            I intermediate size     V vocabulary size
    B sequences, T tokens of each       H query heads            K key/value heads       D head dimension
    P pages of the cache                S tokens per page        N pages per row of the block table

The paged cache of one layer is two tensors [P, K, S, D], one for keys and one for values. `block_table` [B, N] int32
holds the pages of each sequence in order: the token at position p is in slot p % S of page block_table[b, p // S].
`seq_lens` [B] int32 is each sequence's context length *including* the tokens of this launch, so token t of sequence b
is at position seq_lens[b] - T + t. A negative position is padding: nothing is read or written for it, and its result is
zero. A sequence with seq_lens[b] == 0 is idle: all of its tokens are padding. kernels/README.md has a drawing.

`batch_invariant` asks a linear op to make a row bit-identical alone and in any batch of up to INVARIANT_ROWS rows. The
reference rounds every row in the same way, and ignores it.

The weight of a linear op is a tensor of x's dtype or a `QuantisedWeight`, whose numbers are float32. For more than 64
rows a backend may round these to x's dtype.

`decode_step` states for attention of one token per sequence (T = 1) which inputs are older than the step: seq_lens, the
block table, and the keys and values of all tokens but the newest. It lets a GPU load them early, and changes no value.
Rows that share a block table, as those that verify drafts, read what others of them write: they are no decode step.

`sample` is in a second reference file, `reference_sampling.py`.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantised import QuantisedWeight, Weight
from .reference_sampling import sample as sample

# Launches of up to this many rows are bound by reading the weights, on every device.
FEW_ROWS = 16
# The most tokens of a match that `draft` compares.
LONGEST_MATCH = 32
# Every backend states up to how many rows `batch_invariant` holds, and whether the bits of a row may depend on the
# number of rows in launches of more.
INVARIANT_ROWS = FEW_ROWS
ROW_COUNT_CHANGES_BITS = True


def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """Rows of the embedding table. token_ids [R] int64, table [V, C] -> [R, C]."""
    return table[token_ids]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in float32, rounded, then times weight. x [..., C], weight [C] -> [..., C].

    Zhang and Sennrich 2019. Rounding before the weight multiplies is InternLM3's order.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def _wide(weight: Weight) -> Tensor:
    """A weight [O, C] in float32."""
    return weight.dense() if isinstance(weight, QuantisedWeight) else weight.float()


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, batch_invariant: bool = False) -> Tensor:
    """x @ weight^T (+ bias), accumulated in float32. x [..., C], weight [O, C], bias [O] -> [..., O]."""
    y = x.float() @ _wide(weight).mT
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, silu in float32, rounded. gate_up [..., 2I], the gate half first -> [..., I]. Shazeer 2020."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.float()).to(gate.dtype) * up


def linear_add(
    x: Tensor, weight: Weight, residual: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """residual + linear(x). x [R, C], weight [O, C], residual [R, O] -> [R, O]."""
    return residual + linear(x, weight, bias)


def rms_norm_linear(
    x: Tensor, norm: Tensor, eps: float, weight: Weight, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """linear(rms_norm(x)). x [R, C], norm [C], weight [O, C] -> [R, O]."""
    return linear(rms_norm(x, norm, eps), weight, bias)


def rms_norm_swiglu(
    x: Tensor, norm: Tensor, eps: float, weight: Weight, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """swiglu(linear(rms_norm(x))), the first half of an MLP. weight [2I, C], the gate rows first -> [R, I]."""
    return swiglu(linear(rms_norm(x, norm, eps), weight, bias))


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
    """rope_and_cache(linear(rms_norm(x))), a block up to its attention. weight [(H + 2K) * D, C] -> q [R, H, D]."""
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
    """Apply rotary embeddings to q and k, write k and v into their pages, return q [B*T, H, D].

    qkv [B*T, (H + 2K) * D]: the heads of q, then of k, then of v. inv_freq [B, D/2] float32: the frequencies of each
    sequence (dynamic NTK fixes them when a sequence begins). A token is rotated by its position in its sequence, or by
    `positions` [B*T] int32 where given. A token whose position exceeds the block table is not written.
    """
    B, N = block_table.shape
    _, K, S, D = k_cache.shape
    T, H = qkv.shape[0] // B, qkv.shape[1] // D - 2 * K
    q, k, v = qkv.view(B, T, H + 2 * K, D).split((H, K, K), dim=2)
    position = seq_lens[:, None] - T + torch.arange(T, dtype=torch.int64, device=qkv.device)
    angle = (position if positions is None else positions.view(B, T)).float()[:, :, None] * inv_freq[:, None, :]
    cos, sin = angle.cos().to(qkv.dtype), angle.sin().to(qkv.dtype)  # [B, T, D/2]
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    for b in range(B):
        for t in range(T):
            p = int(position[b, t])
            if p < 0:
                q[b, t] = 0
            elif p // S < N:
                page = block_table[b, p // S]
                k_cache[page, :, p % S] = k[b, t]
                v_cache[page, :, p % S] = v[b, t]
    return q.flatten(0, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-rotation (NeoX) layout. x [B, T, heads, D]; cos, sin [B, T, D/2]. Su et al. 2021."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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
    """softmax(scale * q k^T) v of each sequence's last T tokens over its context. q [B*T, H, D] -> [B*T, H * D].

    Causal: a token attends to the positions up to its own. Query head h reads key/value head h // (H / K). Scores and
    softmax are float32; the weights are rounded before they multiply the values. Vaswani et al. 2017, Ainslie et al.
    2023 (grouped queries), Kwon et al. 2023 (pages).
    """
    (B, N), S = block_table.shape, k_cache.shape[2]
    (rows, H, D), K = q.shape, k_cache.shape[1]
    T = rows // B
    out = torch.zeros_like(q)
    for b in range(B):
        length = min(int(seq_lens[b]), N * S)
        if length == 0:
            continue
        pages = block_table[b, : -(-length // S)].tolist()
        keys = torch.cat([k_cache[page] for page in pages], dim=1)[:, :length].float()  # [K, length, D]
        values = torch.cat([v_cache[page] for page in pages], dim=1)[:, :length].float()
        for t in range(T):
            seen = int(seq_lens[b]) - T + t + 1  # the positions 0 ... seen - 1
            if seen <= 0:
                continue
            query = q[b * T + t].view(K, H // K, D).float()
            scores = (query @ keys[:, :seen].mT) * scale  # [K, H / K, seen]
            weights = scores.softmax(dim=-1).to(q.dtype).float()
            out[b * T + t] = (weights @ values[:, :seen]).to(q.dtype).view(H, D)
    return out.flatten(1)


def draft(
    history: Tensor,
    seq_lens: Tensor,
    max_len: Tensor,
    min_len: Tensor,
    most_drafts: Tensor,
    *,
    report: Tensor,
    drafts: Tensor,
    draft_lens: Tensor,
) -> None:
    """Draft the tokens that follow each sequence: those that followed its end where that occurs earlier in it.

    B sequences, of which some are idle (seq_lens 0), in K rows each, which a decode step can run as K positions.

        history      [B, Z] int32     the tokens of each sequence; max_len <= Z
        seq_lens     [B] int32        their number L
        max_len      [B] int32        a sequence ends when it has this many tokens
        min_len      [B] int32        the length at which more tokens are allowed (see `advance`)
        most_drafts  [B] int32        the most drafts of each sequence, 0 for none
        report       [B, X] int32     the last number of a row becomes the number n of drafts
        drafts       [B, K] int64     becomes token L - 1, which the next step reads anyway, and n drafts; then 0
        draft_lens   [B, K] int32     becomes L, L + 1, ... L + n; then 0, which makes a row idle

    The match at place p, 0 < p < L, is the longest suffix of the L tokens, of at most LONGEST_MATCH, that also ends
    just before p. The longest match, of equal ones the last, gives the drafts if it has 2 tokens or more: the tokens
    from p on, and where the L tokens end before the drafts do, those from p on again.

    n < K, so that every draft has a row, and no row samples a token beyond max_len, nor one at which `allowed` has
    changed: while L < min_len, rows sample at positions below min_len.
    """
    B, K = drafts.shape
    report[:, -1] = 0
    drafts.zero_()
    draft_lens.zero_()
    for b in range(B):
        length = int(seq_lens[b])
        if length == 0:
            continue
        tokens = history[b, :length]
        opens = int(min_len[b]) if length < min_len[b] else length + K
        place = _longest_match(tokens)
        n = min(K - 1, int(most_drafts[b]), int(max_len[b]) - length - 1, opens - length - 1) if place else 0
        n = max(n, 0)
        report[b, -1] = n
        drafts[b, 0] = tokens[-1]
        draft_lens[b, : n + 1] = torch.arange(length, length + n + 1, dtype=torch.int32, device=tokens.device)
        for i in range(n):
            drafts[b, i + 1] = tokens[place + i % (length - place)]


def _longest_match(tokens: Tensor) -> int:
    """The place of the longest match of the end of `tokens` [L], the last one of equals; 0 below 2 tokens."""
    longest = 0
    places = torch.arange(1, len(tokens), dtype=torch.int64, device=tokens.device)
    for back in range(1, LONGEST_MATCH + 1):
        places = places[places >= back]
        places = places[tokens[places - back] == tokens[len(tokens) - back]]  # those whose match has `back` tokens
        if not len(places):
            break
        if back >= 2:
            longest = int(places[-1])
    return longest


def advance(
    sampled: Tensor,
    logprob: Tensor,
    *,
    token: Tensor,
    seq_lens: Tensor,
    history: Tensor,
    max_len: Tensor,
    end_mask: Tensor,
    report: Tensor,
    output_counts: Tensor,
    min_len: Tensor,
    permitted: Tensor,
    allowed: Tensor,
    drafts: Tensor | None = None,
) -> None:
    """End a decode step, in place: write the tokens that `sample` returned into the state of the next step.

    B sequences, each one live or idle (seq_lens 0), in K rows each. V: vocabulary size, W = ceil(V / 32) words of a bit
    mask, in which token i is bit i % 32 of word i // 32.

        sampled        [B*K] int64     the next token of each row
        logprob        [B*K] float32   its log-probability
        token          [B] int64       becomes the last token of each sequence
        seq_lens       [B] int32       grows by the number of tokens, or becomes 0 if the sequence ends
        history        [B, Z] int32    the tokens; gets the new ones, at places below Z
        max_len        [B] int32       a sequence ends when it has this many tokens
        end_mask       [B, W] int32    tokens that end a sequence
        report         [B, 3M+1] int32 for the host, for each of up to M tokens, M >= K: the token; why the sequence
                                       ended with it; the bits of its log-probability. Instead of a token that did not
                                       come: -1. The last number stays: how many drafts n the step had
        output_counts  [B, V] int32    how often each token was generated: one more for each new one
        min_len        [B] int32       a sequence may end once it has this many tokens
        permitted      [B, W] int32    tokens that may be sampled then
        allowed        [B, W] int32    tokens that may be sampled now; becomes `permitted` at min_len
        drafts         [B, K] int64    what the rows read; None where K is 1

    Row 0 of a sequence samples its next token. Row j read draft j, which stands for what row j - 1 samples. So its own
    token counts if the sequence has that draft (j <= n), it is right, and the sequence has not ended with it.

    Why a sequence ended: 0 it did not, 1 a token of `end_mask`, 2 `max_len`, 3 the log-probability is NaN: no token can
    be sampled from such logits, 4 `sampled` is -1: no token was left to choose; 0 is written in its place. For an idle
    sequence only the reported tokens change, to -1.
    """
    B, M = len(seq_lens), report.shape[1] // 3
    sampled, logprob = sampled.view(B, -1), logprob.view(B, -1)
    report[:, : 3 * M : 3] = -1
    live = seq_lens > 0
    for j in range(sampled.shape[1]):
        if drafts is not None and j > 0:
            live = live & (seq_lens > 0) & (j <= report[:, -1]) & (drafts[:, j] == sampled[:, j - 1])
            if not live.any():
                break
        nothing_left, new = sampled[:, j] < 0, sampled[:, j].clamp(min=0)
        words = end_mask.gather(1, (new // 32)[:, None])[:, 0]
        length = seq_lens + 1
        end = torch.where((words >> (new % 32) & 1).bool(), 1, 2 * (length >= max_len))
        end = end.masked_fill(nothing_left, 4).masked_fill(logprob[:, j].isnan(), 3)
        fresh = torch.stack((new.int(), end.int(), logprob[:, j].view(torch.int32)), 1)
        own = report[:, 3 * j : 3 * j + 3]
        own.copy_(torch.where(live[:, None], fresh, own))
        token.copy_(torch.where(live, new, token))
        place = seq_lens.long().clamp(max=history.shape[1] - 1)[:, None]
        kept = ~live | (seq_lens >= history.shape[1])
        history.scatter_(1, place, torch.where(kept[:, None], history.gather(1, place), new[:, None].int()))
        output_counts.scatter_add_(1, new[:, None], live.int()[:, None])
        allowed.copy_(torch.where((live & (length == min_len))[:, None], permitted, allowed))
        seq_lens.copy_(torch.where(live, torch.where(end == 0, length, 0), seq_lens))


def count_prompt(
    request: Tensor,
    lengths: Tensor,
    *,
    history: Tensor,
    prompt_counts: Tensor,
    output_counts: Tensor,
    logit_bias: Tensor,
) -> None:
    """Write the long part of a new request's state, from its prompt and its few biases.

        request        [N] int32       P tokens of the prompt; then Q tokens; then the bits of their Q biases, float32
        lengths        [2] int32       P and Q, with P + 2 Q <= N
        history        [Z] int32       gets the P tokens of the prompt, P <= Z
        prompt_counts  [V] int32       becomes how often each token is in the prompt
        output_counts  [V] int32       becomes 0
        logit_bias     [V] float32     becomes the bias of each token, 0 without one

    Tokens are in [0, V), and each has one bias at most.
    """
    tokens, biases = lengths.tolist()
    prompt, biased, bits = request[: tokens + 2 * biases].split([tokens, biases, biases])
    history[:tokens] = prompt
    prompt_counts.zero_().index_add_(0, prompt.long(), torch.ones_like(prompt))
    output_counts.zero_()
    logit_bias.zero_()
    logit_bias[biased.long()] = bits.view(torch.float32)


def store_row(row: Tensor, rows: Tensor, starts: Tensor, index: Tensor) -> None:
    """Copy one row of F fields into row `index` of B rows, which are stored field by field.

    row     [W] int32        its fields in order; field f is words starts[f] to starts[f + 1] - 1
    rows    [B * W] int32    field f of all rows, in order, is words B * starts[f] to B * starts[f + 1] - 1
    starts  [F + 1] int32    the first word of each field, from 0; then W
    index   [1] int32        in [0, B)
    """
    B = rows.numel() // row.numel()
    for start, end in pairwise(starts.tolist()):
        rows[B * start : B * end].view(B, end - start)[int(index)] = row[start:end]
