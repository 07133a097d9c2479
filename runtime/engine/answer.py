"""One answer as its caller reads it: the request, the text so far, and one cursor over the generated tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .request import Request


class Text(Protocol):
    """Turns tokens into text; see tokenization.text_stream.TextStream."""

    stopped: str | None  # the stop string that ended the text

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...

    def stop_string(self, token_id: int) -> int | str: ...


@dataclass(frozen=True)
class Update:
    """What is new in an answer: one token, or its end.

    token_id: None where an answer ends without another token.
    text: what the token completes, whole characters only.
    read_tokens: the number of tokens that were read, this one included.
    finished: nothing comes after this.
    """

    answer: Answer
    token_id: int | None
    text: str
    read_tokens: int
    finished: bool


class Answer:
    """A request that is being answered, and how far its caller has read it.

    Args:
        stream: makes the text and looks for stop strings; None where no text is needed.

    Attributes:
        read_tokens: the number of tokens that were read.
        text: their text.
        finished: whether everything was read.
    """

    def __init__(self, request: Request, stream: Text | None = None):
        self.request = request
        self.read_tokens = 0
        self.text = ""
        self.finished = False
        self._stream = stream

    def read(self) -> Update | None:
        """The next update, None if there is none yet. At a stop string the answer finishes, and the rest is dropped."""
        request, stream = self.request, self._stream
        if self.finished:
            return None
        if self.read_tokens == len(request.token_ids):
            return None if request.finish_reason is None else self._update(None, stream.flush() if stream else "")
        token = request.token_ids[self.read_tokens]
        self.read_tokens += 1
        last = request.finish_reason in ("stop", "length") and self.read_tokens == len(request.token_ids)
        if stream is None:
            return self._update(token, "", finished=last)
        # The token that ends an answer is not part of its text, unless that was asked for.
        is_end = last and request.finish_reason == "stop" and not request.params.include_stop_str_in_output
        text = "" if is_end else stream.push(token)
        if last and stream.stopped is None:
            text += stream.flush()
        if stream.stopped is not None:
            self.finish(stream.stopped)
        elif last and isinstance(request.stop_reason, int):
            request.stop_reason = stream.stop_string(request.stop_reason)
        return self._update(token, text, finished=last or self.finished)

    def finish(self, stop_reason: str | None = None) -> None:
        """Ends the answer, with "stop", after the tokens that were read. The engine still has to free its slot."""
        self.request.truncate(self.read_tokens)
        self.request.finish("stop", stop_reason)
        self.finished = True

    def _update(self, token_id: int | None, text: str, *, finished: bool = True) -> Update:
        self.text += text
        self.finished = finished
        return Update(self, token_id, text, self.read_tokens, finished)
