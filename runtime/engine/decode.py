"""The decode step: ops on the device's tensors and nothing else, so that a CUDA graph can hold it."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..model.kv_cache import PagedKVCache
from ..model.model import LanguageModel
from .draft_rows import DraftRows
from .staging import Staging
from .state import DecodeState, Tier


def step(model: LanguageModel, kv_cache: PagedKVCache, state: DecodeState, tier: Tier) -> None:
    """Generates one token for every slot that is not idle. Reads and writes the state's tensors and the KV cache."""
    sample(model.model.ops, forward(model, kv_cache, state), state, tier)


def forward(model: LanguageModel, kv_cache: PagedKVCache, state: DecodeState) -> Tensor:
    """Logits [B, V] of the next token."""
    x = model.model.ops.embed(state.token, model.model.embed_tokens.weight)
    return model.head(model.model.run(x, state.batch, kv_cache, decode_step=True))


def draft(ops: ModuleType, state: DecodeState, rows: DraftRows) -> None:
    """Drafts what follows each slot's sequence, for the next step."""
    limits = (state.max_len, state.min_len, state.most_drafts)
    lens = rows.batch.seq_lens.view_as(rows.drafts)
    ops.draft(state.history, state.batch.seq_lens, *limits, report=state.report, drafts=rows.drafts, draft_lens=lens)


def verify(model: LanguageModel, kv_cache: PagedKVCache, state: DecodeState, rows: DraftRows, tier: Tier) -> None:
    """Generates one token for every slot that is not idle, and one more for each of its drafts that is right.

    The rows of a slot are sequences of one token each, which share its pages. Each reads keys that the others write in
    this step, so to attention it is no decode step.
    """
    ops = model.model.ops
    x = ops.embed(rows.drafts.view(-1), model.model.embed_tokens.weight)
    logits = model.head(model.model.run(x, rows.batch, kv_cache))
    sampled, logprob = ops.sample(logits, **rows.stages(state, tier))
    ops.advance(sampled, logprob, **state.advance_arguments(), drafts=rows.drafts)


def sample(ops: ModuleType, logits: Tensor, state: DecodeState, tier: Tier) -> None:
    """Samples from logits [B, V] and advances every slot that is not idle."""
    sampled, logprob = ops.sample(logits, **state.stages(tier))
    ops.advance(sampled, logprob, **state.advance_arguments())


def first_token(model: LanguageModel, staging: Staging, last: Tensor, tier: Tier) -> None:
    """Generates the token after a staged request's prompt, and stores its state in its slot.

    last [1, C]: the hidden state of the prompt's last token, before the last norm.
    """
    ops = model.model.ops
    staging.count_prompt(ops)
    sample(ops, model.head(last), staging.state, tier)
    staging.store(ops)
