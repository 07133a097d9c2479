"""Answers the requests of a batch on one machine: its engine is kept full, and a bounded number of them in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp

from ..api.async_llm import AsyncLLM
from .answer import Answer, answer, app_for
from .request import BatchRequest


def answer_on_this_machine(
    load: Callable[[], AsyncLLM], name: str, requests: Iterable[BatchRequest], write: Callable[[Answer], None]
) -> None:
    """Gives the answer to each request to `write`, in the order in which they are ready.

    Args:
        load: loads the model, which is closed at the end.
        name: the model's name in requests.
    """
    llm = load()
    try:
        asyncio.run(_answer_all(app_for(llm, name), requests, write, in_flight=2 * llm.llm.max_batch_size))
    finally:
        llm.close()


async def _answer_all(
    app: ASGIApp, requests: Iterable[BatchRequest], write: Callable[[Answer], None], in_flight: int
) -> None:
    """With twice as many requests in flight as are decoded together, one that waits is there whenever another ends."""

    left = iter(requests)

    async def one_after_the_other() -> None:
        for request in left:
            write(await answer(app, request))

    await asyncio.gather(*(one_after_the_other() for _ in range(in_flight)))
