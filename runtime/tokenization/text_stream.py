"""The text of one answer, token by token: whole characters only, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .stop_strings import StopStrings

if TYPE_CHECKING:
    from .tokenizer import InternLM3Tokenizer


class TextStream:
    """Detokenizes one answer. The texts that `push` and `flush` return are, joined, what `decode` returns.

    Args:
        stops: strings that end the text. The first one to be complete wins, and the longest of several that are
            complete at the same character; token boundaries play no role.
        include_stop: keep the stop string in the text.
        min_tokens: a stop string that is complete with an earlier token does not end the text.

    Attributes:
        stopped: the stop string that ended the text, None before.
    """

    def __init__(
        self,
        tokenizer: InternLM3Tokenizer,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ):
        self.stopped: str | None = None
        self._count, self._min_tokens = 0, min_tokens
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._matcher = StopStrings(stops)
        self._include_stop = include_stop
        self._skipped = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self._detokenizer = tokenizer.detokenizer()
        self._pending = ""

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character or a possible stop string is incomplete."""
        self._count += 1
        if self.stopped is not None or token_id in self._skipped:
            return ""
        new = self._detokenizer.push(self._tokenizer.convert_ids_to_tokens(token_id))
        return self._release(new, may_stop=self._count >= self._min_tokens)

    def flush(self) -> str:
        """The pending text, when no token follows: an incomplete character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._release(self._detokenizer.flush())
        rest, self._pending = ("", "") if self.stopped is not None else (self._pending, "")
        return text + rest

    def stop_string(self, token_id: int) -> int | str:
        """The stop string that this token spells, or the id itself."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token if token in self._stops else token_id

    def _release(self, new: str, may_stop: bool = True) -> str:
        """Pending text and `new`, up to a stop string or to the possible beginning of one, which stays pending."""
        text = self._pending + new
        if found := self._matcher.push(new, may_stop):
            end, self.stopped = len(self._pending) + found[0], found[1]
            return text[:end] if self._include_stop else text[: end - len(self.stopped)]
        end = len(text) - self._matcher.pending
        self._pending = text[end:]
        return text[:end]
