"""Prefill: the prompts of newly scheduled requests through the model, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.kv_cache import PAGE, BatchMetadata, PagedKVCache
from ..model.model import LanguageModel
from .graphs import Capture
from .state import DecodeState, Slot

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
    """Runs prompts, and returns the hidden state of each one's last token.

    On a GPU short chunks are launch-bound, so a prompt that runs alone runs from CUDA graphs.

    Args:
        state: the slots' metadata. A slot stays idle (seq_lens 0) until its prompt is prefilled.
        capture: turns a launch into a replayable one; None runs all launches eagerly.
    """

    def __init__(self, model: LanguageModel, kv_cache: PagedKVCache, state: DecodeState, capture: Capture | None):
        self._model, self._kv_cache, self._state = model, kv_cache, state
        self._captured = None if capture is None else CapturedChunks(model, kv_cache, state, capture)

    def run(self, slots: Sequence[Slot]) -> dict[Slot, Tensor]:
        """Prefills the prompts of these slots: the last token's hidden state [1, C] of each, before the last norm.

        Long prompts run one by one. Short ones of similar length, without what is cached, are batched.
        """
        last: dict[Slot, Tensor] = {}
        for ready in _waves(slots):
            last.update({slot: self._run_alone(slot) for slot in ready if not self._can_batch(slot)})
            for group in _groups([slot for slot in ready if self._can_batch(slot)]):
                if len(group) == 1:
                    last[group[0]] = self._run_alone(group[0])
                else:
                    last.update(zip(group, self._run_together(group).split(1), strict=True))
        return last

    def warm_up(self, longest: int) -> None:
        """Captures all launches that prompts of up to `longest` tokens need."""
        if self._captured is not None:
            self._captured.warm_up(longest)

    def _can_batch(self, slot: Slot) -> bool:
        tokens = _remaining(slot)
        return tokens < CHUNK and self._model.model.can_batch_prompts(tokens)

    def _run_alone(self, slot: Slot) -> Tensor:
        batch = self._state.slots(slot.index, slot.index + 1).batch
        if self._captured is not None:
            return self._captured.run(batch, slot.prompt, slot.request.cached_tokens)
        return run_chunks(self._model, self._kv_cache, batch, [slot.prompt], [slot.request.cached_tokens])

    def _run_together(self, slots: Sequence[Slot]) -> Tensor:
        index, batch = [slot.index for slot in slots], self._state.batch
        block_table = batch.block_table[index]
        write_table, cached = block_table.clone(), [slot.request.cached_tokens for slot in slots]
        for row, tokens in enumerate(cached):
            write_table[row, : tokens // PAGE] = self._kv_cache.spare
        batch = BatchMetadata(block_table, batch.seq_lens[index], batch.inv_freq[index], write_table=write_table)
        return run_chunks(self._model, self._kv_cache, batch, [slot.prompt for slot in slots], cached)


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
        width = _launch_width(model, left)
        chunks = [prompt[start : start + width] for prompt, start in zip(prompts, starts, strict=True)]
        starts = [start + len(chunk) for start, chunk in zip(starts, chunks, strict=True)]
        tokens = torch.cat([F.pad(chunk, (width - len(chunk), 0)) for chunk in chunks])
        x = model.model.ops.embed(tokens, model.model.embed_tokens.weight)
        x = model.model.run(x, replace(batch, seq_lens=batch.seq_lens.new_tensor(starts)), kv_cache, last_rows=True)
    return x


def _launch_width(model: LanguageModel, tokens: int) -> int:
    """How many of a prompt's remaining tokens the next launch runs: one chunk.

    On a CPU several chunks, where that does not change rounding.
    """
    if model.device.type != "cpu" or not model.model.can_batch_prompts(CHUNK):
        return min(tokens, CHUNK)
    end = tokens % CHUNK
    return min(LAUNCH_TOKENS, tokens if model.model.can_batch_prompts(end) else tokens - end) or end


def _remaining(slot: Slot) -> int:
    """The number of tokens that a prompt has to run."""
    return len(slot.prompt) - slot.request.cached_tokens


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
    for slot in sorted(slots, key=_remaining, reverse=True):
        longest = _remaining(group[0]) if group else 0
        if (len(group) + 1) * longest > LAUNCH_TOKENS or 4 * _remaining(slot) < 3 * longest:
            yield group
            group = []
        group.append(slot)
    if group:
        yield group


class CapturedChunks:
    """Runs one prompt at a time by captured launches, each chunk padded on the left to one of a few widths.

    Where the padding coincides with cached tokens, what it would write goes to the spare page.
    """

    def __init__(self, model: LanguageModel, kv_cache: PagedKVCache, state: DecodeState, capture: Capture):
        self._model, self._kv_cache, self._capture = model, kv_cache, capture
        self._captured: dict[int, Callable[[], None]] = {}
        self._last: dict[int, Tensor] = {}  # what each captured launch returns, [1, C]
        # Captured launches read these.
        self._tokens = torch.zeros(CHUNK, dtype=torch.int64, device=model.device)
        slot = state.slots(0, 1).batch
        self._write_table = torch.zeros_like(slot.block_table)
        self._batch = BatchMetadata(
            torch.zeros_like(slot.block_table),
            torch.zeros_like(slot.seq_lens),
            torch.zeros_like(slot.inv_freq),
            write_table=self._write_table,
        )

    def run(self, batch: BatchMetadata, prompt: Tensor, begin: int) -> Tensor:
        """Like `run_chunks` for one prompt [T]: its last token's hidden state [1, C]."""
        self._batch.block_table.copy_(batch.block_table)
        self._batch.inv_freq.copy_(batch.inv_freq)
        for start in range(begin, len(prompt), CHUNK):
            chunk = prompt[start : start + CHUNK]
            self._write_table.copy_(batch.block_table)
            self._write_table[:, : start // PAGE] = self._kv_cache.spare
            last = self._launch(chunk, start + len(chunk))
        return last.clone()  # the next launch overwrites it

    def warm_up(self, longest: int) -> None:
        """Captures all launches that prompts of up to `longest` tokens need."""
        for width in sorted({_padded_width(tokens) for tokens in range(1, min(longest, CHUNK) + 1)}):
            self._launch(self._tokens[:width].clone(), 0)  # length 0 is an idle sequence: nothing is written

    def _launch(self, chunk: Tensor, length: int) -> Tensor:
        """Runs a chunk that ends at token `length` of its sequence."""
        width = _padded_width(len(chunk))
        self._tokens[: width - len(chunk)].zero_()
        self._tokens[width - len(chunk) : width].copy_(chunk)
        self._batch.seq_lens.fill_(length)
        if width not in self._captured:
            # What is captured does not lead back to this object, which else lives until the garbage collector comes.
            tokens = self._tokens[:width]
            run = partial(_run_chunk, self._model, self._kv_cache, self._batch, tokens, self._last)
            self._captured[width] = self._capture(run)
        self._captured[width]()
        return self._last[width]


def _run_chunk(
    model: LanguageModel, kv_cache: PagedKVCache, batch: BatchMetadata, tokens: Tensor, last: dict[int, Tensor]
) -> None:
    """Runs tokens [T] of one sequence, and stores the last one's hidden state [1, C] as last[T]."""
    x = model.model.ops.embed(tokens, model.model.embed_tokens.weight)
    last[len(tokens)] = model.model.run(x, batch, kv_cache, last_rows=True)


def _padded_width(tokens: int) -> int:
    return min((width for width in WIDTHS if tokens <= width < CHUNK), default=CHUNK)
