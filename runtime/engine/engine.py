"""The engine: requests from any number of threads are scheduled, prefilled and decoded together."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..model.kv_cache import PAGE, PagedKVCache, pages_of
from ..model.model import LanguageModel
from ..model.rope import inverse_frequencies
from ..model.weights import WeightsState
from . import decode
from .answer import Answer, Update
from .exclusive import Exclusive, Reentered, held_back_interrupts
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

WEIGHTS_CHANGED = "the model's weights changed while this answer waited or was under way: ask again"
CUDA_AFTER_FORK = (
    "this process was forked from one that uses the GPU, and CUDA does not survive a fork: start it with the "
    'multiprocessing method "spawn" or "forkserver", and load the model there'
)


class Engine(Exclusive):
    """Runs requests together, as they come. What a request gets does not depend on the others.

    The loop is `run`, or, for callers whose requests come one by one, `submit` and `updates`. An engine does not keep
    its model alive.

    An error in a step that requests share, or Ctrl-C a second time while a step waits for its end, ends all of them
    with "abort" and leaves the engine as new. An error in a logits processor ends the requests of its call only.

    The KV cache and captured steps belong to one state of the weights (see `WeightsState`). When a request comes or
    ends and they have changed, both are dropped, and whatever waits or runs ends with "error".

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
        super().__init__()
        config, device = model.config, model.device
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        self._model: LanguageModel = weakref.proxy(model)  # type: ignore[assignment]
        count = page_budget(config, model.dtype, device, max_batch_size, max_seq_len, cache_tokens)
        self._eager = capture is eager or (capture is None and device.type == "cpu")
        self._depth = depth or (1 if device.type == "cpu" and self._eager else DEPTH)
        self._capture = capture or (eager if self._eager else cuda_graphs())
        self._padded = partial(_padded, limit=None if self._eager else max_batch_size)
        self.pages = PageAllocator(count)
        self._scheduler = Scheduler(config, max_batch_size, self.pages, model.model.batch_invariant, self._padded)
        with self._on_device():
            self.kv_cache = PagedKVCache(config, count, model.dtype, device)
            self._state = DecodeState.idle(
                max_batch_size, pages_of(max_seq_len), config.vocab_size, config.head_dim, device
            )
            self._capture_anew()

    def _capture_anew(self) -> None:
        """Begins with no captured step, for the weights as they are."""
        step = partial(_decode_step, self._model, self.kv_cache, self._state)
        self._steps = StepQueue(step, self._state.report, self._capture)
        capture = None if self._eager else self._capture
        self._prefill = Prefill(self._model, self.kv_cache, self._state, capture)
        self._weights = WeightsState(self._model)

    # ---------------------------------------------------------------- the loop

    def run(self, answers: Sequence[Answer]) -> Generator[list[Update], None, None]:
        """Runs answers to their end; yields what is new, at most one update of each answer at a time.

        Closing the iterator cancels what has not finished, and frees its slots and pages at once.

        Raises:
            whatever a logits processor of these answers' call raised.
            RuntimeError: an error in a step shared with other callers ended an answer; or a logits processor of the
                same model calls this.
        """
        unfinished = list(answers)
        try:
            self.submit(unfinished)
            while unfinished:
                updates = self.updates(unfinished)
                finished = [update.answer.request for update in updates if update.finished]
                if aborted := [request for request in finished if request.finish_reason == "abort"]:
                    raise _why(aborted)
                if updates:
                    yield updates
                    unfinished = [answer for answer in unfinished if not answer.finished]
        finally:
            self.cancel([answer.request for answer in answers])

    def submit(self, answers: Iterable[Answer]) -> None:
        """Queues answers. Raises ValueError, and queues none, if one can never fit.

        An answer that is no longer referenced ends at the next step, with "abort".
        """
        answers = list(answers)
        for answer in answers:
            answer.request.reader = weakref.ref(answer)
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
            with self.exclusively():
                if self._weights_changed():
                    for request in finished:
                        request.finish("error", WEIGHTS_CHANGED)
                self._free_ended()
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
        with self.exclusively():
            self._weights_changed()
            self._scheduler.waiting.extend(requests)

    def cancel(self, requests: Iterable[Request]) -> None:
        """Takes requests out and frees their slots and pages; those that have not finished end with "abort"."""
        requests = set(requests)
        with held_back_interrupts():
            for request in requests:
                if request.finish_reason is None:
                    request.finish("abort")
            # Inside a step the garbage collector may close a stream: then the next step frees what it had.
            with contextlib.suppress(Reentered), self.exclusively():
                self._scheduler.forget(requests)
                self._free_ended()

    def _free_ended(self) -> None:
        """Frees the slots of requests that have ended, and of those whose readers are gone."""
        for slot in self._scheduler.free_ended():
            self._state.clear(slot.index)

    def drop_if_stale(self) -> None:
        """If the weights have changed, ends all requests, and drops what was computed with those of before."""
        with self.exclusively():
            self._weights_changed()

    def _weights_changed(self) -> bool:
        """Whether they have; see `drop_if_stale`."""
        if not self._weights.changed(self._model):
            return False
        self._end_all("error", WEIGHTS_CHANGED)
        self._capture_anew()
        return True

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._scheduler.waiting or self._scheduler.active)

    def serves(self, model: LanguageModel, max_batch_size: int, max_seq_len: int) -> bool:
        """Whether this engine is large enough, and is what the model's device, dtype and promises need."""
        return (
            (self.kv_cache.device, self.kv_cache.dtype) == (model.device, model.dtype)
            and self._scheduler.batch_invariant == model.model.batch_invariant
            and self.max_batch_size >= max_batch_size
            and self.max_seq_len >= max_seq_len
        )

    # ---------------------------------------------------------------- one step

    def step(self) -> list[Request]:
        """Schedule, prefill, decode, collect: returns the requests that have a new token."""
        with self.exclusively():
            try:
                return self._step()
            except Exception:
                if not self._weights_changed():  # to another dtype or device, say, which is why it failed
                    raise
                return []

    def _step(self) -> list[Request]:
        self._free_ended()
        scheduled = self._scheduler.schedule()
        if scheduled:
            self._run_prompts(scheduled)
        if any(slot.request.needs_host for slot in self._scheduler.active):
            return self._step_on_host()
        self._launch_ahead()
        return self._collect() if len(self._steps) else []

    def _run_prompts(self, scheduled: list[Slot]) -> None:
        """Prefills the prompts of newly scheduled requests, and samples their first tokens."""
        for slot in scheduled:
            ids = slot.request.prompt_ids
            slot.prompt = torch.tensor(ids, device=self._model.device)
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
            self._free_ended()
        self._steps.copy_report(readers)

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
        self._free_ended()
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

    def _end_all(self, reason: str, message: str | None = None) -> None:
        """Ends every request, and starts again with all slots and pages free."""
        for request in self._scheduler.clear():
            if request.finish_reason is None:
                request.finish(reason, message)
        self._steps.drain()
        self._state.batch.seq_lens.zero_()

    def repair(self) -> None:
        """Ends every request with "abort"."""
        if self.forked:
            # The threads that OpenMP's pool had are not in the child, which would wait for them.
            torch.set_num_threads(1)
        with torch.inference_mode(), self._on_device():
            self._end_all("abort")

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """As in Exclusive; on the device's stream. Raises RuntimeError on a GPU after a fork."""
        if self.forked and self.kv_cache.device.type == "cuda":
            raise RuntimeError(CUDA_AFTER_FORK)
        with super().exclusively(), torch.inference_mode(), self._on_device():
            yield

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """One stream orders all work, whatever thread asks for it."""
        device = self._model.device
        if device.type == "cpu":
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.default_stream(device))

    # ---------------------------------------------------------------- warm-up

    def warm_up(self) -> None:
        """Compiles every kernel and captures every step that requests can need, so that no request waits for that.

        Raises RuntimeError while requests wait or run: their slots would advance.
        """
        if self.busy:
            raise RuntimeError("warm up before requests come, or when all have ended: some are under way")
        with self.exclusively():
            if self._model.device.type != "cpu":
                compile_kernels(self._model, self.kv_cache, self._state.slots(0, 1), self.pages, self.max_seq_len)
            # Without graphs a step only needs to be compiled, and kernels differ for one sequence and several only.
            most = min(self.max_batch_size, 2) if self._eager else self.max_batch_size
            for batch_size in sorted({self._padded(slots) for slots in range(1, most + 1)}):
                for tier in Tier:
                    self._steps.capture(batch_size, tier)
            self._prefill.warm_up(self.max_seq_len)


def _decode_step(model: LanguageModel, kv_cache: PagedKVCache, state: DecodeState, batch_size: int, tier: Tier) -> None:
    """A decode step of the first slots."""
    decode.step(model, kv_cache, state.slots(0, batch_size), tier)


def _padded(slots: int, limit: int | None) -> int:
    """The batch size of a step. Captured steps, which have a limit, have a few only: powers of two."""
    return slots if limit is None else min(1 << (slots - 1).bit_length(), limit)


def _why(aborted: Sequence[Request]) -> BaseException:
    """The exception for a caller whose requests were aborted: their own processor's, if there is one."""
    for hooks in [request.hooks for request in aborted if request.hooks is not None]:
        error, hooks.error = hooks.error, None  # not kept, since its traceback leads to the engine and the model
        if error is not None:
            return error
    return RuntimeError("the answer was broken off by an error in a step shared with other calls: try again")


def _neighbours(scheduled: list[Slot]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive slots, which can be sampled in one call: begin and end in `scheduled`. None on the host."""
    runs = [(slot.index - position, slot.request.needs_host) for position, slot in enumerate(scheduled)]
    end = 0
    for (_, needs_host), run in itertools.groupby(runs):
        begin, end = end, end + len(list(run))
        if not needs_host:
            yield begin, end
