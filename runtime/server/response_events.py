"""The events of a response that is streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from ..api.outputs import Chunk
from ..tools.calls import ToolCallDelta
from .errors import ApiError
from .response import Response
from .response_items import call_item, message_item, text_part
from .usage import Usage

Event = dict[str, Any]


async def events_of(response: Response, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Event, None]:
    """The typed events of one answer, numbered from 0. An error is the event response.failed."""
    number = 0
    async with aclosing(_events(response, chunks)) as events:
        async for event in events:
            yield {"type": event.pop("type"), "sequence_number": number, **event}
            number += 1


async def _events(response: Response, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Event, None]:
    for kind in ("created", "in_progress"):
        yield {"type": f"response.{kind}", "response": response.json("in_progress")}
    output = _Output()
    last: list[Chunk] = []
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                for event in output.add(chunk):
                    yield event
                if chunk.finish_reason is not None:
                    last.append(chunk)
    except ApiError as error:
        yield {"type": "response.failed", "response": response.failed(error, output.items)}
        return
    cut = last[0].finish_reason == "length"
    for event in output.end("incomplete" if cut else "completed"):
        yield event
    whole = response.ended(output.items, Usage.of_chunks(last), cut)
    yield {"type": f"response.{whole['status']}", "response": whole}


class _Output:
    """The items of an output as they come. One at a time is open: text after a call is a message of its own.

    Attributes:
        items: what there is so far.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._call = -1  # the index of the answer's call that is open

    def add(self, chunk: Chunk) -> Iterator[Event]:
        """The events of a chunk's text, and of what is new in its calls.

        A chunk of several tokens does not say what of it came first. What goes on with the call that is open did: after
        the text it would be a call of its own.
        """
        open_call = self._call if self._is_open("function_call") else None
        for delta in chunk.tool_calls:
            if delta.index == open_call:
                yield from self._add_call(delta)
        if chunk.text:
            if not self._is_open("message"):
                yield from self._open(message_item("", "in_progress"))
            self.items[-1]["content"][0]["text"] += chunk.text
            yield self._event("output_text.delta", content_index=0, delta=chunk.text, logprobs=[])
        for delta in chunk.tool_calls:
            if delta.index != open_call:
                yield from self._add_call(delta)

    def _add_call(self, delta: ToolCallDelta) -> Iterator[Event]:
        if not self._is_open("function_call") or delta.index != self._call:
            self._call = delta.index
            yield from self._open(call_item(delta.id or "", delta.name or "", "", "in_progress"))
        if delta.arguments:
            self.items[-1]["arguments"] += delta.arguments
            yield self._event("function_call_arguments.delta", delta=delta.arguments)

    def end(self, status: str) -> Iterator[Event]:
        """The events of the end. An output has at least one item, if need be a message without text."""
        if not self.items:
            yield from self._open(message_item("", "in_progress"))
        yield from self._close(status)

    def _is_open(self, kind: str) -> bool:
        return bool(self.items) and self.items[-1]["type"] == kind

    def _open(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self._close("completed")
        self.items.append(item)
        if item["type"] == "message":
            yield self._of_item("added", {**item, "content": []})
            yield self._event("content_part.added", content_index=0, part=text_part(""))
        else:
            yield self._of_item("added", {**item})

    def _close(self, status: str) -> Iterator[Event]:
        if not self.items:
            return
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield self._event("output_text.done", content_index=0, text=part["text"], logprobs=[])
            yield self._event("content_part.done", content_index=0, part=part)
        else:
            yield self._event("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        yield self._of_item("done", item)

    def _of_item(self, kind: str, item: dict[str, Any]) -> Event:
        return {"type": f"response.output_item.{kind}", "output_index": len(self.items) - 1, "item": item}

    def _event(self, kind: str, **fields: Any) -> Event:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **place, **fields}
