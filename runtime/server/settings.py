"""The settings of `internlm3 serve`."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Settings:
    """Settings of a server. A key, origin or name that no request could ever have is a ValueError.

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

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
            kind = "is empty" if not key else "has characters that no client can send in a header"
            raise ValueError(f"the API key {kind}: give letters, digits and punctuation of ASCII")
        for origin in self.allow_origin:
            parts = urlsplit(origin)
            exact = parts.scheme and parts.netloc and origin == f"{parts.scheme}://{parts.netloc.lower()}"
            if origin not in ("*", "null") and not exact:
                raise ValueError(
                    f"--allow-origin {origin!r}: browsers send https://chat.example or http://localhost:3000, "
                    "in lower case and without a path"
                )
        for name in self.allow_host:
            if name != "*" and urlsplit(f"//{name}").hostname != name.lower():
                raise ValueError(f"--allow-host {name!r}: a name as gpu.example, without http:// and without a port")
