"""Calls of tools as an answer makes them: whole ones, and the pieces of a stream."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        id: its name in the conversation, which the message with its result repeats as `tool_call_id`.
        name: the function's name as the model wrote it, which need not be that of a tool it was given.
        arguments: the arguments as the model wrote them: the text of a JSON object. It is incomplete if the answer was
            cut by length, and may be invalid otherwise too, as a model writes it freely unless the call was forced.
    """

    id: str
    name: str
    arguments: str

    def as_message_part(self) -> dict[str, Any]:
        """The call as an item of `tool_calls` in a message, in OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class ToolCallDelta:
    """What a chunk of a streamed answer adds to a call.

    Attributes:
        index: which call of the answer, from 0.
        id, name: of the call, in its first delta; None in the others.
        arguments: more of the arguments' text. All of a call's deltas joined are its `arguments`.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


def new_id() -> str:
    """A new id of a call."""
    return f"call_{secrets.token_hex(12)}"
