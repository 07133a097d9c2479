"""Runs an app under uvicorn, until a signal: then what is under way finishes, and new requests are refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from ..api.async_llm import AsyncLLM
from .app import create_app
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
    """Serves until SIGINT or SIGTERM. Raises what loading raised, and OSError if the port is taken."""
    server = server_of(load, settings, port)
    try:
        server.run()
    except SystemExit:
        what = f"cannot listen on {settings.host} port {port}: another program may; choose another by --port"
        raise OSError(what) from None
    if (failure := server.service.failure) is not None:
        raise failure
