"""The text of one answer, token by token: whole characters only, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .stop_strings import StopStrings

if TYPE_CHECKING:
    from .tokenizer import InternLM3Tokenizer


class TextStream:
    """Detokenizes one answer. The texts that `push` and `flush` return are, joined, what `decode` returns.

    Args:
        prompt_ids: the tokens that the answer continues: its text is then what decoding both together adds to the
            prompt's text, a first space included. Without them the answer is a text of its own.
        stops: strings that end the text. The first one to be complete wins, and the longest of several that are
            complete at the same character; token boundaries play no role.
        stops_begin_in_prompt: a stop string may begin in the prompt, if it ends in the answer.
        include_stop: keep the stop string in the text.
        exact: the text is what the tokens spell inside a text: no space of it is left out, and no prompt is read.
        min_tokens: a stop string that is complete with an earlier token does not end the text.
        kept_tokens: special tokens that are not skipped.

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
        prompt_ids: Sequence[int] = (),
        stops_begin_in_prompt: bool = False,
        exact: bool = False,
        kept_tokens: Iterable[int] = (),
    ):
        self.stopped: str | None = None
        self._count, self._min_tokens = 0, min_tokens
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._matcher = StopStrings(stops)
        self._include_stop = include_stop
        self._skipped = frozenset(tokenizer.all_special_ids if skip_special_tokens else ()).difference(kept_tokens)
        self._clean_up = False if exact else None
        if exact:  # a text before it, whatever it is
            prompt_ids = tokenizer.encode("a", add_special_tokens=False)
        longest = max(map(len, stops), default=0) if stops_begin_in_prompt else 0
        before = self._read_prompt(prompt_ids, max(longest, 1))
        # Text that is not returned yet. Its first `_prompt_length` characters are the prompt's, and never are.
        self._pending = before[max(0, len(before) - longest + 1) :]
        self._prompt_length = len(self._pending)
        self._matcher.push(self._pending, may_stop=False)

    def _read_prompt(self, prompt_ids: Sequence[int], length: int) -> str:
        """Brings the detokenizer to the end of the prompt, and returns at least `length` last characters of its text.

        Only as many of the last tokens are read as that takes: what comes before them changes nothing after them.
        """
        count = 0
        while True:
            count = min(2 * count or 8, len(prompt_ids))
            last = [id for id in prompt_ids[len(prompt_ids) - count :] if id not in self._skipped]
            tokens = self._tokenizer.convert_ids_to_tokens(last)
            self._detokenizer = self._tokenizer.detokenizer(self._clean_up)
            text = self._detokenizer.follow(tokens)
            if len(text) >= length or count == len(prompt_ids):
                # The prompt's text may end in a character of which the answer has the rest.
                self._unfinished = self._tokenizer.convert_tokens_to_string(tokens)[len(text) :]
                return text

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
        rest, self._pending = ("", "") if self.stopped is not None else (self._pending[self._prompt_length :], "")
        return text + rest

    def stop_string(self, token_id: int) -> int | str:
        """The stop string that this token spells, or the id itself."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token if token in self._stops else token_id

    def _release(self, new: str, may_stop: bool = True) -> str:
        """Pending text and `new`, up to a stop string or to the possible beginning of one, which stays pending."""
        if new and self._unfinished:
            new, self._unfinished = new[_common(self._unfinished, new) :], ""
        text = self._pending + new
        if found := self._matcher.push(new, may_stop):
            end, self.stopped = len(self._pending) + found[0], found[1]
            return text[self._prompt_length : end if self._include_stop else end - len(self.stopped)]
        released = len(text) - self._matcher.pending
        begin, self._prompt_length = self._prompt_length, max(0, self._prompt_length - released)
        self._pending = text[released:]
        return text[begin:released]


def _common(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
