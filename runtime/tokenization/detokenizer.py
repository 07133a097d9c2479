"""Tokens to text, token by token. `decode` uses it too, so streamed text equals decoded text."""

import re
from collections.abc import Iterable

from .vocabulary import Speller


class Detokenizer:
    """Makes text of tokens.

    Args:
        speller: the vocabulary's spelling of one text.
        clean_up: remove spaces before English punctuation, see CleanUp.
    """

    def __init__(self, speller: Speller, clean_up: bool):
        self._speller = speller
        self._clean_up = CleanUp() if clean_up else None

    def follow(self, tokens: Iterable[str]) -> str:
        """Reads the tokens before the text, and returns what is final of their own text, which is not cleaned up."""
        return "".join(map(self._speller.push, tokens))

    def text(self, tokens: Iterable[str]) -> str:
        """The text of all tokens."""
        return self._clean("".join(map(self._speller.push, tokens))) + self.flush()

    def push(self, token: str) -> str:
        """The text that becomes final with this token: whole characters, and no space that clean-up may remove."""
        return self._clean(self._speller.push(token))

    def flush(self) -> str:
        """The rest of the text after the last token. Each byte of an incomplete character becomes U+FFFD."""
        text = self._clean(self._speller.flush())
        return text + self._clean_up.flush() if self._clean_up else text

    def _clean(self, text: str) -> str:
        return self._clean_up.push(text) if self._clean_up else text


def _any(texts: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(texts)))


_MARKS = (".", "?", "!", ",")
_ENDINGS = ("n't", "n ' t", *(quote + end for quote in ("'", " ' ") for end in ("m", "s", "ve", "re")))
_SPACES = f" (?={_any((*_MARKS, *_ENDINGS))})| ' (?!{_any(_MARKS)})"
_DECIDED = re.compile(_SPACES)
# A space at the end of the text so far, followed by a prefix of what would decide whether it goes.
_WANTED = (*_MARKS, *_ENDINGS, *("' " + mark for mark in _MARKS))
_PREFIXES = {text[:end] for text in _WANTED for end in range(len(text))}
_OPEN_OR_DECIDED = re.compile(rf"(?P<open> (?:{_any(_PREFIXES)})\Z)|{_SPACES}")


class CleanUp:
    """transformers' clean-up of spaces before English punctuation, for a text that arrives in parts.

    transformers replaces one string after another in the whole text: " ." by ".", likewise " ?", " !" and " ,"; " ' "
    by "'"; " n't" by "n't", likewise " 'm", " 's", " 've" and " 're". A later replacement can apply to the result of an
    earlier one: "  ' s" becomes " 's", then "'s". In one pass that means: remove a space before a mark or an ending,
    and both spaces around a "'" unless a mark follows the second.
    """

    def __init__(self) -> None:
        self._pending = ""

    def push(self, text: str) -> str:
        """The cleaned text that no later part can change."""
        text, self._pending = self._pending + text, ""
        return _OPEN_OR_DECIDED.sub(self._strip, text)

    def flush(self) -> str:
        """The rest of the cleaned text."""
        text, self._pending = self._pending, ""
        return _DECIDED.sub(lambda match: match[0].strip(), text)

    def _strip(self, match: re.Match[str]) -> str:
        if match["open"]:
            self._pending = match[0]
            return ""
        return match[0].strip()
