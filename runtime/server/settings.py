"""The settings of `internlm3 serve`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        model: the model's name in the API.
        host: the address or name that the server listens on.
        api_key: what clients must send as a bearer token; None: nothing.
        allow_host: further names that clients may call this server by; "*" allows any.
        allow_origin: origins of web pages ("https://chat.example") that may use this server; "*" allows any.
        max_waiting: requests that may wait for a slot; more get status 429.
        max_body: bytes of a request's body.
        max_connections: connections at a time; more get status 503.
        head_seconds: time for a connection to send the head of its next request.
        body_seconds: time for a request to send its body.
        stall_seconds: time that a client may leave what is sent to it unread.
        answer_seconds: time for one request, waiting included.
        drain_seconds: time for what is under way to finish after SIGTERM.
    """

    model: str
    host: str = "127.0.0.1"
    api_key: str | None = None
    allow_host: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()
    max_waiting: int = 256
    max_body: int = 8 << 20
    max_connections: int = 512
    head_seconds: float = 30.0
    body_seconds: float = 30.0
    stall_seconds: float = 30.0
    answer_seconds: float = 1800.0
    drain_seconds: float = 60.0
