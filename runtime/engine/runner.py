"""Runs an engine's batch: prompts of newly scheduled requests, decode steps in flight, the tokens that come back."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..common.memory import free_memory
from ..model.kv_cache import PagedKVCache, page_bytes, pages_of
from ..model.model import LanguageModel
from ..model.weights import WeightsState
from . import decode, prefill
from .constraints import Constraints
from .draft_rows import MOST_SEQUENCES, ROWS, DraftRows
from .graphs import Capture, Part, Step, StepQueue, cuda_graphs, eager
from .hooks import sample_with_hooks
from .layout import state_layout
from .pages import PageAllocator
from .request import Request
from .scheduler import Scheduler
from .speculation import MOST_COST, Speculation
from .staging import Staging
from .state import DecodeState, Slot, Tier
from .warm_up import compile_kernels, costs_of_drafts, steps_to_compile

# Steps in flight while the host reads reports. The host needs tenths of a millisecond a step and a step takes several,
# so two hide it; each more would delay the next prompt, and run for nothing after an answer has ended.
DEPTH = 2


class Runner:
    """The slots of a batch, the KV cache, and the steps that run on them. Does not keep its model alive.

    Args:
        num_pages: of the KV cache.
        max_batch_size, max_seq_len, capture, depth, speculation: as for Engine.

    Attributes:
        scheduler: which requests wait, and which have a slot.
        pages, kv_cache: the pages and what is on them.
        speculation: which steps verify drafts; None if none does.
    """

    def __init__(
        self,
        model: LanguageModel,
        num_pages: int,
        max_batch_size: int,
        max_seq_len: int,
        capture: Capture | None,
        depth: int | None,
        speculation: bool | None,
    ):
        config, device = model.config, model.device
        self._model: LanguageModel = weakref.proxy(model)  # type: ignore[assignment]
        self._max_batch_size, self._max_seq_len = max_batch_size, max_seq_len
        self._eager = capture is eager or (capture is None and device.type == "cpu")
        self._depth = depth or (1 if device.type == "cpu" and self._eager else DEPTH)
        self._capture = capture or (eager if self._eager else cuda_graphs())
        self._padded = partial(_padded, limit=None if self._eager else max_batch_size)
        self.pages = PageAllocator(num_pages)
        self.scheduler = Scheduler(config, max_batch_size, self.pages, model.model.batch_invariant, self._padded)
        speculates = device.type != "cpu" if speculation is None else speculation
        tokens = ROWS if speculates else 1
        layout = state_layout(pages_of(max_seq_len), config.vocab_size, config.head_dim, tokens)
        free = free_memory(device) - num_pages * page_bytes(config, model.dtype)
        if (needed := 4 * max_batch_size * layout.words) > free:
            raise MemoryError(
                f"max_batch_size is {max_batch_size}: as many slots need {needed / 1e9:.2f} GB ({4 * layout.words:,} "
                f"bytes a slot, with numbers for every token of the vocabulary), and {max(free, 0) / 1e9:.2f} GB are "
                f"free on {device} beside the KV cache: lower max_batch_size, or cache_tokens"
            )
        self.kv_cache = PagedKVCache(config, num_pages, model.dtype, device)
        rows = torch.zeros(max_batch_size * layout.words, dtype=torch.int32, device=device)
        self._state = DecodeState.of(layout, rows)
        self._staging = Staging(config, layout, rows, self.kv_cache.spare, prefill.CHUNK)
        self._constraints = Constraints(self._state.allowed)
        most_cost = MOST_COST if speculation is None else math.inf
        self.speculation = Speculation(self._state, most_cost) if speculates else None
        self._begin()

    def _begin(self) -> None:
        """Without any captured step, for the weights as they are."""
        rows = None if self.speculation is None else self.speculation.rows
        logits: dict[int, Tensor] = {}
        run = partial(_run_step, self._model, self.kv_cache, self._state, rows, logits)
        self._steps = StepQueue(run, self._state.report, self._capture)
        capture = None if self._eager else self._capture
        self._prefill = prefill.Prefill(self._model, self.kv_cache, self._state, self._staging, capture)
        self._weights = WeightsState(self._model)
        self._room = prefill.CHUNK  # what prompts may still cost until the next decode step

    def drop_if_stale(self, message: str) -> bool:
        """Whether the weights have changed. If so, ends all requests with "error" and this message, and begins anew."""
        if not self._weights.changed(self._model):
            return False
        self.end_all("error", message)
        self._begin()
        return True

    def end_all(self, reason: str, message: str | None = None) -> None:
        """Ends every request; all slots and pages are free then, and no prefix is known."""
        for request in self.scheduler.clear():
            if request.finish_reason is None:
                request.finish(reason, message)
        self._steps.drain()
        self._state.batch.seq_lens.zero_()

    def free_ended(self) -> None:
        """Frees the slots of requests that have ended, and of those whose readers are gone."""
        for slot in self.scheduler.free_ended():
            self._state.clear(slot.index)

    # ---------------------------------------------------------------- one step

    def step(self) -> list[Request]:
        """Schedule, prefill, decode, collect: returns the requests that have a new token."""
        self.free_ended()
        self._run_prompts()
        if any(slot.request.needs_host for slot in self.scheduler.decoding):
            return self._step_on_host()
        if any(slot.request.constraint is not None for slot in self.scheduler.decoding):
            return self._step_in_parts()
        self._launch_ahead()
        return self._collect() if len(self._steps) else []

    def _run_prompts(self) -> None:
        """Prefills the next prompts: some short ones, or a chunk of a long one. Samples their first tokens.

        While other requests decode, that is at most a chunk of tokens from one decode step to the next, so that they
        keep their pace.
        """
        alone = not self.scheduler.decoding
        long = self.scheduler.prefilling
        slots = [] if long is not None else self.scheduler.schedule(math.inf if alone else self._room)
        self._room -= sum(prefill.cost(slot.remaining) for slot in slots if slot.twin is None)
        if slots and slots[0].remaining > prefill.CHUNK:
            long = slots[0]
        elif long is not None and not alone and self._room < prefill.CHUNK:
            return
        if long is not None:
            self._room = 0
            if not self._prefill.run_chunk(long, prefill.LAUNCH_TOKENS if alone else prefill.CHUNK):
                return
            self.scheduler.register(long)
            slots = [long, *(slot for slot in self.scheduler.active if slot.twin is long)]
        if slots:
            self._run_to_first_tokens(slots)

    def _run_to_first_tokens(self, slots: list[Slot]) -> None:
        """Runs what is left of these prompts, and samples the token after each."""
        slot = slots[0]
        for each in slots:
            each.started = True
        if self._prefill.captured is not None and len(slots) == 1 and not slot.request.needs_host:
            self._prefill.captured.run_to_first_token(slot)
            self._steps.copy_report([*[None] * slot.index, slot])
        else:
            self._sample_first_tokens(slots, self._prefill.run(slots))

    def _sample_first_tokens(self, scheduled: list[Slot], last: dict[Slot, Tensor]) -> None:
        """Samples the token after each prompt, from its last token's hidden state [1, C]; one report for all."""
        batch_size, ops = self._batch_size(), self._model.model.ops
        scheduled = sorted(scheduled, key=lambda slot: slot.index)
        logits = self._model.head(torch.cat([last[slot] for slot in scheduled]))
        readers: list[Slot | None] = [None] * batch_size
        on_host: list[Request | None] = [None] * batch_size
        for slot in scheduled:
            readers[slot.index] = slot
            if slot.request.needs_host:
                on_host[slot.index] = slot.request
        for begin, end in _neighbours(scheduled):
            state = self._state.slots(scheduled[begin].index, scheduled[end - 1].index + 1)
            decode.sample(ops, logits[begin:end], state, max(slot.tier for slot in scheduled[begin:end]))
        if any(on_host):
            of_all = logits.new_zeros(batch_size, logits.shape[1])
            of_all[[slot.index for slot in scheduled]] = logits
            tier = max(slot.tier for slot in scheduled)
            sample_with_hooks(ops, of_all, self._state.slots(0, batch_size), tier, on_host)
            self.free_ended()
        self._steps.copy_report(readers)

    def _launch_ahead(self) -> None:
        """Launches steps until `depth` are in flight, but none after the last token that any slot may have."""
        while len(self._steps) < self._depth:
            unfinished = self._unfinished()
            if not unfinished:
                return
            batch_size = self._batch_size()
            slots = self.scheduler.in_step(batch_size)
            drafts = self.speculation is not None and self.speculation.prepare(slots)
            self._steps.launch(Step(batch_size, max(slot.tier for slot in unfinished), drafts), slots)
            self._room = prefill.CHUNK

    def _unfinished(self) -> list[Slot]:
        """The slots that may have tokens after the steps in flight, of which each generates at least one."""
        return [
            slot
            for slot in self.scheduler.decoding
            if len(slot.request.token_ids) + self._steps.of(slot) < slot.request.max_tokens
        ]

    def _step_in_parts(self) -> list[Request]:
        """One step in which a constraint needs the tokens before: the host reads them while the model runs."""
        if not self._unfinished():
            return self._collect_all()
        batch_size = self._batch_size()
        slots = self.scheduler.in_step(batch_size)
        self._steps.execute(Step(batch_size, Tier.FULL, part=Part.LOGITS))
        moved = self._collect_all()
        self._constraints.write(slots)
        self._steps.launch(Step(batch_size, Tier.FULL, part=Part.TOKENS), slots)
        if self.speculation is not None:
            self.speculation.drop_drafts()
        self._room = prefill.CHUNK
        return moved

    def _step_on_host(self) -> list[Request]:
        """One step whose logits the host sees. No other is in flight: processors need all tokens before it."""
        moved = self._collect_all()
        decoding = self.scheduler.decoding
        if not decoding or moved:
            return moved
        batch_size, tier = self._batch_size(), max(slot.tier for slot in decoding)
        slots, state = self.scheduler.in_step(batch_size), self._state.slots(0, batch_size)
        logits = decode.forward(self._model, self.kv_cache, state)
        requests = [None if slot is None else slot.request for slot in slots]
        self._constraints.write(slots)
        sample_with_hooks(self._model.model.ops, logits, state, tier, requests)
        self.free_ended()
        if self.speculation is not None:
            self.speculation.drop_drafts()
        self._steps.copy_report(slots)
        self._room = prefill.CHUNK
        return self._collect()

    def _collect_all(self) -> list[Request]:
        """Collects all steps in flight."""
        return [request for _ in range(len(self._steps)) for request in self._collect()]

    def _collect(self) -> list[Request]:
        """Gives the tokens of the oldest step in flight to their requests; frees the slots of those that end."""
        moved = []
        drafts, reports = self._steps.collect()
        if self.speculation is not None:
            self.speculation.account(drafts, reports)
        for slot, report in reports:
            request = slot.request
            if request.finish_reason is None:  # else it was cancelled meanwhile
                for token, logprob, end in report.tokens:
                    request.append(token, logprob, end)
                moved.append(request)
                if request.finish_reason is not None:  # the step has made the slot idle
                    self.scheduler.free(slot)
        return moved

    def _batch_size(self) -> int:
        """The batch size of the next step, after closing gaps between slots if that makes it smaller."""
        for source, target in self.scheduler.compact():
            self._state.move(source, target)
        return self.scheduler.batch_size

    # ---------------------------------------------------------------- warm-up

    def warm_up(self) -> None:
        """Compiles every kernel and captures every step that requests can need. No request may have a slot."""
        if self._model.device.type != "cpu":
            compile_kernels(self._model, self.kv_cache, self._staging, self.pages, self._max_seq_len)
        slots = range(1, self._max_batch_size + 1)
        # A step that is not captured only needs to be compiled.
        to_run = steps_to_compile(self._model, self._max_batch_size) if self._eager else slots
        for batch_size in sorted({self._padded(count) for count in to_run}):
            for tier in Tier:
                self._steps.execute(Step(batch_size, tier))
            for part in (Part.LOGITS, Part.TOKENS):
                self._steps.execute(Step(batch_size, Tier.FULL, part=part))
        if self.speculation is not None:
            # Without a capture sizes between two powers of two would run, too: they need no compilation of their own.
            sizes = {count: _padded(count, self._max_batch_size) for count in slots[:MOST_SEQUENCES]}
            tiers = () if self._eager and self._model.device.type == "cpu" else Tier
            rows, distinct = self.speculation.rows, set(sizes.values())
            costs = costs_of_drafts(self._steps, self._state, rows, self.pages, distinct, tiers, self._max_seq_len)
            self.speculation.costs = {count: costs[batch_size] for count, batch_size in sizes.items()}
        self._prefill.warm_up(self._max_seq_len)


def _run_step(
    model: LanguageModel,
    kv_cache: PagedKVCache,
    state: DecodeState,
    rows: DraftRows | None,
    logits: dict[int, Tensor],
    step: Step,
) -> None:
    """A decode step of the first slots; then their drafts for the next one, if there are rows to verify them.

    A part of a step makes no drafts. `logits` has what the first part leaves for the second, by the batch size.
    """
    slots = state.slots(0, step.batch_size)
    if step.part == Part.LOGITS:
        logits[step.batch_size] = decode.forward(model, kv_cache, slots)
    elif step.part == Part.TOKENS:
        decode.sample(model.model.ops, logits[step.batch_size], slots, step.tier)
    elif rows is None or step.batch_size > MOST_SEQUENCES:
        decode.step(model, kv_cache, slots, step.tier)
    else:
        own = rows.of(step.batch_size)
        if step.drafts:
            decode.verify(model, kv_cache, slots, own, step.tier)
        else:
            decode.step(model, kv_cache, slots, step.tier)
        decode.draft(model.model.ops, slots, own)


def _padded(slots: int, limit: int | None) -> int:
    """The batch size of a step. Captured steps, which have a limit, have a few only: powers of two."""
    return slots if limit is None else min(1 << (slots - 1).bit_length(), limit)


def _neighbours(scheduled: list[Slot]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive slots, which can be sampled in one call: begin and end in `scheduled`. None on the host."""
    runs = [(slot.index - position, slot.request.needs_host) for position, slot in enumerate(scheduled)]
    end = 0
    for (_, needs_host), run in itertools.groupby(runs):
        begin, end = end, end + len(list(run))
        if not needs_host:
            yield begin, end
