"""An engine in a thread of its own, for callers that must not wait: answers go in by an inbox, and updates come out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from .answer import Answer, Update
from .engine import Engine
from .request import Request


class QueueFull(RuntimeError):
    """More requests would wait than may."""


@dataclass
class _Inbox:
    """What callers have asked for since the last step."""

    submitted: list[Answer] = field(default_factory=list)
    cancelled: list[Answer] = field(default_factory=list)


# Called with the updates of each reader's answers, those of one answer in order, and what ended all answers if an
# exception did.
Deliver = Callable[[Mapping[Hashable, list[Update]], BaseException | None], None]


class EngineThread:
    """Runs the steps of an engine in a thread of its own, while there is something to run.

    `submit` and `cancel` don't wait for a step: the thread does what they ask for before its next one. A request that
    waits for a slot costs a step nothing. Other threads may use the same engine at the same time.

    Args:
        engine: returns the engine as it is when a step begins.
        deliver: called in the thread after each step that brought something. Must not raise.
    """

    def __init__(self, engine: Callable[[], Engine], deliver: Deliver):
        self._engine, self._deliver = engine, deliver
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._inbox = _Inbox()
        self._readers: dict[Answer, Hashable] = {}
        self._on_the_way = 0  # answers that were taken from the inbox, and that the engine does not have yet
        # The rest belongs to the thread.
        self._answers: dict[Request, Answer] = {}  # those that have not finished
        self._changed: set[Request] = set()  # since they were read
        self._current: Engine | None = None

    def submit(self, answers: Iterable[Answer], reader: Hashable, max_waiting: int | None = None) -> None:
        """Queues answers, whose updates will be delivered for `reader`.

        Raises QueueFull, and queues none, if more than `max_waiting` requests would wait; RuntimeError after `stop`.
        """
        answers = list(answers)
        for answer in answers:
            answer.request.on_change = self._changed.add
        with self._wake:
            if self._stopped:
                raise RuntimeError("this is closed: make a new one")
            waiting = self.waiting + len(answers)
            if max_waiting is not None and waiting > max_waiting:
                raise QueueFull(f"{waiting} requests would wait, and at most {max_waiting} may: try again later")
            self._inbox.submitted += answers
            self._readers.update(dict.fromkeys(answers, reader))
            if self._thread is None or not self._thread.is_alive():  # the child of a fork has no other threads
                self._thread = threading.Thread(target=self._run, name="internlm3-engine", daemon=True)
                self._thread.start()
            self._wake.notify()

    def cancel(self, answers: Iterable[Answer]) -> None:
        """Ends answers, and frees their slots and pages, before the next step. Nothing more is delivered for them."""
        with self._wake:
            for answer in answers:
                if self._readers.pop(answer, None) is not None:
                    self._inbox.cancelled.append(answer)
            self._wake.notify()

    def stop(self) -> None:
        """Ends all answers, with "abort", and then the thread."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        engine = self._current
        return len(self._inbox.submitted) + self._on_the_way + (0 if engine is None else engine.waiting)

    # ---------------------------------------------------------------- in the thread

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._stopped or self._inbox.cancelled or self._inbox.submitted or self._answers):
                    self._wake.wait()
                inbox, self._inbox = self._inbox, _Inbox()
                self._on_the_way = len(inbox.submitted)
            self._answers.update((answer.request, answer) for answer in inbox.submitted)
            try:
                if self._stopped:
                    raise RuntimeError("closed before the answer was complete")
                self._step(inbox)
            except BaseException as error:
                self._fail(error)
                if self._stopped:
                    return

    def _step(self, inbox: _Inbox) -> None:
        engine = self._current = self._engine()
        engine.submit(inbox.submitted)
        self._on_the_way = 0
        engine.cancel(answer.request for answer in inbox.cancelled)
        for answer in inbox.cancelled:
            self._answers.pop(answer.request, None)
        if engine.busy:
            engine.step()
        updates: list[Update] = []
        answers = [self._answers[request] for request in self._take_changed() if request in self._answers]
        while answers:
            new = engine.read(answers)
            updates += new
            answers = [update.answer for update in new if not update.finished]
        self._hand_out(updates, None)

    def _take_changed(self) -> list[Request]:
        """Other threads' steps may add to the set at the same time."""
        return [self._changed.pop() for _ in range(len(self._changed))]

    def _fail(self, error: BaseException) -> None:
        """Ends all answers."""
        if self._current is not None:
            self._current.cancel(self._answers)
        updates = []
        for answer in list(self._answers.values()):
            if answer.request.finish_reason is None:
                answer.request.finish("abort")
            while (update := answer.read()) is not None:
                updates.append(update)
        self._on_the_way = 0
        self._changed.clear()
        self._hand_out(updates, error)

    def _hand_out(self, updates: Iterable[Update], error: BaseException | None) -> None:
        news: dict[Hashable, list[Update]] = {}
        with self._wake:
            for update in updates:
                if (reader := self._readers.get(update.answer)) is not None:
                    news.setdefault(reader, []).append(update)
                if update.finished:
                    self._readers.pop(update.answer, None)
                    self._answers.pop(update.answer.request, None)
        if news:
            self._deliver(news, error)
