"""Finds calls of tools in an answer, while its text arrives in pieces of any length."""

from __future__ import annotations

import re
from typing import Literal

from .call_reader import CallReader
from .calls import ToolCall, ToolCallDelta, new_id
from .formats import ToolFormat

_SPACE = re.compile(r"\s*")


class ToolCallParser:
    """Splits an answer into text and calls. The result does not depend on the pieces in which the answer comes.

    It is a call once the name is complete and the arguments have begun; from there on they are reported as they come.
    Whatever goes wrong before makes it text, with all its marks. What goes wrong later stays in the arguments, which
    are then no JSON, up to the mark that ends a call. White space before the first call and after each is dropped,
    unless text is between it and the call.

    Args:
        format: how calls are written.
        begun: the prompt ended with the mark that begins a call.
    """

    def __init__(self, format: ToolFormat, begun: bool = False):
        self._format = format
        self._state: Literal["text", "call", "lost", "end"] = "call" if begun else "text"
        self._mark = "" if begun else format.begin  # what began the current call
        self._reader = CallReader(format)  # of the current call, or of the last one
        self._held = ""  # the end of what was read, which may become a mark
        self._text: list[str] = []  # not returned yet
        self._space: list[str] = []  # white space at the beginning or after a call, which may be no text
        self._has_text = False  # since the beginning or the last call
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, and pieces of the arguments
        self._is_new = True  # the current call is not among them
        self._deltas: list[ToolCallDelta] = []  # not returned yet

    @property
    def calls(self) -> list[ToolCall]:
        """The calls so far. The last one may be incomplete."""
        return [ToolCall(id, name, "".join(pieces)) for id, name, pieces in self._calls]

    def new_deltas(self) -> list[ToolCallDelta]:
        """What was added to the calls since this was last called."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def push(self, piece: str) -> str:
        """Reads the next piece of the answer. Returns the text that is certainly no part of a call."""
        text, at, self._held = self._held + piece, 0, ""
        while at < len(text):
            if self._state == "text":
                at = self._read_text(text, at)
            elif self._state == "call":
                at = self._read_call(text, at)
            elif self._state == "lost":
                at = self._read_lost(text, at)
            else:
                at = self._read_end(text, at)
        self._report()
        return self._take_text()

    def finish(self) -> str:
        """The rest of the text, when the answer has ended."""
        if self._state == "text":
            self._say(self._held)
        elif self._state == "call" and not self._reader.started:
            self._say(self._mark + "".join(self._reader.raw))
        elif self._state == "lost":
            self._reader.add(self._held)
            self._report()
        if not self._calls:
            self._text += self._space
        return self._take_text()

    def _read_text(self, text: str, at: int) -> int:
        begin, whole = _find(self._format.begin, text, at)
        self._say(text[at:begin])
        if not whole:
            self._held = text[begin:]
            return len(text)
        self._state, self._mark = "call", self._format.begin
        self._reader, self._is_new = CallReader(self._format), True
        return begin + len(self._format.begin)

    def _read_call(self, text: str, at: int) -> int:
        reader = self._reader
        end = reader.read(text, at)
        if reader.refused:
            self._state = "text"
            self._say(self._mark + "".join(reader.raw))
        elif reader.lost or reader.complete:
            self._state = "lost" if reader.lost else "end"
            self._report()
        return end

    def _read_lost(self, text: str, at: int) -> int:
        begin, whole = _find(self._format.end, text, at)
        self._reader.add(text[at:begin])
        if not whole:
            self._held = text[begin:]
            return len(text)
        self._report()
        self._state = "text"
        return begin + len(self._format.end)

    def _read_end(self, text: str, at: int) -> int:
        """Skips the end mark and white space before it. Anything else is text."""
        begin = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        self._space.append(text[at:begin])
        if self._format.end.startswith(text[begin:]):
            self._held = text[begin:]
            return len(text)
        self._state = "text"
        if not text.startswith(self._format.end, begin):
            return begin
        self._space.clear()
        return begin + len(self._format.end)

    def _say(self, text: str) -> None:
        if self._has_text or text.strip():
            self._text += [*self._space, text]
            self._space.clear()
            self._has_text = True
        else:
            self._space.append(text)

    def _report(self) -> None:
        """Makes a delta of what is new in the current call, or in the last one."""
        reader = self._reader
        if not reader.started:
            return
        id, arguments = None, reader.take()
        if self._is_new:
            self._is_new = self._has_text = False
            self._space.clear()
            id = new_id()
            self._calls.append((id, reader.name, []))
        if id is not None or arguments:
            self._calls[-1][2].append(arguments)
            self._deltas.append(ToolCallDelta(len(self._calls) - 1, id, id and reader.name, arguments))

    def _take_text(self) -> str:
        text = "".join(self._text)
        self._text.clear()
        return text


def _find(mark: str, text: str, at: int) -> tuple[int, bool]:
    """Where `mark` begins in text[at:], and whether all of it is there, since the text may end within it."""
    begin = text.find(mark, at)
    if begin >= 0:
        return begin, True
    lengths = range(min(len(mark) - 1, len(text) - at), 0, -1)
    return len(text) - next((n for n in lengths if text.endswith(mark[:n])), 0), False
