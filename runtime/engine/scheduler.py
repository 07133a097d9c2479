"""Which waiting requests get a slot of the batch and pages of the KV cache. Host bookkeeping: it touches no tensor."""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Callable, Iterable, Set

from ..model.config import InternLM3Config
from ..model.kv_cache import PAGE, pages_of
from ..model.rope import rope_base
from . import prefill
from .pages import PageAllocator
from .request import Request
from .state import Slot, tier_of


class Scheduler:
    """First come, first served among requests of one priority: each waits until a slot and enough pages are free.

    A request gets pages for its longest answer at once. While one with a long prompt is prefilled, over several steps,
    the next ones wait: they may share its pages.

    Every whole page of a sequence, prompt and answer, can be reused by later prompts with the same prefix.

    Args:
        batch_invariant: reuse only what is bit-identical to a fresh prefill: whole chunks of prompts, since rounding
            depends on where a prompt is cut, and an answer's pages were written by launches of one token.
        padded: (number of slots in use) -> the batch size that a step runs with.

    Attributes:
        waiting: requests without a slot, in the order in which they get one.
        slots: for each slot of the batch the request that has it, None if it is idle.
    """

    def __init__(
        self,
        config: InternLM3Config,
        max_batch_size: int,
        pages: PageAllocator,
        batch_invariant: bool,
        padded: Callable[[int], int],
    ):
        self.waiting: list[Request] = []
        self.slots: list[Slot | None] = [None] * max_batch_size
        self._config, self._pages, self._padded = config, pages, padded
        self.batch_invariant = batch_invariant

    @property
    def active(self) -> list[Slot]:
        """The slots in use, by index."""
        return [slot for slot in self.slots if slot is not None]

    @property
    def decoding(self) -> list[Slot]:
        """The slots that decode steps run, by index."""
        return [slot for slot in self.slots if slot is not None and slot.started]

    @property
    def prefilling(self) -> Slot | None:
        """The slot whose prompt has not run to its end, if there is one."""
        return next((slot for slot in self.active if not slot.started and slot.twin is None), None)

    def add(self, requests: Iterable[Request]) -> None:
        """Queues requests."""
        for request in requests:
            insort(self.waiting, request, key=lambda each: each.params.priority)

    def schedule(self, room: float) -> list[Slot]:
        """Gives slots and pages to waiting requests, in order, as long as there are enough.

        Args:
            room: what their prompts may cost together; each at most a chunk. If it is a chunk or more, the first prompt
                may be longer: then it comes alone, or with those after it that have the same prompt.
        """
        scheduled: list[Slot] = []
        first_of: dict[tuple[int, ...], Slot] = {}
        while self.waiting and None in self.slots:
            if self.waiting[0].ended:
                self.waiting.pop(0)
                continue
            prompt = tuple(self.waiting[0].prompt_ids)
            most = math.inf if not scheduled and room >= prefill.CHUNK else min(room, prefill.CHUNK)
            twin = first_of.get(prompt)
            slot = self._place(self.waiting[0], twin, most) if twin is not None or most > 0 else None
            if slot is None:
                break
            self.waiting.pop(0)
            first_of.setdefault(prompt, slot)
            scheduled.append(slot)
            room -= 0 if twin is not None else prefill.cost(slot.remaining)
        return scheduled

    def _place(self, request: Request, twin: Slot | None, most: float) -> Slot | None:
        """A slot and pages for a request, None if too few pages are free, or its prompt costs more than `most`.

        Pages that hold its prompt already are shared: all whole pages of `twin`, which has the same prompt, or those
        that an earlier sequence registered. The last token always runs, so its page (or chunk) is not shared.
        """
        ids, root = request.prompt_ids, self._prefix_root(request)
        if twin is not None:
            shared = twin.pages[: len(ids) // PAGE]
            self._pages.retain(shared)
        else:
            shared = self._pages.match_prefix(ids[: len(ids) - 1], root, self._reused_pages)
        missing = pages_of(len(ids) + request.max_tokens) - len(shared)
        cached = len(shared) * PAGE
        if missing > self._pages.free or (twin is None and prefill.cost(len(ids) - cached) > most):
            self._pages.release(shared)
            return None
        pages = shared + self._pages.allocate(missing, after=shared[-1] if shared else None)
        slot = Slot(request, self.slots.index(None), pages, tier_of(request), 0 if twin else cached, twin=twin)
        self.slots[slot.index] = slot
        if twin is None and slot.remaining <= prefill.CHUNK:
            # It runs to its end in this step, and may serve those that are scheduled with it.
            self.register(slot)
        request.began = time.perf_counter()
        request.cached_tokens = len(ids) if twin is not None else cached
        return slot

    @property
    def _reused_pages(self) -> int:
        """Prefixes are reused in multiples of this many pages."""
        return max(prefill.CHUNK // PAGE, 1) if self.batch_invariant else 1

    def register(self, slot: Slot) -> None:
        """Lets later prompts find the pages that hold this one's prompt, as far as they are whole."""
        self._register(slot, slot.request.prompt_ids)

    def _register(self, slot: Slot, ids: list[int]) -> None:
        whole = len(ids) // (PAGE * self._reused_pages) * self._reused_pages
        self._pages.register_prefix(slot.pages[:whole], ids[: whole * PAGE], self._prefix_root(slot.request))

    def _prefix_root(self, request: Request) -> bytes:
        """What keys and values depend on besides the tokens: the rotary base."""
        return repr(rope_base(self._config, len(request.prompt_ids))).encode()

    def forget(self, requests: Set[Request]) -> None:
        """Takes requests out of those that wait."""
        if not requests.isdisjoint(self.waiting):
            self.waiting = [request for request in self.waiting if request not in requests]

    def free_ended(self) -> list[Slot]:
        """Frees the slots of requests that have ended, and returns them."""
        ended = [slot for slot in self.active if slot.request.ended]
        for slot in ended:
            self.free(slot)
        return ended

    def free(self, slot: Slot) -> None:
        """Frees a slot and its pages, which keep the answer for later prompts.

        Steps in flight on them run before whatever uses them next; they write after the tokens that are known here.
        """
        request = slot.request
        self.slots[slot.index] = None
        if not self.batch_invariant and request.finish_reason != "error":
            # The last token has not been through the model.
            ids = request.prompt_ids + request.token_ids[:-1]
            self._register(slot, ids if slot.started else ids[: slot.prefilled])
        self._hand_over(slot)
        self._pages.release(slot.pages)

    def _hand_over(self, slot: Slot) -> None:
        """Lets a slot with the same prompt go on where this one's prefill was broken off."""
        twins = [other for other in self.active if other.twin is slot]
        for heir in twins[:1]:
            heir.twin, heir.prefilled = None, slot.prefilled  # in whole pages, which they share
            heir.request.cached_tokens = slot.request.cached_tokens
        for other in twins[1:]:
            other.twin = twins[0]

    def compact(self) -> list[tuple[int, int]]:
        """Moves the last slots into gaps if that lets steps run with a smaller batch: (from, to) of each move."""
        moves = []
        while self._padded(len(self.active)) < self.batch_size:
            slot, gap = self.active[-1], self.slots.index(None)
            moves.append((slot.index, gap))
            self.slots[gap], self.slots[slot.index] = slot, None
            slot.index = gap
        return moves

    @property
    def batch_size(self) -> int:
        """The batch size of the next step: enough for the last slot that it runs."""
        return self._padded(self.decoding[-1].index + 1)

    def in_step(self, batch_size: int) -> list[Slot | None]:
        """The first slots of the batch, None for those that are idle in a decode step."""
        return [slot if slot is not None and slot.started else None for slot in self.slots[:batch_size]]

    def clear(self) -> list[Request]:
        """Takes all requests out, frees everything, and forgets all prefixes. Returns the requests."""
        requests = [*self.waiting, *(slot.request for slot in self.active)]
        self.waiting.clear()
        self.slots = [None] * len(self.slots)
        self._pages.reset()
        return requests
