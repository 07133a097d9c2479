"""A server with the endpoints that the chat page uses. The test says what it answers, and when."""

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bench import ROOT

PAGE = ROOT / "runtime" / "server" / "page.html"
END = object()


class ChatServer(ThreadingHTTPServer):
    """Streams what `say`, `finish`, `fail` and `cut` put into the queue, before the request or during it.

    Attributes:
        url: of the page.
        asked: the bodies of the requests for an answer.
        refusal: (status, message) with which requests are refused, or None.
        key: the API key that the server wants, or None.
        gone: is set when a reader closed its connection before the end.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self.parts: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.asked: list[dict[str, Any]] = []
        self.refusal: tuple[int, str] | None = None
        self.key: str | None = None
        self.gone = threading.Event()

    def say(self, *texts: str) -> None:
        for text in texts:
            self._event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})

    def finish(self, reason: str = "stop", **usage: Any) -> None:
        """Ends the answer. `usage` has what is to be reported, `timings` among it."""
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        if usage:
            self._event({"choices": [], "usage": usage})
        self.cut("data: [DONE]\n\n")

    def fail(self, message: str) -> None:
        """An error in the middle of a stream."""
        self._event({"error": {"message": message, "type": "server_error", "param": None, "code": None}})
        self.cut()

    def cut(self, data: str = "") -> None:
        """Sends these bytes and closes the connection."""
        self.parts.put(data.encode())
        self.parts.put(END)

    def answer(self, *texts: str, **usage: Any) -> None:
        """A whole answer."""
        self.say(*texts)
        self.finish(**usage)

    def _event(self, content: dict[str, Any]) -> None:
        self.parts.put(f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode())


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """A ChatServer in a thread."""
    with ChatServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_GET(self) -> None:
        if self.path == "/":
            self.respond(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.granted():
            models = [{"id": "internlm3-8b-instruct", "object": "model"}]
            self.respond(200, {"status": "ok"} if self.path == "/health" else {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.granted():
            return
        self.server.asked.append(body)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        try:
            while (part := self.server.parts.get()) is not END:
                self.wfile.write(part)
        except OSError:
            self.server.gone.set()

    def granted(self) -> bool:
        refusal = self.server.refusal
        wanted = f"Bearer {self.server.key}" if self.server.key and self.path != "/health" else None
        if wanted and self.headers["Authorization"] != wanted:
            refusal = (401, "The API key is wrong or missing.")
        if refusal:
            self.respond(refusal[0], {"error": {"message": refusal[1], "type": "x", "param": None, "code": None}})
        return not refusal

    def respond(self, status: int, content: bytes | dict[str, Any], kind: str = "application/json") -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass
