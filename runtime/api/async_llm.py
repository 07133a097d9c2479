"""AsyncLLM: LLM for asyncio."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, Hashable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from ..common.checks import check_int
from ..engine.answer import Answer, Update
from ..engine.engine import why_aborted
from ..engine.thread import EngineThread
from ..sampling.params import SamplingParams
from ..tools.schemas import Tool
from .call import Call
from .llm import LLM
from .outputs import Chunk, RequestOutput
from .prompt_logprobs import PromptLogprobs, joined

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..sampling.keywords import SamplingKeywords


class AsyncLLM:
    """The methods of LLM as coroutines and asynchronous iterators, for any number of tasks and event loops.

    The steps of the engine run in a thread of their own. All calls share them, and those of the same LLM's own methods
    do, too. An answer that nobody awaits any more (its task is cancelled, its iterator closed) is gone before the next
    step, and its slot and pages are free.

    A reader that is slower than tokens come holds up nobody: its next chunk has all that came meanwhile.

    Args:
        model: an LLM, or what it takes as its model. Loading blocks: `await asyncio.to_thread(AsyncLLM, "path")`.
        max_waiting: how many requests may wait for a slot; a call that would make it more raises QueueFull. By default
            there is no bound.
        **kwargs: of LLM.

    Attributes:
        llm: the LLM.

    Example:
        async with AsyncLLM("internlm/internlm3-8b-instruct") as llm:
            async for chunk in llm.stream([{"role": "user", "content": "Hello"}]):
                print(chunk.text, end="", flush=True)
    """

    def __init__(self, model: LLM | str | os.PathLike[str], *, max_waiting: int | None = None, **kwargs: Any):
        if isinstance(model, LLM) and kwargs:
            raise TypeError(f"{', '.join(kwargs)}: give these to the LLM, which is loaded already")
        self._max_waiting = None if max_waiting is None else check_int("max_waiting", max_waiting, 1)
        self.llm = llm = model if isinstance(model, LLM) else LLM(model, **kwargs)
        self._thread = EngineThread(lambda: llm.engine, _deliver)
        # Dropping the last reference ends the thread, which refers to nothing here; so does the end of the process.
        self._close = weakref.finalize(self, self._thread.stop)

    async def generate(
        self,
        prompts: str | Sequence[int] | Iterable[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **kwargs: Unpack[SamplingKeywords],
    ) -> Any:
        """As LLM.generate: a RequestOutput, or for several prompts a list of them.

        Also raises QueueFull, and RuntimeError after `close`.
        """
        return await self._answer(await asyncio.to_thread(self.llm._generate_call, prompts, sampling_params, kwargs))

    async def chat(
        self,
        messages: str | Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        thinking: bool = False,
        tools: Sequence[Tool] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        **kwargs: Unpack[SamplingKeywords],
    ) -> Any:
        """As LLM.chat: a RequestOutput, or for several conversations a list of them. `stream` streams one.

        Also raises QueueFull, and RuntimeError after `close`.
        """
        options = sampling_params, thinking, tools, tool_choice, kwargs
        call = await asyncio.to_thread(self.llm._chat_call, messages, *options)
        return await self._answer(call)

    async def stream(
        self,
        prompt: str | Sequence[int | str | Sequence[int] | Mapping[str, Any]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        thinking: bool = False,
        tools: Sequence[Tool] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        **kwargs: Unpack[SamplingKeywords],
    ) -> AsyncGenerator[Chunk, None]:
        """As LLM.stream: an asynchronous iterator of chunks.

        Closing it (`aclose`, or leaving `contextlib.aclosing`) cancels the answer, and so does cancelling the task that
        waits for its next chunk.
        """
        options = sampling_params, thinking, tools, tool_choice, kwargs
        call = await asyncio.to_thread(self.llm._stream_call, prompt, *options)
        device = self.llm.model.device
        async with aclosing(self._updates(call)) as news:
            async for updates in news:
                for own in _by_answer(updates):
                    yield call.chunk(own, device)

    async def prompt_logprobs(self, prompt: str | Sequence[int], count: int = 0) -> PromptLogprobs:
        """As LLM.prompt_logprobs. Of a long prompt a chunk is computed between two steps of the answers under way."""
        ids, chunks = await asyncio.to_thread(self.llm._prompt_logprobs, prompt, count)
        done = []
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            done.append(chunk)
        return joined(ids, done)

    async def warm_up(self) -> None:
        """As LLM.warm_up."""
        await asyncio.to_thread(self.llm.warm_up)

    def close(self) -> None:
        """Ends the thread. Answers under way end with a RuntimeError."""
        self._close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return self._thread.waiting

    async def _answer(self, call: Call) -> RequestOutput | list[RequestOutput]:
        async with aclosing(self._updates(call)) as news:
            async for _ in news:
                pass
        return call.outputs()

    async def _updates(self, call: Call) -> AsyncGenerator[list[Update], None]:
        """What comes for a call, until all its answers have finished."""
        mailbox = _Mailbox(asyncio.get_running_loop())
        unfinished = len(call.answers)
        try:
            self._thread.submit(call.answers, mailbox, self._max_waiting)
            while unfinished:
                updates = await mailbox.take()
                finished = [update.answer.request for update in updates if update.finished]
                if aborted := [request for request in finished if request.finish_reason == "abort"]:
                    raise why_aborted(aborted) from mailbox.error
                unfinished -= len(finished)
                yield updates
        finally:
            self._thread.cancel(call.answers)


class _Mailbox:
    """What has come for one call and was not yet read. Belongs to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.error = loop, cast(BaseException | None, None)
        self._updates: list[Update] = []
        self._arrived = asyncio.Event()

    async def take(self) -> list[Update]:
        """All that has come; waits until there is something."""
        await self._arrived.wait()
        self._arrived.clear()
        updates, self._updates = self._updates, []
        return updates

    def put(self, updates: list[Update], error: BaseException | None) -> None:
        self._updates += updates
        self.error = error
        self._arrived.set()


def _deliver(news: Mapping[Hashable, list[Update]], error: BaseException | None) -> None:
    """Wakes each event loop once."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, list[Update]]]] = {}
    for mailbox, updates in cast("Mapping[_Mailbox, list[Update]]", news).items():
        loops.setdefault(mailbox.loop, []).append((mailbox, updates))
    for loop, each in loops.items():
        with suppress(RuntimeError):  # the loop is closed, and has cancelled all that reads
            loop.call_soon_threadsafe(_put, each, error)


def _put(news: list[tuple[_Mailbox, list[Update]]], error: BaseException | None) -> None:
    for mailbox, updates in news:
        mailbox.put(updates, error)


def _by_answer(updates: list[Update]) -> Iterable[list[Update]]:
    """The updates of each answer, in order."""
    answers: dict[Answer, list[Update]] = {}
    for update in updates:
        answers.setdefault(update.answer, []).append(update)
    return answers.values()
