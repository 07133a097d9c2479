"""Reads a JSON object that arrives in pieces, strictly and once: no character is looked at again."""

from __future__ import annotations

import json
import re

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # of a string
_WORD = re.compile(r"[-+.\w]*", re.ASCII)
_NUMBER_OR_NAME = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?|true|false|null", re.ASCII)
_CLOSING = {"{": "}", "[": "]"}


class JsonObject:
    """An object as far as it was read.

    Attributes:
        key: the object's own key whose value the element that was read last belongs to; None for what is between the
            values.
        complete: its last brace was read.
        broken: what follows cannot be part of JSON.
    """

    def __init__(self) -> None:
        self.key: str | None = None
        self.complete = self.broken = False
        self._open: list[str] = []  # the braces and brackets around the current place
        # One of: begin, first key, key, colon, first value, value, after (a value), string, escape, hex, word.
        self._state = "begin"
        self._is_key = False  # of the current string
        self._parts: list[str] = []  # of the current word, or of a key of the object itself
        self._digits = 0  # of an escape, which are to come
        self._next_key: str | None = None

    def read(self, text: str, at: int) -> int:
        """Reads an element, or a part of one, from text[at:], which is not empty. Returns the index of its end.

        At what cannot follow it sets `broken`, and returns the index of that.
        """
        if self._state == "word":
            end = _end(_WORD, text, at)
            self._parts.append(text[at:end])
            if end == len(text):
                return end
            if not _NUMBER_OR_NAME.fullmatch("".join(self._parts)):
                return self._break(end)
            self._state = "after"
            if end > at:
                return end
        if self._state in ("string", "escape", "hex"):
            return self._read_string(text, at)
        if self._state == "after" and len(self._open) == 1:
            self.key = None
        end = _end(_SPACE, text, at)
        return end if end > at else self._read_mark(text, at)

    def _read_mark(self, text: str, at: int) -> int:
        """Reads what is neither a space nor inside of a string or word."""
        state, character = self._state, text[at]
        if state == "begin":
            return self._enter("{", at) if character == "{" else self._break(at)
        if state == "colon":
            self._state = "value"
            return at + 1 if character == ":" else self._break(at)
        if state in ("after", "first key", "first value") and character == _CLOSING[self._open[-1]]:
            self._open.pop()
            self._state = "after"
            self.complete = not self._open
            return at + 1
        if state == "after":
            self._state = "key" if self._open[-1] == "{" else "value"
            return at + 1 if character == "," else self._break(at)
        if state in ("key", "first key"):
            self._state, self._is_key, self._parts = "string", True, []
            return at + 1 if character == '"' else self._break(at)
        self.key = self._next_key  # within a value it is that of the value
        if character in _CLOSING:
            return self._enter(character, at)
        self._is_key, self._parts = False, []
        if character == '"':
            self._state = "string"
            return at + 1
        self._state = "word"
        end = _end(_WORD, text, at)
        self._parts.append(text[at:end])
        return end if end > at else self._break(at)

    def _read_string(self, text: str, at: int) -> int:
        character = text[at]
        end = at + 1
        if self._state == "escape":
            if character not in '"\\/bfnrtu':
                return self._break(at)
            self._state, self._digits = ("hex", 4) if character == "u" else ("string", 0)
        elif self._state == "hex":
            if character not in "0123456789abcdefABCDEF":
                return self._break(at)
            self._digits -= 1
            self._state = "hex" if self._digits else "string"
        elif character == "\\":
            self._state = "escape"
        elif character == '"':
            self._state = "colon" if self._is_key else "after"
            if self._is_key and len(self._open) == 1:
                self._next_key = json.loads('"' + "".join(self._parts) + '"')
            return end
        elif (end := _end(_PLAIN, text, at)) == at:
            return self._break(at)
        if self._is_key and len(self._open) == 1:
            self._parts.append(text[at:end])
        return end

    def _enter(self, bracket: str, at: int) -> int:
        self._open.append(bracket)
        self._state = "first key" if bracket == "{" else "first value"
        return at + 1

    def _break(self, at: int) -> int:
        self.broken = True
        return at


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where the longest match from `at` on ends, for a pattern that matches nothing too."""
    match = pattern.match(text, at)
    assert match is not None
    return match.end()
