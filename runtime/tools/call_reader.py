"""Reads one call of a tool, a JSON object with a name and arguments, while it arrives in pieces."""

from __future__ import annotations

import json
from typing import Literal

from .formats import ARGUMENT_KEYS, ToolFormat
from .json_object import JsonObject


class CallReader:
    """The name and the arguments of a call, as far as they were read.

    Arguments are an object, whose text is given as it comes; or a string that has the text of one, which is given when
    it is complete; or null or nothing, which mean {}.

    Attributes:
        name: the name; "" until it was read.
        raw: all that was read until the call started.
        started: the name is known and the arguments have begun: it is a call, whatever follows.
        refused: it has not started, and is no call.
        complete: it has started, and all of it was read.
        lost: it has started and is no JSON in its arguments, so that only the end mark shows where they end.
    """

    def __init__(self, format: ToolFormat):
        self.name = ""
        self.raw: list[str] = []
        self.started = self.refused = self.complete = self.lost = False
        self._format = format
        self._object = JsonObject()
        self._role: Literal["name", "arguments", "other"] | None = None  # of the value that is being read
        self._value: list[str] = []  # its text, where it is needed as a whole
        self._begin = ""  # the first character of the arguments
        self._arguments: list[str] = []  # their text that was not taken yet

    def read(self, text: str, at: int) -> int:
        """Reads a part of text[at:], which is not empty. Returns the index of its end."""
        end = self._object.read(text, at)
        piece, key = text[at:end], self._object.key
        if not self.started:
            self.raw.append(piece)
        if key is None and self._role is not None:
            self._end_value()
        elif key is not None and self._role is None:
            self._begin_value(key, piece[:1])
        if self._role == "arguments" and self._begin == "{":
            self._arguments.append(piece)
        elif self._role is not None:
            self._value.append(piece)
        if self._object.complete and not self._begin:
            self._arguments.append("{}")
        self.started = self.started or bool(self.name and self._arguments and not self.refused)
        if self._object.complete or self._object.broken:
            self.refused = not self.started
            self.lost = self.started and self._role == "arguments"
            self.complete = self.started and not self.lost
        return end

    def add(self, text: str) -> None:
        """Adds to the arguments of a call that is lost."""
        self._arguments.append(text)

    def take(self) -> str:
        """The text of the arguments that came since this was last called."""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _begin_value(self, key: str, first: str) -> None:
        self._role, self._value = "other", []
        if key == self._format.name and not self.name:
            self._role = "name"
        elif key in ARGUMENT_KEYS and not self._begin:
            self._role, self._begin = "arguments", first
            self.refused = first not in ("{", '"', "n")

    def _end_value(self) -> None:
        role, text = self._role, "".join(self._value)
        self._role = None
        if role == "name":
            self.name = json.loads(text) if text.startswith('"') else ""
            self.refused = not self.name
        elif role == "arguments" and self._begin != "{":
            written = json.loads(text) or "{}"
            if is_object(written):
                self._arguments.append(written)
            else:
                self.refused = True


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
