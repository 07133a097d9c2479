"""Prefill: the prompts of newly scheduled requests through the model, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.kv_cache import PAGE, BatchMetadata, PagedKVCache, pages_of
from ..model.model import LanguageModel
from . import decode
from .graphs import Capture
from .staging import Staging
from .state import DecodeState, Slot, Tier

# Tokens of a chunk. Prompts are cut into chunks from the first token that is not cached; rounding depends on where they
# are cut. A multiple of PAGE, and of the query blocks of the CPU's attention.
CHUNK = 512
# The most tokens of one launch, padding included, where batching does not change rounding: for short prompts, and for
# several chunks of a long one on a CPU. It bounds the memory of activations. Chosen by measurement on a CPU, where
# launches of one chunk are 5 to 7% slower.
LAUNCH_TOKENS = 4 * CHUNK
# Captured launches have one of these widths, or that of a chunk; prompts are padded to the next. Padding is cheap: a
# GPU is bound by reading weights up to about 256 tokens.
WIDTHS = (16, 64, 128, 256)


class Prefill:
    """Runs prompts, and brings their requests into their slots.

    On a GPU short chunks are launch-bound, so a prompt that runs alone runs from CUDA graphs.

    Args:
        state: the slots.
        staging: brings requests to them.
        capture: turns a launch into a replayable one; None runs all launches eagerly.

    Attributes:
        captured: runs single prompts by captured launches; None without a capture.
    """

    def __init__(
        self,
        model: LanguageModel,
        kv_cache: PagedKVCache,
        state: DecodeState,
        staging: Staging,
        capture: Capture | None,
    ):
        self._model, self._kv_cache, self._state, self._staging = model, kv_cache, state, staging
        self.captured = None if capture is None else CapturedPrompts(model, kv_cache, staging, capture)

    def run(self, slots: Sequence[Slot]) -> dict[Slot, Tensor]:
        """Prefills the prompts of these slots: the last token's hidden state [1, C] of each, before the last norm.

        Prompts of similar length, without what is cached, are batched. The requests are stored in their slots.
        """
        last: dict[Slot, Tensor] = {}
        for ready in _waves([slot for slot in slots if slot.twin is None]):
            last.update({slot: self._run_alone(slot) for slot in ready if not self._can_batch(slot)})
            for group in _groups([slot for slot in ready if self._can_batch(slot)]):
                if len(group) == 1:
                    last[group[0]] = self._run_alone(group[0])
                else:
                    last.update(zip(group, self._run_together(group).split(1), strict=True))
        for slot in slots:
            if slot.twin is not None:
                last[slot] = last[slot.twin]
                self._copy_twin(slot, slot.twin)
        return last

    def run_chunk(self, slot: Slot, most: int) -> bool:
        """Runs the next chunk of a prompt, of up to `most` tokens. Returns whether that was the last one.

        The request is staged, and not stored in its slot, which stays idle.
        """
        if self.captured is not None:
            self._last = self.captured.run_chunk(slot)
        else:
            begin, end = slot.prefilled, slot.prefilled + _launch_width(self._model, slot.remaining, most)
            self._staging.copy(slot, end, 0)
            batch = replace(self._staging.batch, write_table=None)
            self._last = run_chunks(self._model, self._kv_cache, batch, [self._prompt(slot)[:end]], [begin])
            slot.prefilled = end
        return not slot.remaining

    def warm_up(self, longest: int) -> None:
        """Captures all launches that prompts of up to `longest` tokens need. No slot may have a request."""
        if self.captured is not None:
            self.captured.warm_up(longest)

    def _can_batch(self, slot: Slot) -> bool:
        return slot.remaining < CHUNK and self._model.model.can_batch_prompts(slot.remaining)

    def _run_alone(self, slot: Slot) -> Tensor:
        """Runs what is left of a prompt."""
        while slot.remaining:
            self.run_chunk(slot, LAUNCH_TOKENS)
        self._store()
        return self._last.clone()  # the next prompt may overwrite it

    def _run_together(self, slots: Sequence[Slot]) -> Tensor:
        for slot in slots:
            self._load(slot)
            slot.prefilled = len(slot.request.prompt_ids)
        index, batch = [slot.index for slot in slots], self._state.batch
        block_table = batch.block_table[index]
        write_table, cached = block_table.clone(), [slot.request.cached_tokens for slot in slots]
        for row, tokens in enumerate(cached):
            write_table[row, : tokens // PAGE] = self._kv_cache.spare
        batch = BatchMetadata(block_table, batch.seq_lens[index], batch.inv_freq[index], write_table=write_table)
        return run_chunks(self._model, self._kv_cache, batch, [self._prompt(slot) for slot in slots], cached)

    def _copy_twin(self, slot: Slot, twin: Slot) -> None:
        """Loads a slot with the prompt of another one. Whole pages are shared; both will write into the last one."""
        tokens = len(slot.request.prompt_ids)
        last_page = slice(tokens // PAGE, pages_of(tokens))
        self._kv_cache.copy(twin.pages[last_page], slot.pages[last_page])
        self._load(slot)
        slot.twin, slot.prefilled = None, tokens

    def _load(self, slot: Slot) -> None:
        """Copies a request to its slot, with the whole prompt as its context."""
        self._staging.copy(slot, len(slot.request.prompt_ids), 0)
        self._store()

    def _store(self) -> None:
        ops = self._model.model.ops
        self._staging.count_prompt(ops)
        self._staging.store(ops)

    def _prompt(self, slot: Slot) -> Tensor:
        return torch.tensor(slot.request.prompt_ids, dtype=torch.int64, device=self._model.device)


def run_chunks(
    model: LanguageModel,
    kv_cache: PagedKVCache,
    batch: BatchMetadata,
    prompts: Sequence[Tensor],
    cached: Sequence[int],
) -> Tensor:
    """Runs prompts chunk by chunk, eagerly.

    Args:
        batch: block tables and rotary frequencies of the prompts; its `seq_lens` are ignored.
        prompts: [T] int64 each. One may have any length; several have up to CHUNK tokens to run each, and share one
            launch, padded on the left to the longest. Where padding coincides with cached tokens, the write table of
            `batch` must lead elsewhere.
        cached: how many of each prompt's tokens are cached, and don't run.

    Returns:
        [B, C] the last token's hidden state of each, before the last norm.
    """
    starts = list(cached)
    while left := max(len(prompt) - start for prompt, start in zip(prompts, starts, strict=True)):
        width = _launch_width(model, left, LAUNCH_TOKENS)
        chunks = [prompt[start : start + width] for prompt, start in zip(prompts, starts, strict=True)]
        starts = [start + len(chunk) for start, chunk in zip(starts, chunks, strict=True)]
        tokens = torch.cat([F.pad(chunk, (width - len(chunk), 0)) for chunk in chunks])
        x = model.model.ops.embed(tokens, model.model.embed_tokens.weight)
        x = model.model.run(x, replace(batch, seq_lens=batch.seq_lens.new_tensor(starts)), kv_cache, last_rows=True)
    return x


def cost(tokens: int) -> int:
    """The share of a prompt's `tokens` in the chunk of tokens that may run between two decode steps.

    A few tokens count as a quarter of a chunk: they take as long, since a launch reads all weights.
    """
    return max(tokens, CHUNK // 4)


def _launch_width(model: LanguageModel, tokens: int, most: int) -> int:
    """How many of a prompt's remaining tokens the next launch runs: one chunk.

    On a CPU several chunks, up to `most` tokens, where that does not change rounding.
    """
    if model.device.type != "cpu" or not model.model.can_batch_prompts(CHUNK):
        return min(tokens, CHUNK)
    end = tokens % CHUNK
    return min(most, tokens if model.model.can_batch_prompts(end) else tokens - end) or end


def _waves(slots: Sequence[Slot]) -> Iterator[list[Slot]]:
    """The slots that can run next, again and again: a prompt waits for those whose pages it shares."""
    waiting = list(slots)
    while waiting:
        unwritten: set[int] = set()
        ready: list[Slot] = []
        later: list[Slot] = []
        for slot in waiting:
            cached = slot.request.cached_tokens // PAGE
            (later if unwritten.intersection(slot.pages[:cached]) else ready).append(slot)
            unwritten.update(slot.pages[cached:])
        yield ready
        waiting = later


def _groups(slots: list[Slot]) -> Iterator[list[Slot]]:
    """Groups that share a launch: padded to one length at most LAUNCH_TOKENS together, at most a quarter padding."""
    group: list[Slot] = []
    for slot in sorted(slots, key=lambda slot: slot.remaining, reverse=True):
        longest = group[0].remaining if group else 0
        if (len(group) + 1) * longest > LAUNCH_TOKENS or 4 * slot.remaining < 3 * longest:
            yield group
            group = []
        group.append(slot)
    if group:
        yield group


class CapturedPrompts:
    """Runs one prompt at a time by captured launches: one for chunks of each width, one for first tokens of each tier.

    They are separate since one launch for both would have to be captured for every pair of width and tier.
    """

    def __init__(self, model: LanguageModel, kv_cache: PagedKVCache, staging: Staging, capture: Capture):
        self._model, self._kv_cache, self._staging, self._capture = model, kv_cache, staging, capture
        self._chunks: dict[int, Callable[[], None]] = {}
        self._first_tokens: dict[Tier, Callable[[], None]] = {}
        self._last: dict[int, Tensor] = {}  # what each chunk's launch returns, [1, C]
        # Where the launch of a first token reads it.
        self._hidden = torch.zeros(1, model.config.hidden_size, dtype=model.dtype, device=model.device)

    def run_chunk(self, slot: Slot) -> Tensor:
        """Runs the next chunk of a prompt. After the last: its last token's hidden state [1, C], before the last norm.

        That stays until the next prompt runs. The request is staged, and not yet stored in its slot.
        """
        width = _padded_width(slot.remaining)
        self._staging.copy(slot, slot.prefilled, width)
        self._run_chunk(width)
        slot.prefilled += min(width, slot.remaining)
        if not slot.remaining:
            self._hidden.copy_(self._last[width])
        return self._hidden

    def run_to_first_token(self, slot: Slot) -> None:
        """Runs what is left of a prompt, samples the token after it, and stores the request's state in its slot."""
        while slot.remaining:
            self.run_chunk(slot)
        self._generate(slot.tier)

    def warm_up(self, longest: int) -> None:
        """Captures all launches that prompts of up to `longest` tokens need."""
        self._staging.clear()
        for width in sorted({_padded_width(tokens) for tokens in range(1, min(longest, CHUNK) + 1)}):
            self._run_chunk(width)
        for tier in Tier:
            self._generate(tier)

    def _run_chunk(self, width: int) -> None:
        """Runs the staged chunk."""
        if width not in self._chunks:
            # What is captured does not lead back to this object, which else lives until the garbage collector comes.
            tokens = self._staging.tokens[:width]
            run = partial(_run_chunk, self._model, self._kv_cache, self._staging.batch, tokens, self._last)
            self._chunks[width] = self._capture(run)
        self._chunks[width]()

    def _generate(self, tier: Tier) -> None:
        """Generates the first token of the staged request."""
        if tier in self._first_tokens:
            self._first_tokens[tier]()
        else:  # which executes it, too
            run = partial(decode.first_token, self._model, self._staging, self._hidden, tier)
            self._first_tokens[tier] = self._capture(run)


def _run_chunk(
    model: LanguageModel, kv_cache: PagedKVCache, batch: BatchMetadata, tokens: Tensor, last: dict[int, Tensor]
) -> None:
    """Runs tokens [T] of one sequence, and stores the last one's hidden state [1, C] as last[T]."""
    x = model.model.ops.embed(tokens, model.model.embed_tokens.weight)
    last[len(tokens)] = model.model.run(x, batch, kv_cache, last_rows=True)


def _padded_width(tokens: int) -> int:
    return min((width for width in WIDTHS if tokens <= width < CHUNK), default=CHUNK)
