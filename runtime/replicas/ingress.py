"""The ingress deployment: forwards each request from Ray Serve's proxies to the replica of its conversation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..server.connection import error_event, while_connected
from ..server.errors import ApiError, Disconnected
from ..server.guard import Guard
from ..server.limits import draining, read_body
from ..server.settings import Settings
from .conversation import conversation
from .metrics import MetricsOfAll
from .replica import ForwardedRequest


class Ingress:
    """The deployment that Ray Serve's proxies send requests to. It has no model.

    Args:
        replicas: the deployment of replicas.
        store: has their metrics.
    """

    def __init__(self, replicas: DeploymentHandle, settings: Settings, store: ActorHandle):
        self._forward = _Forward(replicas, settings)
        # These must not wait for a replica that has all the requests it may have.
        own = [Route("/metrics", Guard(MetricsOfAll(store), settings)), Route("/health", self._health)]
        self._app = Starlette(routes=[*own, Route("/{path:path}", self._forward)])

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray Serve sends requests to."""
        return self._app

    async def _health(self, _: Request) -> Response:
        if self._forward.draining:
            return draining().response()
        return JSONResponse({"status": "ok"})

    async def drain(self) -> int:
        """Refuses new requests from now on. Returns the number of those under way."""
        self._forward.draining = True
        return self._forward.active


class _Forward:
    """An ASGI app that forwards requests to replicas. Who may send any is theirs to say.

    Attributes:
        draining: whether new requests are refused.
        active: requests under way.
    """

    def __init__(self, replicas: DeploymentHandle, settings: Settings):
        self._replicas = replicas.options(method_name="answer", stream=True)
        self._settings = settings
        self.draining, self.active = False, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_on(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        self.active += 1
        try:
            with _told_to_the_client():
                if self.draining:
                    raise draining()
                body = await read_body(scope, receive, self._settings)
                await while_connected(receive, self._answer(scope, body, send_on))
        except Disconnected:
            return
        except ApiError as error:
            if begun:  # only streams are sent in parts
                await send({"type": "http.response.body", "body": error_event(error).encode()})
            else:
                await error.response()(scope, receive, send)
        finally:
            self.active -= 1

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        asked = ForwardedRequest(scope["method"], scope["path"], scope["query_string"], [*scope["headers"]], body)
        session = Headers(scope=scope).get("x-session-id") or conversation(body)
        answer = self._replicas.options(session_id=session).remote(asked)
        try:
            async for messages in answer:
                for message in messages:
                    await send(message)
        finally:
            answer.cancel()


@contextmanager
def _told_to_the_client() -> Iterator[None]:
    """Turns what a call of a replica raises into an ApiError."""
    try:
        yield
    except BackPressureError as error:
        what = "more requests would wait than may: try again later"
        raise ApiError(429, what, code="queue_full") from error
    except (RayError, ReplicaUnavailableError, DeploymentUnavailableError) as error:
        what = "the replica that had this request is gone: send it again"
        raise ApiError(503, what, code="replica_gone") from error
