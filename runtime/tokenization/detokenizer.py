"""From tokens to text: `decode` is this, token after token, so that a text reads the same at once and as it comes."""

from collections.abc import Iterable

from .clean_up import CleanUp
from .vocabulary import Speller


class Detokenizer:
    """The text that a vocabulary's speller makes of tokens; `clean_up` removes spaces before English punctuation."""

    def __init__(self, speller: Speller, clean_up: bool):
        self._speller = speller
        self._clean_up = CleanUp() if clean_up else None

    def text(self, tokens: Iterable[str]) -> str:
        """All of it, of all tokens."""
        return self._clean("".join(map(self._speller.push, tokens))) + self.flush()

    def push(self, token: str) -> str:
        """The text that is certain with this token: no character is unfinished, no space may still be cleaned away."""
        return self._clean(self._speller.push(token))

    def flush(self) -> str:
        """The rest, when no token follows: each byte of an unfinished character shows as U+FFFD."""
        text = self._clean(self._speller.flush())
        return text + self._clean_up.flush() if self._clean_up else text

    def _clean(self, text: str) -> str:
        return self._clean_up.push(text) if self._clean_up else text
