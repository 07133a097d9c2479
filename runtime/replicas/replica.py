"""One replica: a model, and the server's app for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.actor import ActorHandle
from starlette.types import Message

from ..api.async_llm import AsyncLLM
from ..server.app import create_app
from ..server.in_process import ask
from ..server.service import Service
from ..server.settings import Settings
from .metrics import report


@dataclass(frozen=True)
class ForwardedRequest:
    """A request over HTTP."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Replica:
    """Loads a model, and answers requests of HTTP for it. Ray Serve makes one in each of its processes.

    Args:
        options: of LLM.
        store: where its metrics go.
    """

    def __init__(self, options: dict[str, Any], settings: Settings, store: ActorHandle):
        llm = AsyncLLM(max_waiting=settings.max_waiting, **options)
        if llm.llm.model.device.type == "cuda":
            llm.llm.warm_up()
        self._app = create_app(llm, settings)
        service: Service = self._app.state.service
        report(store, serve.get_replica_context().replica_id.unique_id, service.metrics.collect)

    async def answer(self, request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        """The ASGI messages of the response, as they come."""
        async for messages in ask(
            self._app, request.method, request.path, request.headers, request.body, request.query
        ):
            yield messages
