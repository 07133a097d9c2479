"""What is compiled, captured and measured before the first request."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from ..model.kv_cache import PagedKVCache, pages_of
from ..model.model import LanguageModel
from . import prefill
from .draft_rows import DraftRows
from .graphs import Step, StepQueue
from .hooks import stages_after_penalties
from .pages import PageAllocator
from .speculation import Cost
from .staging import Staging
from .state import DecodeState, Tier


def compile_kernels(
    model: LanguageModel, kv_cache: PagedKVCache, staging: Staging, pages: PageAllocator, max_seq_len: int
) -> None:
    """Launches once whatever prompts of up to `max_seq_len` tokens, and sampling on the host, can launch.

    No slot may have a request. Decode steps are compiled when they are captured.
    """
    from ...kernels.triton.warmup import token_counts  # imports Triton, which a CPU need not have

    staging.clear()
    config, ops, slot = model.config, model.model.ops, staging.state
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
        staging.count_prompt(ops)
        staging.store(ops)
    finally:
        pages.release(allocated)


def steps_to_compile(model: LanguageModel, most: int) -> list[int]:
    """Batch sizes of decode steps that compile what any batch size up to `most` needs. A CPU compiles nothing."""
    if model.device.type == "cpu":
        return []
    from ...kernels.triton.warmup import batch_sizes  # imports Triton

    return batch_sizes(most)


def costs_of_drafts(
    steps: StepQueue,
    state: DecodeState,
    rows: DraftRows,
    pages: PageAllocator,
    batch_sizes: Iterable[int],
    max_seq_len: int,
) -> dict[int, Cost]:
    """Compiles or captures every step with drafts. Returns what they cost, by batch size. No slot may have a request.

    All rows have the same pages and the same context, which is as short or as long as can be.
    """
    allocated = pages.allocate(pages_of(max_seq_len))

    def seconds(step: Step, context: int) -> float:
        """The shortest of some runs."""
        times = []
        for _ in range(4):
            for batch in (state.batch, rows.batch):
                batch.seq_lens.fill_(context)
            _synchronize(state)
            began = time.perf_counter()
            steps.execute(step)
            _synchronize(state)
            times.append(time.perf_counter() - began)
        return min(times)

    def cost(batch_size: int, context: int) -> float:
        with_drafts, without = (seconds(Step(batch_size, Tier.GREEDY, drafts), context) for drafts in (True, False))
        return with_drafts / without - 1

    try:
        for batch in (state.batch, rows.batch):
            batch.block_table[:, : len(allocated)] = torch.tensor(allocated, dtype=torch.int32, device="cpu")
        costs = {}
        for batch_size in sorted(batch_sizes):
            for tier in Tier:
                seconds(Step(batch_size, tier, drafts=True), 1)
            short, long = cost(batch_size, 1), cost(batch_size, max_seq_len)
            costs[batch_size] = Cost(short, (long - short) / max_seq_len)
        return costs
    finally:
        for batch in (state.batch, rows.batch):
            batch.seq_lens.zero_()
        pages.release(allocated)


def _synchronize(state: DecodeState) -> None:
    if state.token.is_cuda:
        torch.cuda.synchronize(state.token.device)
