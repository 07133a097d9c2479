"""A response of OpenAI's Responses API: the object that a client gets."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from ..api.outputs import CompletionOutput
from .errors import ApiError
from .response_items import call_item, message_item
from .response_schemas import ResponseRequest
from .usage import Usage

Items = Sequence[dict[str, Any]]


class Response:
    """One response, from its request to its end. Every form of it has the same id.

    Args:
        model: its name.
    """

    def __init__(self, body: ResponseRequest, model: str):
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.instructions,
            "max_output_tokens": body.settings().get("max_tokens"),
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
        }

    def json(self, status: str, output: Items = (), **more: Any) -> dict[str, Any]:
        """The response in some state."""
        rest = {"error": None, "incomplete_details": None, "usage": None, **more}
        return {**self._head, "status": status, "output": [*output], **rest}

    def ended(self, output: Items, usage: Usage, cut: bool) -> dict[str, Any]:
        """The response at its end; `cut`: by its length."""
        details = {"reason": "max_output_tokens"} if cut else None
        status = "incomplete" if cut else "completed"
        return self.json(status, output, incomplete_details=details, usage=_usage(usage))

    def failed(self, error: ApiError, output: Items) -> dict[str, Any]:
        """The response after an error."""
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        return self.json("failed", output, error={"code": code, "message": error.message})

    def whole(self, answer: CompletionOutput, usage: Usage) -> dict[str, Any]:
        """The response of an answer that was not streamed: its text, if there is any, and its calls."""
        cut = answer.finish_reason == "length"
        text = [message_item(answer.text, "completed")] if answer.text or not answer.tool_calls else []
        calls = [call_item(call.id, call.name, call.arguments, "completed") for call in answer.tool_calls]
        output = [*text, *calls]
        output[-1]["status"] = "incomplete" if cut else "completed"
        return self.ended(output, usage, cut)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": usage.prompt - usage.cached},
        "output_tokens": usage.generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.generated,
        "timings": usage.json()["timings"],
    }
