"""transformers' clean-up of spaces before English punctuation, for checkpoints that ask for it.

transformers replaces in the whole text one string after the other: " ." by ".", so too " ?", " !" and " ,"; " ' " by
"'"; " n't" by "n't", so too " 'm", " 's", " 've" and " 're". What one leaves, a later one may find: "  ' s" becomes
" 's" and then "'s". Said at once: a space goes before a mark or an ending; both spaces go around a "'", if no mark
takes the second.
"""

import re
from collections.abc import Iterable


def _any(texts: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(texts)))


_MARKS = (".", "?", "!", ",")
_ENDINGS = ("n't", "n ' t", *(quote + end for quote in ("'", " ' ") for end in ("m", "s", "ve", "re")))
_SPACES = f" (?={_any((*_MARKS, *_ENDINGS))})| ' (?!{_any(_MARKS)})"
_DECIDED = re.compile(_SPACES)
# A space with so little behind it that the text's next part decides: a beginning of what would take it away or keep it.
_WANTED = (*_MARKS, *_ENDINGS, *("' " + mark for mark in _MARKS))
_BEGUN = {text[:end] for text in _WANTED for end in range(len(text))}
_OPEN_OR_DECIDED = re.compile(rf"(?P<open> (?:{_any(_BEGUN)})\Z)|{_SPACES}")


class CleanUp:
    """The clean-up of a text that comes in parts. All that `push` and `flush` return together is the clean text."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """What no later part can change."""
        text, self._held = self._held + text, ""
        return _OPEN_OR_DECIDED.sub(self._strip, text)

    def flush(self) -> str:
        text, self._held = self._held, ""
        return _DECIDED.sub(lambda match: match[0].strip(), text)

    def _strip(self, match: re.Match[str]) -> str:
        if match["open"]:
            self._held = match[0]
            return ""
        return match[0].strip()
