"""The engine: requests from any number of threads are scheduled, prefilled and decoded together."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence

import torch

from ..model.kv_cache import PagedKVCache
from ..model.model import LanguageModel
from .answer import Answer, Update
from .exclusive import Exclusive, Reentered, held_back_interrupts
from .graphs import Capture
from .pages import PageAllocator, page_budget
from .request import Request
from .runner import Runner

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
        speculation: whether steps verify drafts (see `Speculation`); by default where they cost little: on a GPU.

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
        speculation: bool | None = None,
    ):
        super().__init__()
        device = self._device = model.device
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        count = page_budget(model.config, model.dtype, device, max_batch_size, max_seq_len, cache_tokens)
        with self._on_device():
            self._runner = Runner(model, count, max_batch_size, max_seq_len, capture, depth, speculation)

    @property
    def pages(self) -> PageAllocator:
        """The pages of the KV cache, and who uses them."""
        return self._runner.pages

    @property
    def kv_cache(self) -> PagedKVCache:
        return self._runner.kv_cache

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
                    raise why_aborted(aborted)
                if updates:
                    yield updates
                    unfinished = [answer for answer in unfinished if not answer.finished]
                else:
                    # A prompt is under way. Locks are not fair: a thread that waits for this one's gets it now.
                    time.sleep(1e-4)
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
            updates = self.read(answers)
            if not updates:
                self.step()
                updates = self.read(answers)
            return updates

    def read(self, answers: Iterable[Answer]) -> list[Update]:
        """What is new in these answers, at most one update each. Frees the slots of those that a stop string ended."""
        with self._lock:
            updates = [update for answer in answers if (update := answer.read()) is not None]
            if finished := [update.answer.request for update in updates if update.finished]:
                with self.exclusively():
                    if self._runner.drop_if_stale(WEIGHTS_CHANGED):
                        for request in finished:
                            request.finish("error", WEIGHTS_CHANGED)
                    self._runner.free_ended()
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
            self._runner.drop_if_stale(WEIGHTS_CHANGED)
            self._runner.scheduler.add(requests)

    def cancel(self, requests: Iterable[Request]) -> None:
        """Takes requests out and frees their slots and pages; those that have not finished end with "abort"."""
        requests = set(requests)
        with held_back_interrupts():
            for request in requests:
                if request.finish_reason is None:
                    request.finish("abort")
            # Inside a step the garbage collector may close a stream: then the next step frees what it had.
            with contextlib.suppress(Reentered), self.exclusively():
                self._runner.scheduler.forget(requests)
                self._runner.free_ended()

    def drop_if_stale(self) -> None:
        """If the weights have changed, ends all requests, and drops what was computed with those of before."""
        with self.exclusively():
            self._runner.drop_if_stale(WEIGHTS_CHANGED)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return len(self._runner.scheduler.waiting)

    @property
    def running(self) -> int:
        """The number of requests that have a slot."""
        return len(self._runner.scheduler.active)

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def serves(self, model: LanguageModel, max_batch_size: int, max_seq_len: int) -> bool:
        """Whether this engine is large enough, and is what the model's device, dtype and promises need."""
        return (
            (self.kv_cache.device, self.kv_cache.dtype) == (model.device, model.dtype)
            and self._runner.scheduler.batch_invariant == model.model.batch_invariant
            and self.max_batch_size >= max_batch_size
            and self.max_seq_len >= max_seq_len
        )

    # ---------------------------------------------------------------- steps

    def step(self) -> list[Request]:
        """Schedule, prefill, decode, collect: returns the requests that have a new token."""
        with self.exclusively():
            try:
                return self._runner.step()
            except Exception:
                # A step fails, too, because weights were moved, or have another dtype.
                if not self._runner.drop_if_stale(WEIGHTS_CHANGED):
                    raise
                return []

    def warm_up(self) -> None:
        """Compiles every kernel and captures every step that requests can need, so that no request waits for that.

        Raises RuntimeError while requests wait or run: their slots would advance.
        """
        if self.busy:
            raise RuntimeError("warm up before requests come, or when all have ended: some are under way")
        with self.exclusively():
            self._runner.warm_up()

    def repair(self) -> None:
        """Ends every request with "abort"."""
        if self.forked:
            # The threads that OpenMP's pool had are not in the child, which would wait for them.
            torch.set_num_threads(1)
        with torch.inference_mode(), self._on_device():
            self._runner.end_all("abort")

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """For work on the model that is no request's: other threads' steps wait for its end. It may fail."""
        with self._lock, torch.inference_mode(), self._on_device():
            yield

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """As in Exclusive; on the device's stream. Raises RuntimeError on a GPU after a fork."""
        if self.forked and self._device.type == "cuda":
            raise RuntimeError(CUDA_AFTER_FORK)
        with super().exclusively(), torch.inference_mode(), self._on_device():
            yield

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """One stream orders all work, whatever thread asks for it. Dtypes are the model's, whatever surrounds it."""
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.stream(torch.cuda.default_stream(self._device)) if on_gpu else contextlib.nullcontext()
        with torch.autocast(self._device.type, enabled=False), stream:
            yield


def why_aborted(aborted: Sequence[Request]) -> BaseException:
    """The exception for a caller whose requests were aborted: their own processor's, if there is one."""
    for hooks in [request.hooks for request in aborted if request.hooks is not None]:
        error, hooks.error = hooks.error, None  # not kept, since its traceback leads to the engine and the model
        if error is not None:
            return error
    return RuntimeError("the answer was broken off by an error in a step shared with other calls: try again")
