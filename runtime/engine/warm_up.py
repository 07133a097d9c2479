"""What a GPU compiles before the first request."""

from __future__ import annotations

import torch

from ..model.kv_cache import PagedKVCache, pages_of
from ..model.model import LanguageModel
from . import prefill
from .hooks import stages_after_penalties
from .pages import PageAllocator
from .state import DecodeState, Tier


def compile_kernels(
    model: LanguageModel, kv_cache: PagedKVCache, slot: DecodeState, pages: PageAllocator, max_seq_len: int
) -> None:
    """Launches once whatever prompts of up to `max_seq_len` tokens, and sampling on the host, can launch.

    `slot` is the state of one idle slot. Decode steps are compiled when they are captured.
    """
    from ...kernels.triton.warmup import token_counts  # imports Triton, which a CPU need not have

    config, ops = model.config, model.model.ops
    longest = min(max_seq_len, prefill.CHUNK)
    allocated = pages.allocate(pages_of(longest))
    try:
        slot.batch.block_table[0, : len(allocated)] = torch.tensor(allocated, dtype=torch.int32, device="cpu")
        group = config.num_attention_heads // config.num_key_value_heads
        for tokens in token_counts(longest, group, config.head_dim, model.dtype, model.device):
            x = prefill.run_chunks(model, kv_cache, slot.batch, [slot.token.repeat(tokens)], [0])
        logits = model.head(x)
        for tier in Tier:
            ops.sample(logits.float(), **stages_after_penalties(slot, tier))
    finally:
        pages.release(allocated)


def steps_to_compile(model: LanguageModel, most: int) -> list[int]:
    """Batch sizes of decode steps that compile what any batch size up to `most` needs. A CPU compiles nothing."""
    if model.device.type == "cpu":
        return []
    from ...kernels.triton.warmup import batch_sizes  # imports Triton

    return batch_sizes(most)
