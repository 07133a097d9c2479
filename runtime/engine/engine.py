"""Requests through the model: they wait, are admitted and filled, decode together, and leave."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.model import LanguageModel
from ..model.pages import PAGE, Pages, Sequences, budget, pages_of
from ..model.rope import inverse_frequencies, rope_base
from . import decode
from .graphs import Capture, Replays, cuda_graphs, eager
from .prefill import Filler
from .request import Request
from .state import DecodeState, Tier, tier_of

# Steps that are under way while the host reads. It needs tenths of a millisecond a step and a step takes several, so
# two hide it; each more would delay the next prompt, and run for nothing behind an end.
DEPTH = 2


@dataclass(eq=False)
class _Running:
    """A request with a row. queued: how many of its tokens the device has been told to draw."""

    request: Request
    row: int
    prompt: Tensor  # [T] int64, on the device
    pages: list[int]
    tier: Tier
    queued: int = 0


class Engine:
    """Decodes requests together as they come, for any number of threads: a request's tokens depend on it alone.

    Args:
        max_rows: how many are decoded together; more wait.
        max_seq_len: the most tokens that one has, prompt and answer.
        cache_tokens: tokens that the cache holds in all, a window at least; by default windows for all rows, but at
            most half of the memory that is free.
        capture: what makes of a step something to run again; CUDA graphs on a GPU by default, the step itself on a CPU.
        depth: how many steps are under way while the host reads; by default none but its own on a CPU.

    Raises MemoryError, with the arithmetic, where not even one window fits.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_rows: int = 16,
        max_seq_len: int,
        cache_tokens: int | None = None,
        capture: Capture | None = None,
        depth: int | None = None,
    ):
        config, device = model.config, model.device
        self.max_rows, self.max_seq_len = max_rows, max_seq_len
        self._model = model
        count = budget(config, model.dtype, device, max_rows, max_seq_len, cache_tokens)
        self._lock = threading.RLock()
        self._waiting: deque[Request] = deque()
        self._rows: list[_Running | None] = [None] * max_rows
        with self._on_device():
            self.pages = Pages(config, count, model.dtype, device)
            self._state = DecodeState.idle(max_rows, pages_of(max_seq_len), config.vocab_size, config.head_dim, device)
        self._eager = capture is eager or (capture is None and device.type == "cpu")
        self._depth = depth or (1 if device.type == "cpu" and self._eager else DEPTH)
        capture = capture or (eager if self._eager else cuda_graphs())
        self._replays = Replays(self._step, self._state.report, capture)
        with self._on_device():
            self._filler = None if self._eager else Filler(model, self.pages, pages_of(max_seq_len), capture)

    # ---------------------------------------------------------------- what callers do

    def add(self, requests: Iterable[Request]) -> None:
        """Lets requests wait for a row. Raises ValueError, and adds none, where one can never fit."""
        requests = list(requests)
        for request in requests:
            needed = len(request.prompt_ids) + request.max_tokens
            if needed > self.max_seq_len:
                raise ValueError(
                    f"a prompt of {len(request.prompt_ids)} tokens and {request.max_tokens} more are {needed}, and the "
                    f"window is {self.max_seq_len}: shorten the prompt, ask for less, or widen the window"
                )
        with self._lock:
            self._waiting.extend(requests)

    def step(self, unless: Callable[[], bool] = lambda: False) -> list[Request]:
        """Waits for the next tokens, and keeps the device busy; returns the requests that have got one.

        `unless` is asked first, while no other thread steps: if it is true nothing is done. So a reader who looks for
        tokens in it misses none that came with another thread's step.

        An exception on the way, Ctrl-C's included, ends every request with "abort" and leaves an engine as new.
        """
        with self._lock, torch.inference_mode(), self._on_device():
            if unless():
                return []
            try:
                self._admit()
                if any(running.request.watched for running in self._running()):
                    return self._watched_step()
                self._run_ahead()
                return self._take() if len(self._replays) else []
            except BaseException:
                self._abort()
                raise

    def cancel(self, requests: Iterable[Request]) -> None:
        """Ends requests that wait or run, with "abort" where nothing else ended them; their rows and pages are free."""
        with self._lock, torch.inference_mode(), self._on_device():
            for request in requests:
                if request in self._waiting:
                    self._waiting.remove(request)
                if request.finish_reason is None:
                    request.finish("abort")
                for running in self._running():
                    if running.request is request:
                        self._leave(running)

    @contextlib.contextmanager
    def running(self, requests: Sequence[Request]) -> Iterator[None]:
        """Adds requests for the time of a block, at whose end those that have not ended are cancelled.

        Raises RuntimeError at its end where an error in another thread's step broke one off.
        """
        self.add(requests)
        try:
            yield
            if any(request.finish_reason == "abort" for request in requests):
                raise RuntimeError("the answer was broken off by an error in a step shared with other calls: try again")
        finally:
            self.cancel(requests)

    def serves(self, model: LanguageModel, rows: int, max_seq_len: int) -> bool:
        """Whether this engine has room for so much, and lies where the model is."""
        kv = self.pages.kv[0]
        return (
            (kv.device, kv.dtype) == (model.device, model.dtype)
            and self.max_rows >= rows
            and self.max_seq_len >= max_seq_len
        )

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running())

    def warm_up(self) -> None:
        """Compiles every kernel and captures every step that requests can need, so that none of them waits for it.

        Raises RuntimeError while requests wait or run: their rows would move on.
        """
        with self._lock, torch.inference_mode(), self._on_device():
            if self.busy:
                raise RuntimeError("warm up before requests come, or when all have ended: some are under way")
            if self._model.device.type != "cpu":
                self._compile()
            # Without graphs a step is only to be compiled, and its kernels know one row and several.
            most = min(self.max_rows, 2) if self._eager else self.max_rows
            for rows in sorted({self._size(rows) for rows in range(1, most + 1)}):
                for tier in Tier:
                    self._replays.prepare(rows, tier)
            if self._filler is not None:
                self._filler.warm_up(self.max_seq_len)

    def _compile(self) -> None:
        longest = min(self.max_seq_len, decode.CHUNK)
        pages, state = self.pages.take(pages_of(longest)), self._state.rows(0, 1)
        try:
            state.seqs.block_table[0, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            decode.compile_all(self._model, self.pages, state, longest)
        finally:
            self.pages.release(pages)

    # ---------------------------------------------------------------- one step

    def _step(self, rows: int, tier: Tier) -> None:
        decode.step(self._model, self.pages, self._state.rows(0, rows), tier)

    def _run_ahead(self) -> None:
        """Queues steps until enough are under way, but none behind what every row was asked for."""
        while len(self._replays) < self._depth:
            wanted = [running for running in self._running() if running.queued < running.request.max_tokens]
            if not wanted:
                return
            rows = self._width()
            for running in wanted:
                running.queued += 1
            self._replays.queue(rows, max(running.tier for running in wanted), self._rows[:rows])

    def _watched_step(self) -> list[Request]:
        """One step whose logits the host sees. It has no other under way: processors need to know all tokens."""
        moved = [request for _ in range(len(self._replays)) for request in self._take()]
        if not self._running() or moved:
            return moved
        rows, tier = self._width(), max(running.tier for running in self._running())
        state = self._state.rows(0, rows)
        logits = decode.forward(self._model, self.pages, state)
        requests = [None if running is None else running.request for running in self._rows[:rows]]
        decode.watched(self._model.model.ops, logits, state, tier, requests)
        for running in self._running():
            running.queued += 1
        self._replays.tell(self._rows[:rows])
        return self._take()

    def _take(self) -> list[Request]:
        """Gives the tokens of the oldest step under way to their requests."""
        moved = []
        for running, told in self._replays.take():
            request = running.request
            if request.finish_reason is None:  # else it was cancelled meanwhile
                request.add(told.token, told.logprob, told.end)
                moved.append(request)
                if request.finish_reason is not None:
                    self._leave(running)
        return moved

    # ---------------------------------------------------------------- coming and going

    def _admit(self) -> None:
        """Gives rows to those who wait, in their order, while there are rows and pages; draws their first tokens."""
        admitted: list[_Running] = []
        short: list[_Running] = []
        firsts: dict[tuple[int, ...], _Running] = {}
        last: dict[_Running, Tensor] = {}  # of a prompt's rows, [1, C]
        while self._waiting and None in self._rows:
            prompt = tuple(self._waiting[0].prompt_ids)
            first = firsts.get(prompt)
            running = self._seat(self._waiting[0], [] if first is None else first.pages)
            if running is None:
                break
            self._waiting.popleft()
            admitted.append(running)
            if first is None:
                firsts[prompt] = running
                if self._model.model.may_share(len(prompt)) and len(prompt) < decode.CHUNK:
                    short.append(running)
                else:
                    last[running] = self._fill(running)
        for group in _groups(short):
            if len(group) == 1:
                last[group[0]] = self._fill(group[0])
            else:
                last.update(zip(group, self._fill_together(group).split(1), strict=True))
        for running in admitted:
            first = firsts[tuple(running.request.prompt_ids)]
            if running is not first:
                self._copy(first, running)
                last[running] = last[first]
            self._state.seqs.seq_lens[running.row] = len(running.prompt)
        if admitted:
            self._first_tokens(admitted, last)

    def _seat(self, request: Request, twin: list[int]) -> _Running | None:
        """A row and pages for a request, or None where there are not enough of them; its row stays idle.

        Pages are shared where they hold its prompt: all whole ones of a `twin`, which asks the same, else those of
        whole chunks that an earlier prompt has filled, but for the last token, which must run.
        """
        ids, root = request.prompt_ids, self._root(request)
        shared = twin[: len(ids) // PAGE]
        if twin:
            self.pages.hold(shared)
        else:
            shared = self.pages.match(ids[: len(ids) - 1], root, max(decode.CHUNK // PAGE, 1))
        missing = pages_of(len(ids) + request.max_tokens) - len(shared)
        if missing > self.pages.free:
            self.pages.release(shared)
            return None
        pages = shared + self.pages.take(missing, behind=shared[-1] if shared else None)
        prompt = torch.tensor(ids, device=self._model.device)
        running = _Running(request, self._rows.index(None), prompt, pages, tier_of(request))
        self._rows[running.row] = running
        request.began = time.perf_counter()
        request.cached_tokens = len(ids) if twin else len(shared) * PAGE
        inv_freq = inverse_frequencies(self._model.config, len(ids), self._model.device)
        self._state.load(running.row, request, prompt, pages, inv_freq)
        return running

    def _fill(self, running: _Running) -> Tensor:
        """The part of the prompt that no shared page holds, into its pages; its last token's row [1, C]."""
        request, row = running.request, running.row
        ids = request.prompt_ids
        seqs = self._state.rows(row, row + 1).seqs
        if self._filler is None:
            last = decode.prefill(self._model, self.pages, seqs, [running.prompt], request.cached_tokens)
        else:
            last = self._filler.fill(seqs, running.prompt, request.cached_tokens)
        # Only what whole chunks wrote: a prompt that goes on from there is cut at the same places.
        whole = len(ids) // decode.CHUNK * decode.CHUNK // PAGE
        self.pages.name(running.pages[:whole], ids[: whole * PAGE], self._root(request))
        return last

    def _fill_together(self, group: list[_Running]) -> Tensor:
        """Prompts of less than a chunk, which leave nothing to be shared, into their pages; their last rows [B, C]."""
        rows, seqs = [running.row for running in group], self._state.seqs
        seqs = Sequences(seqs.block_table[rows], seqs.seq_lens[rows], seqs.inv_freq[rows])
        return decode.prefill(self._model, self.pages, seqs, [running.prompt for running in group])

    def _copy(self, first: _Running, running: _Running) -> None:
        """The page that two of one prompt will both write into."""
        whole, rest = divmod(len(running.prompt), PAGE)
        if rest:
            self.pages.copy(first.pages[whole : whole + 1], running.pages[whole : whole + 1])

    def _root(self, request: Request) -> bytes:
        """What keys and values follow from besides tokens: the rotary base."""
        return repr(rope_base(self._model.config, len(request.prompt_ids))).encode()

    def _first_tokens(self, admitted: list[_Running], last: dict[_Running, Tensor]) -> None:
        """Draws behind each prompt's last row [1, C], and tells the host of all of them at once."""
        rows, ops = self._width(), self._model.model.ops
        admitted = sorted(admitted, key=lambda running: running.row)
        logits = self._model.head(torch.cat([last[running] for running in admitted]))
        notes: list[_Running | None] = [None] * rows
        watched: list[Request | None] = [None] * rows
        for running in admitted:
            running.queued, notes[running.row] = 1, running
            if running.request.watched:
                watched[running.row] = running.request
        for begin, end in _neighbours(admitted):
            group = self._state.rows(admitted[begin].row, admitted[end - 1].row + 1)
            decode.choose(ops, logits[begin:end], group, max(running.tier for running in admitted[begin:end]))
        if any(watched):
            every = logits.new_zeros(rows, logits.shape[1])
            every[[running.row for running in admitted]] = logits
            tier = max(running.tier for running in admitted)
            decode.watched(ops, every, self._state.rows(0, rows), tier, watched)
        self._replays.tell(notes)

    def _leave(self, running: _Running) -> None:
        """Frees a request's row and pages. What is under way on them comes before whatever takes them over."""
        self._rows[running.row] = None
        self._state.clear(running.row)
        self.pages.release(running.pages)

    def _abort(self) -> None:
        """Ends every request, and begins anew."""
        for request in [*self._waiting, *(running.request for running in self._running())]:
            if request.finish_reason is None:
                request.finish("abort")
        self._waiting.clear()
        self._rows = [None] * self.max_rows
        self._replays.drop()
        self._state.seqs.seq_lens.zero_()
        self.pages.reset()

    # ---------------------------------------------------------------- rows

    def _running(self) -> list[_Running]:
        return [running for running in self._rows if running is not None]

    def _width(self) -> int:
        """How many rows a step has: those up to the last one in use; where steps are captured, few sizes do for all.

        Where there are gaps the last rows move into them, if a smaller step then fits.
        """
        while (last := self._running()[-1]) and self._size(len(self._running())) < self._size(last.row + 1):
            gap = self._rows.index(None)
            self._state.move(last.row, gap)
            self._rows[gap], self._rows[last.row] = last, None
            last.row = gap
        return self._size(last.row + 1)

    def _size(self, rows: int) -> int:
        return rows if self._eager else min(1 << (rows - 1).bit_length(), self.max_rows)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """One stream orders all work, whatever thread asks for it."""
        device = self._model.device
        if device.type == "cpu":
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.default_stream(device))


def _groups(short: list[_Running]) -> Iterator[list[_Running]]:
    """Those that share a launch: padded to one length they are TOGETHER tokens at most, a quarter of it padding."""
    group: list[_Running] = []
    for running in sorted(short, key=lambda running: len(running.prompt), reverse=True):
        longest = len(group[0].prompt) if group else 0
        if (len(group) + 1) * longest > decode.TOGETHER or 4 * len(running.prompt) < 3 * longest:
            yield group
            group = []
        group.append(running)
    if group:
        yield group


def _neighbours(admitted: list[_Running]) -> Iterator[tuple[int, int]]:
    """Those in rows one behind the other, which can share a draw: begin and end in `admitted`. None that is watched."""
    alike = [(running.row - index, running.request.watched) for index, running in enumerate(admitted)]
    end = 0
    for (_, watched), group in itertools.groupby(alike):
        begin, end = end, end + len(list(group))
        if not watched:
            yield begin, end
