"""Who may use the server: a key, and protection against web pages that a browser shows from elsewhere.

A page from anywhere can make a browser send requests to a local port. Its Origin betrays that, unless its own name was
rebound to this machine's address (DNS rebinding): then the Host does. An address as the Host can't be rebound.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError
from .settings import Settings

# What needs no key: a probe of a load balancer, and the page that asks for the key.
_OPEN = ("/health", "/")


class Guard:
    """Middleware that refuses requests with a foreign Host or Origin, and those without the key."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings
        self._names = {
            "localhost",
            *(name.lower() for name in (socket.gethostname(), settings.host, *settings.allow_host)),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope), scope["path"])
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers, path: str) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._ours(host):
            known = f"this server is not called {host[:80]!r}: start it with --allow-host NAME to serve under that name"
            raise ApiError(403, known, code="host_not_allowed")
        allowed = self._settings.allow_origin
        if origin is not None and origin not in allowed and "*" not in allowed and _place(origin) != host:
            what = f"pages of {origin[:80]!r} may not use this server: start it with --allow-origin to let them"
            raise ApiError(403, what, code="origin_not_allowed")
        key = self._settings.api_key
        if key is not None and path not in _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
                what = "a wrong API key" if given else "no API key: send the header Authorization: Bearer KEY"
                raise ApiError(401, what, code="invalid_api_key")

    def _ours(self, host: str) -> bool:
        name = _name(host)
        return "*" in self._names or name in self._names or _is_address(name)


def _name(host: str) -> str:
    """The name in a Host header, without a port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _place(origin: str) -> str:
    """Host and port of an origin."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
