"""Awaiting the answers to a request: within its time, while its client is there, with errors as the API has them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any

from starlette.types import Receive

from ..api.outputs import Chunk, RequestOutput
from ..api.prompt_logprobs import PromptLogprobs
from ..engine.request import NOT_NUMBERS
from .connection import while_connected
from .errors import ApiError, failed_answer, told_to_the_client
from .service import Service
from .usage import Usage


async def whole(service: Service, receive: Receive, work: Awaitable[Any]) -> tuple[list[RequestOutput], Usage]:
    """The outputs of a call of AsyncLLM.

    Raises ApiError, or Disconnected.
    """
    try:
        outputs = await _in_time(service, receive, work)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        answers = [answer for output in outputs for answer in output.outputs]
        if failed := [answer for answer in answers if answer.finish_reason == "error"]:
            raise failed_answer(failed[0].stop_reason)
    except BaseException as error:
        _count(service, error)
        raise
    used = [Usage.of_output(output) for output in outputs]
    usage = sum(used[1:], start=used[0])
    service.metrics.finished(usage, [answer.finish_reason for answer in answers])
    return outputs, usage


async def scored(service: Service, receive: Receive, prompts: Sequence[Any], count: int) -> list[PromptLogprobs]:
    """How likely the tokens of each prompt are, and the `count` likeliest in each place.

    Raises ApiError, or Disconnected.
    """
    try:
        return await _in_time(service, receive, _one_by_one(service, prompts, count))
    except BaseException as error:
        _count(service, error)
        raise


async def _one_by_one(service: Service, prompts: Sequence[Any], count: int) -> list[PromptLogprobs]:
    found = []
    for prompt in prompts:
        async with service.scoring:
            found.append(await service.llm.prompt_logprobs(prompt, count))
        if any(math.isnan(logprob) for logprob in found[-1].logprobs if logprob is not None):
            raise failed_answer(NOT_NUMBERS)
    return found


async def begun(service: Service, receive: Receive, stream: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """The chunks of a stream of AsyncLLM. Awaits the first one: an error before it still has a status of its own.

    Raises ApiError, or Disconnected; so does the iterator.
    """
    deadline = time.monotonic() + service.settings.answer_seconds
    try:
        first = await _in_time(service, receive, anext(stream))
        _check(first, deadline, service)
    except BaseException as error:
        _count(service, error)
        await stream.aclose()
        raise
    return _chunks(service, first, stream, deadline)


async def _chunks(
    service: Service, first: Chunk, stream: AsyncGenerator[Chunk, None], deadline: float
) -> AsyncGenerator[Chunk, None]:
    last: list[Chunk] = []
    chunk: Chunk | None = first
    async with aclosing(stream):
        try:
            while chunk is not None:
                _check(chunk, deadline, service)
                if chunk.finish_reason is not None:
                    last.append(chunk)
                yield chunk
                with told_to_the_client():
                    chunk = await anext(stream, None)
        except BaseException as error:
            _count(service, error)
            raise
    service.metrics.finished(Usage.of_chunks(last), [chunk.finish_reason for chunk in last])


async def _in_time(service: Service, receive: Receive, work: Awaitable[Any]) -> Any:
    try:
        with told_to_the_client():
            return await asyncio.wait_for(while_connected(receive, work), service.settings.answer_seconds)
    except asyncio.TimeoutError:
        raise _too_late(service) from None


def _count(service: Service, error: BaseException) -> None:
    """Counts a request that has not ended, unless its client is to blame."""
    if not (isinstance(error, ApiError) and error.status < 500):
        service.metrics.broken_off()


def _check(chunk: Chunk, deadline: float, service: Service) -> None:
    if chunk.finish_reason == "error":
        raise failed_answer(chunk.stop_reason)
    if time.monotonic() > deadline:
        raise _too_late(service)


def _too_late(service: Service) -> ApiError:
    what = f"the answer took more than {service.settings.answer_seconds:g} seconds: ask for fewer tokens"
    return ApiError(504, what, code="timeout")
