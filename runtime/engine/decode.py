"""The decode step, as calls of ops on the device's tensors and nothing else; and the prompt that comes before it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.reference_sampling import FILTERS, PENALTIES, filter_logits, log_probability, penalize
from ..model.model import LanguageModel
from ..model.pages import Pages, Sequences
from ..sampling.params import top_logprobs
from .request import Request
from .state import DecodeState, Tier

# A prompt goes through the model in pieces of so many tokens, cut at multiples of it whatever lies in the cache: where
# it is cut decides the bits of its keys and values. A multiple of PAGE, and of the reference's QUERY_BLOCK.
CHUNK = 512
# So many tokens share a launch, padding included, where their number decides no bits: short prompts, and on a CPU the
# chunks of a long one. It bounds the memory for activations. In launches of a chunk 16 x 128 tokens take a CPU 1.07 and
# 1 x 1024 1.05 times as long (an EPYC, bfloat16, 2026-11-28).
TOGETHER = 4 * CHUNK


def step(model: LanguageModel, pages: Pages, state: DecodeState, tier: Tier) -> None:
    """The next token of every row that is not idle: reads and writes the tensors of the state, and the pages."""
    choose(model.model.ops, forward(model, pages, state), state, tier)


def forward(model: LanguageModel, pages: Pages, state: DecodeState) -> Tensor:
    """The first half of a step: logits [B, V] of the next token."""
    x = model.model.ops.embed(state.token, model.model.embed_tokens.weight)
    return model.head(model.model.run(x, state.seqs, pages))


def choose(ops: ModuleType, logits: Tensor, state: DecodeState, tier: Tier) -> None:
    """The second half: draws from logits [B, V], and moves every row on that is not idle."""
    drawn, logprob = ops.sample(logits, **state.stages(tier))
    ops.advance(drawn, logprob, **state.advanced())


def prefill(model: LanguageModel, pages: Pages, seqs: Sequences, prompts: SequenceOf[Tensor], begin: int = 0) -> Tensor:
    """Prompts [T] into their pages, one from token `begin`, a multiple of CHUNK; their last rows [B, C], for the head.

    Several begin at their first token and have up to CHUNK each: they share a launch, padded to the longest. `seqs` are
    their rows of the state, whose `seq_lens` are left alone: until a prompt is filled its row is idle.
    """
    start, longest = begin, max(map(len, prompts))
    while start < longest:
        width = _launched(model, longest - start)
        chunks = [prompt[start : start + width] for prompt in prompts]
        tokens = torch.cat([F.pad(chunk, (width - len(chunk), 0)) for chunk in chunks])
        seq_lens = seqs.seq_lens.new_tensor([start + len(chunk) for chunk in chunks])
        x = model.model.ops.embed(tokens, model.model.embed_tokens.weight)
        x = model.model.run(x, Sequences(seqs.block_table, seq_lens, seqs.inv_freq), pages, last_rows=True)
        start += width
    return x


def _launched(model: LanguageModel, tokens: int) -> int:
    """How many of a prompt's next `tokens` go in one launch: on a CPU several chunks, where that decides no bits."""
    if model.device.type != "cpu" or not model.model.may_share(CHUNK):
        return min(tokens, CHUNK)
    end = tokens % CHUNK
    return min(TOGETHER, tokens if model.model.may_share(end) else tokens - end) or end


def compile_all(model: LanguageModel, pages: Pages, state: DecodeState, longest: int) -> None:
    """Launches, once, all that prompts of up to `longest` tokens and watched steps can need, for a GPU to compile.

    `state` is a row that is idle, whose table names pages for them. What steps launch besides is theirs.
    """
    from ...kernels.triton.warmup import token_counts  # with Triton, which a CPU needs not have

    config, ops = model.config, model.model.ops
    group = config.num_attention_heads // config.num_key_value_heads
    for tokens in token_counts(min(longest, CHUNK), group, config.head_dim, model.dtype, model.device):
        x = prefill(model, pages, state.seqs, [state.token.repeat(tokens)])
    logits = model.head(x)
    for tier in Tier:
        ops.sample(logits.float(), **_behind_penalties(state, tier))


def watched(
    ops: ModuleType, logits: Tensor, state: DecodeState, tier: Tier, requests: SequenceOf[Request | None]
) -> None:
    """As `choose` from logits [B, V], where calls see and change what is drawn from; requests[b] stands in row b.

    A processor stands where transformers has it: behind bias, penalties and masks (sequence_bias before them), before
    temperature and filters. Log-probabilities stay the model's own. Rows of no request are left alone.
    """
    rows = {request: row for row, request in enumerate(requests) if request is not None}
    calls = {request.watch: None for request in rows if request.watch is not None}

    def process(x: Tensor, *, early: bool) -> dict[Request, Tensor]:
        scores = {request: x[row] for request, row in rows.items()}
        for call in calls:
            own = {request: scores[request] for request in rows if request.watch is call}
            scores |= call.process(call.early if early else call.processors, own)
        return scores

    biased = logits.float()
    if any(call.early for call in calls):
        biased = biased.clone()
        for request, changed in process(biased, early=True).items():
            biased[rows[request]] = changed
    ahead = {name: x for name, x in state.stages(tier).items() if name in PENALTIES}
    scores = process(penalize(biased, **ahead), early=False)
    for request, row in rows.items():
        own, mine, x = state.rows(row, row + 1), logits[row : row + 1], scores[request][None]
        stages = _behind_penalties(own, tier)
        drawn, _ = ops.sample(x, **stages)
        watch = request.watch
        if watch is not None and watch.keep_logits:
            watch.logits.setdefault(request, []).append(mine[0].float())
        if watch is not None and watch.keep_scores:
            watch.scores.setdefault(request, []).append(_drawn_from(x, stages)[0])
        if request.params.logprobs:
            ids, values = top_logprobs(mine, request.params.logprobs)
            request.top_logprobs.append(dict(zip(ids[0].tolist(), values[0].tolist(), strict=True)))
        ops.advance(drawn, log_probability(mine, drawn), **own.advanced())


def _behind_penalties(state: DecodeState, tier: Tier) -> dict[str, Any]:
    return {name: stage for name, stage in state.stages(tier).items() if name not in PENALTIES}


def _drawn_from(x: Tensor, stages: Mapping[str, Any]) -> Tensor:
    """The logits that `sample` draws from: float32 [B, V], -inf where never chosen; greedy rows unfiltered."""
    temperature = stages["temperature"]
    if temperature is None:
        return x
    kept = filter_logits(x, **{name: stage for name, stage in stages.items() if name in ("temperature", *FILTERS)})
    return torch.where(temperature[:, None] == 0, x, kept)
