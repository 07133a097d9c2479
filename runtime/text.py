"""From tokens to text as they come: whole characters at once, and nothing that may still become a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .request import Request
    from .tokenizer import InternLM3Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_WINDOW = 32


class TextStream:
    """The text of one answer, token by token. All that `push` and `flush` return together is what `decode` would give.

    Args:
        stops: strings that end the text; the earliest match wins.
        include_stop: the stop string stays in the text.

    Attributes:
        stopped: the stop string that was met, None before.
    """

    def __init__(
        self,
        tokenizer: InternLM3Tokenizer,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ):
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._skipped = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        # Tokens are decoded in a window whose first ones are told already, so that spaces at its borders come out.
        self._window: list[int] = []
        self._told = 0
        self._bytes = b""
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character or a possible stop string is unfinished."""
        if self.stopped is not None or token_id in self._skipped:
            return ""
        self._window.append(token_id)
        byte = _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token_id))
        self._bytes = self._bytes + bytes.fromhex(byte[1]) if byte else b""
        text = self._decode()
        # Each byte of an unfinished character stands as a U+FFFD at the end.
        told = len(text) - _unfinished(self._bytes)
        new, self._told = text[self._told : told], told
        if len(self._window) >= _WINDOW and not byte and new:
            # The last token told something: decoding can begin with it as well.
            self._window = [token_id]
            self._told = len(self._decode())
        return self._release(new)

    def flush(self) -> str:
        """What was held back, when no token follows: an unfinished character shows as U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._release(self._decode()[self._told :])
        self._told = len(self._decode())
        rest, self._held = ("", "") if self.stopped is not None else (self._held, "")
        return text + rest

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window)

    def _release(self, new: str) -> str:
        """`new` behind what was held, up to a stop string or to what may become one."""
        text = self._held + new
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            at, self.stopped = min(found, key=lambda match: (match[0], -len(match[1])))
            return text[: at + len(self.stopped)] if self._include_stop else text[:at]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


class Writer:
    """Turns a request's newest token into text, and ends the request at a stop string."""

    def __init__(self, request: Request, tokenizer: InternLM3Tokenizer):
        params = request.params
        self._request = request
        self._tokenizer = tokenizer
        self._stream = TextStream(
            tokenizer, params.stops, params.include_stop_str_in_output, params.skip_special_tokens
        )

    def write(self) -> str:
        """The text that the request's last token completes; called once for each token, as it comes."""
        request, stream = self._request, self._stream
        # The token that ends a text is no part of it, unless it was asked for.
        ended_by_token = request.finish_reason == "stop" and not request.params.include_stop_str_in_output
        text = "" if ended_by_token else stream.push(request.token_ids[-1])
        if isinstance(request.stop_reason, int):
            token = self._tokenizer.convert_ids_to_tokens(request.stop_reason)
            request.stop_reason = token if token in request.params.stops else request.stop_reason
        if stream.stopped is None and request.finish_reason is not None:
            text += stream.flush()
        if stream.stopped is not None:
            request.finish("stop", stream.stopped)
        return text


def _overlap(text: str, stop: str) -> int:
    """How long an end of `text` is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _unfinished(data: bytes) -> int:
    """How many of the last bytes begin a UTF-8 character that more bytes would complete."""
    for size in range(1, min(4, len(data) + 1)):
        try:
            data[-size:].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return size
    return 0
