"""From tokens to text as they come: whole characters at once, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.request import Request
    from .tokenizer import InternLM3Tokenizer


class TextStream:
    """The text of one answer, token by token. All that `push` and `flush` return together is what `decode` would give.

    Args:
        stops: strings that end the text; the one that is whole first wins, of several the longest, whatever the tokens.
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
        self._detokenizer = tokenizer.detokenizer()
        self._held = ""

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """The text that this token makes certain; "" while a character or a possible stop string is unfinished.

        A stop string that is whole with a token that may not stop is text as any other.
        """
        if self.stopped is not None or token_id in self._skipped:
            return ""
        return self._release(self._detokenizer.push(self._tokenizer.convert_ids_to_tokens(token_id)), may_stop)

    def flush(self) -> str:
        """What was held back, when no token follows: an unfinished character shows as U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._release(self._detokenizer.flush())
        rest, self._held = ("", "") if self.stopped is not None else (self._held, "")
        return text + rest

    def _release(self, new: str, may_stop: bool = True) -> str:
        """`new` behind what was held, up to a stop string or to what may become one."""
        text = self._held + new
        stops = self._stops if may_stop else ()
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
        if found:
            end, _, self.stopped = min(found)
            return text[:end] if self._include_stop else text[: end - len(self.stopped)]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


class Writer:
    """Turns a request's tokens into text as they come, and sees its stop strings.

    Attributes:
        told: how many of the tokens are in the text.
        stopped: the stop string that was met, None before. What comes behind it is no part of the answer.
    """

    def __init__(self, request: Request, tokenizer: InternLM3Tokenizer):
        params = request.params
        self.told = 0
        self.request = request
        self._tokenizer = tokenizer
        self._stream = TextStream(
            tokenizer, params.stops, params.include_stop_str_in_output, params.skip_special_tokens
        )

    @property
    def stopped(self) -> str | None:
        return self._stream.stopped

    @property
    def done(self) -> bool:
        """Whether the text is whole."""
        behind = self.told < len(self.request.token_ids)
        return self.stopped is not None or (self.request.finish_reason is not None and not behind)

    def write(self) -> str:
        """The text that the next token completes, with all that was held back if it is the last one."""
        request, stream = self.request, self._stream
        token = request.token_ids[self.told]
        self.told += 1
        last = request.finish_reason is not None and self.told == len(request.token_ids)
        # The token that ends a text is no part of it, unless it was asked for.
        is_end = last and request.finish_reason == "stop" and not request.params.include_stop_str_in_output
        text = "" if is_end else stream.push(token, self.told >= request.params.min_tokens)
        return text + stream.flush() if last and stream.stopped is None else text

    def flush(self) -> str:
        """What was held back of an answer that ended without a last token."""
        return self._stream.flush()

    def stop_string(self, token_id: int) -> int | str:
        """The stop string that is this token, which was looked for as one; else the id."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token if token in self.request.params.stops else token_id


def _overlap(text: str, stop: str) -> int:
    """How long an end of `text` is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
