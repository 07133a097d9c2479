"""Runs an app under uvicorn, until a signal: then what is under way finishes, and new requests are refused."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from ..api.async_llm import AsyncLLM
from .app import create_app
from .listen import listen
from .protocol import limited
from .service import Service
from .settings import Settings


class DrainingServer(uvicorn.Server):
    """A server that ends in two steps: it answers new requests with status 503 until the others have finished.

    A second signal, or the end of `drain_seconds`, cancels what is under way.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service, self._drained_by = service, 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            super().handle_exit(sig, frame)
        else:
            self._captured_signals.append(sig)
            self.drain()

    def drain(self) -> None:
        """Refuses new requests, and ends when the others have finished."""
        self._drained_by = time.monotonic() + self.service.settings.drain_seconds
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        service = self.service
        drained = service.draining and (not service.active or time.monotonic() > self._drained_by)
        return await super().on_tick(counter) or drained or service.failure is not None


def server_of(model: AsyncLLM | Callable[[], AsyncLLM], settings: Settings, port: int) -> DrainingServer:
    """A server that is ready to run."""
    app = create_app(model, settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=port,
        http=limited(settings),
        ws="none",
        log_level="info",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(settings.head_seconds) + 1,  # the protocol's own limit comes first
        timeout_graceful_shutdown=1,  # by then all has finished, or had its time
    )
    return DrainingServer(config, app.state.service)


def serve(load: Callable[[], AsyncLLM], settings: Settings, port: int) -> None:
    """Serves until SIGINT or SIGTERM. Raises what loading raised, and OSError if it cannot listen at that address."""
    server = server_of(load, settings, port)
    # Before the model begins to load: a port that is taken should not cost the time for that.
    sockets = listen(settings.host, port)
    _say_where(settings.host, sockets)
    try:
        server.run(sockets)
    except KeyboardInterrupt:
        if not server.service.loading:
            raise
    if server.service.loading:
        # At its end Python stops other threads, and one that is in a library in C++ would abort the process. Without a
        # KeyboardInterrupt, too: a shell lets commands in the background ignore SIGINT, which uvicorn handles anyway.
        os._exit(130)
    if (failure := server.service.failure) is not None:
        raise failure


def _say_where(host: str, sockets: list[socket.socket]) -> None:
    place = f"[{host}]" if ":" in host else host
    address = f"http://{place}:{sockets[0].getsockname()[1]}"
    print(f"internlm3: the API is at {address}/v1, a chat page at {address}; Ctrl-C ends it", file=sys.stderr)
