"""The engine: requests from any number of threads are scheduled, prefilled and decoded together."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..model.kv_cache import PAGE, PagedKVCache, pages_of
from ..model.model import LanguageModel
from ..model.rope import inverse_frequencies
from . import decode
from .answer import Answer, Update
from .graphs import Capture, StepQueue, cuda_graphs, eager
from .hooks import sample_with_hooks
from .pages import PageAllocator, page_budget
from .prefill import Prefill
from .request import Request
from .scheduler import Scheduler
from .state import DecodeState, Slot, Tier
from .warm_up import compile_kernels

# Steps in flight while the host reads reports. The host needs tenths of a millisecond a step and a step takes several,
# so two hide it; each more would delay the next prompt, and run for nothing after an answer has ended.
DEPTH = 2


class Engine:
    """Runs requests together, as they come. What a request gets does not depend on the others.

    The loop is `run`, or, for callers whose requests come one by one, `submit` and `updates`.

    Args:
        max_batch_size: how many requests are decoded together; more wait.
        max_seq_len: the most tokens of one request, prompt and answer.
        cache_tokens: tokens that the KV cache holds, at least max_seq_len; by default max_seq_len for every slot, but
            at most half of the free memory.
        capture: turns a step into a replayable callable: CUDA graphs on a GPU by default, the step itself on a CPU.
        depth: how many steps are in flight while the host reads; by default 2, on a CPU 1.

    Raises MemoryError, with the arithmetic, if not even one sequence of max_seq_len fits.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_batch_size: int = 16,
        max_seq_len: int,
        cache_tokens: int | None = None,
        capture: Capture | None = None,
        depth: int | None = None,
    ):
        config, device = model.config, model.device
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        self._model = model
        self._lock = threading.RLock()
        count = page_budget(config, model.dtype, device, max_batch_size, max_seq_len, cache_tokens)
        self._eager = capture is eager or (capture is None and device.type == "cpu")
        self._depth = depth or (1 if device.type == "cpu" and self._eager else DEPTH)
        capture = capture or (eager if self._eager else cuda_graphs())
        self.pages = PageAllocator(count)
        self._scheduler = Scheduler(config, max_batch_size, self.pages, self._padded)
        with self._on_device():
            self.kv_cache = PagedKVCache(config, count, model.dtype, device)
            self._state = DecodeState.idle(
                max_batch_size, pages_of(max_seq_len), config.vocab_size, config.head_dim, device
            )
            self._steps = StepQueue(self._decode_step, self._state.report, capture)
            self._prefill = Prefill(model, self.kv_cache, self._state, None if self._eager else capture)

    # ---------------------------------------------------------------- the loop

    def run(self, answers: Sequence[Answer]) -> Iterator[list[Update]]:
        """Runs answers to their end; yields what is new, at most one update of each answer at a time.

        Closing the iterator cancels what has not finished, and frees its slots and pages at once.

        Raises RuntimeError if an error in a step shared with other callers ended an answer.
        """
        unfinished = list(answers)
        self.submit(unfinished)
        try:
            while unfinished:
                updates = self.updates(unfinished)
                if any(update.answer.request.finish_reason == "abort" for update in updates if update.finished):
                    raise RuntimeError(
                        "the answer was broken off by an error in a step shared with other calls: try again"
                    )
                if updates:
                    yield updates
                    unfinished = [answer for answer in unfinished if not answer.finished]
        finally:
            self.cancel([answer.request for answer in answers])

    def submit(self, answers: Iterable[Answer]) -> None:
        """Queues answers. Raises ValueError, and queues none, if one can never fit."""
        self.add([answer.request for answer in answers])

    def updates(self, answers: Iterable[Answer]) -> list[Update]:
        """What is new in these answers, at most one update each. If nothing is, runs one step first.

        Other threads may run steps at the same time: a token that came with another thread's step is not missed.
        """
        with self._lock:
            updates = self._read(answers)
            if not updates:
                self.step()
                updates = self._read(answers)
            return updates

    def _read(self, answers: Iterable[Answer]) -> list[Update]:
        """Reads each answer, and frees the slots of those that a stop string ended."""
        updates = [update for answer in answers if (update := answer.read()) is not None]
        if finished := [update.answer.request for update in updates if update.finished]:
            self.cancel(finished)
        return updates

    def finish(self, answer: Answer) -> None:
        """Ends an answer, with "stop", after the tokens that its caller has read, and frees its slot and pages."""
        with self._lock:
            answer.finish()
            self.cancel([answer.request])

    # ---------------------------------------------------------------- requests

    def add(self, requests: Iterable[Request]) -> None:
        """Queues requests. Raises ValueError, and queues none, if one can never fit."""
        requests = list(requests)
        for request in requests:
            needed = len(request.prompt_ids) + request.max_tokens
            if needed > self.max_seq_len:
                raise ValueError(
                    f"a prompt of {len(request.prompt_ids)} tokens and {request.max_tokens} more are {needed}, and the "
                    f"window is {self.max_seq_len}: shorten the prompt, ask for less, or widen the window"
                )
        with self._lock:
            self._scheduler.waiting.extend(requests)

    def cancel(self, requests: Iterable[Request]) -> None:
        """Takes requests out and frees their slots and pages; those that have not finished end with "abort"."""
        with self._lock, torch.inference_mode(), self._on_device():
            requests = list(requests)
            for request in requests:
                if request.finish_reason is None:
                    request.finish("abort")
            for slot in self._scheduler.remove(requests):
                self._state.clear(slot.index)

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._scheduler.waiting or self._scheduler.active)

    def serves(self, model: LanguageModel, max_batch_size: int, max_seq_len: int) -> bool:
        """Whether this engine is large enough, and has its KV cache on the model's device and in its dtype."""
        return (
            (self.kv_cache.device, self.kv_cache.dtype) == (model.device, model.dtype)
            and self.max_batch_size >= max_batch_size
            and self.max_seq_len >= max_seq_len
        )

    # ---------------------------------------------------------------- one step

    def step(self) -> list[Request]:
        """Schedule, prefill, decode, collect: returns the requests that have a new token.

        An exception on the way, Ctrl-C's included, ends every request with "abort" and leaves the engine as new.
        """
        with self._lock, torch.inference_mode(), self._on_device():
            try:
                scheduled = self._scheduler.schedule()
                if scheduled:
                    self._run_prompts(scheduled)
                if any(slot.request.needs_host for slot in self._scheduler.active):
                    return self._step_on_host()
                self._launch_ahead()
                return self._collect() if len(self._steps) else []
            except BaseException:
                self._abort()
                raise

    def _run_prompts(self, scheduled: list[Slot]) -> None:
        """Prefills the prompts of newly scheduled requests, and samples their first tokens."""
        for slot in scheduled:
            ids = slot.request.prompt_ids
            slot.prompt = torch.tensor(ids, dtype=torch.int64, device=self._model.device)
            inv_freq = inverse_frequencies(self._model.config, len(ids), self._model.device)
            self._state.load(slot, inv_freq)
        last = self._prefill.run([slot for slot in scheduled if slot.twin is None])
        for slot in scheduled:
            if slot.twin is not None:
                # Whole pages are shared; both will write into the last one.
                whole = len(slot.prompt) // PAGE
                end = pages_of(len(slot.prompt))
                self.kv_cache.copy(slot.twin.pages[whole:end], slot.pages[whole:end])
                last[slot] = last[slot.twin]
                slot.twin = None
            self._state.batch.seq_lens[slot.index] = len(slot.prompt)
        self._sample_first_tokens(scheduled, last)

    def _sample_first_tokens(self, scheduled: list[Slot], last: dict[Slot, Tensor]) -> None:
        """Samples the token after each prompt, from its last token's hidden state [1, C]; one report for all."""
        batch_size, ops = self._batch_size(), self._model.model.ops
        scheduled = sorted(scheduled, key=lambda slot: slot.index)
        logits = self._model.head(torch.cat([last[slot] for slot in scheduled]))
        readers: list[Slot | None] = [None] * batch_size
        on_host: list[Request | None] = [None] * batch_size
        for slot in scheduled:
            slot.launched, readers[slot.index] = 1, slot
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
        self._steps.copy_report(readers)

    def _decode_step(self, batch_size: int, tier: Tier) -> None:
        decode.step(self._model, self.kv_cache, self._state.slots(0, batch_size), tier)

    def _launch_ahead(self) -> None:
        """Launches steps until `depth` are in flight, but none after the last token that any slot may have."""
        while len(self._steps) < self._depth:
            unfinished = [slot for slot in self._scheduler.active if slot.launched < slot.request.max_tokens]
            if not unfinished:
                return
            batch_size = self._batch_size()
            for slot in unfinished:
                slot.launched += 1
            self._steps.launch(batch_size, max(slot.tier for slot in unfinished), self._scheduler.slots[:batch_size])

    def _step_on_host(self) -> list[Request]:
        """One step whose logits the host sees. No other is in flight: processors need all tokens before it."""
        moved = [request for _ in range(len(self._steps)) for request in self._collect()]
        active = self._scheduler.active
        if not active or moved:
            return moved
        batch_size, tier = self._batch_size(), max(slot.tier for slot in active)
        slots, state = self._scheduler.slots[:batch_size], self._state.slots(0, batch_size)
        logits = decode.forward(self._model, self.kv_cache, state)
        requests = [None if slot is None else slot.request for slot in slots]
        sample_with_hooks(self._model.model.ops, logits, state, tier, requests)
        for slot in active:
            slot.launched += 1
        self._steps.copy_report(slots)
        return self._collect()

    def _collect(self) -> list[Request]:
        """Gives the tokens of the oldest step in flight to their requests; frees the slots of those that end."""
        moved = []
        for slot, report in self._steps.collect():
            request = slot.request
            if request.finish_reason is None:  # else it was cancelled meanwhile
                request.append(report.token, report.logprob, report.end)
                moved.append(request)
                if request.finish_reason is not None:
                    self._scheduler.free(slot)
                    self._state.clear(slot.index)
        return moved

    def _batch_size(self) -> int:
        """The batch size of the next step, after closing gaps between slots if that makes it smaller."""
        for source, target in self._scheduler.compact():
            self._state.move(source, target)
        return self._scheduler.batch_size

    def _padded(self, slots: int) -> int:
        """Captured steps have a few batch sizes only: powers of two."""
        return slots if self._eager else min(1 << (slots - 1).bit_length(), self.max_batch_size)

    def _abort(self) -> None:
        """Ends every request, and starts again with all slots and pages free."""
        for request in self._scheduler.clear():
            if request.finish_reason is None:
                request.finish("abort")
        self._steps.drain()
        self._state.batch.seq_lens.zero_()

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """One stream orders all work, whatever thread asks for it."""
        device = self._model.device
        if device.type == "cpu":
            return torch.autocast("cpu", enabled=False)  # dtypes are the model's, whatever surrounds the call
        return torch.cuda.stream(torch.cuda.default_stream(device))

    # ---------------------------------------------------------------- warm-up

    def warm_up(self) -> None:
        """Compiles every kernel and captures every step that requests can need, so that no request waits for that.

        Raises RuntimeError while requests wait or run: their slots would advance.
        """
        with self._lock, torch.inference_mode(), self._on_device():
            if self.busy:
                raise RuntimeError("warm up before requests come, or when all have ended: some are under way")
            if self._model.device.type != "cpu":
                compile_kernels(self._model, self.kv_cache, self._state.slots(0, 1), self.pages, self.max_seq_len)
            # Without graphs a step only needs to be compiled, and kernels differ for one sequence and several only.
            most = min(self.max_batch_size, 2) if self._eager else self.max_batch_size
            for batch_size in sorted({self._padded(slots) for slots in range(1, most + 1)}):
                for tier in Tier:
                    self._steps.capture(batch_size, tier)
            self._prefill.warm_up(self.max_seq_len)


def _neighbours(scheduled: list[Slot]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive slots, which can be sampled in one call: begin and end in `scheduled`. None on the host."""
    runs = [(slot.index - position, slot.request.needs_host) for position, slot in enumerate(scheduled)]
    end = 0
    for (_, needs_host), run in itertools.groupby(runs):
        begin, end = end, end + len(list(run))
        if not needs_host:
            yield begin, end
