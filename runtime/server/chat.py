"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..api.outputs import Chunk, CompletionOutput
from ..tools.calls import ToolCallDelta
from .answers import begun, whole
from .connection import EventStream
from .json_response import JSON
from .logprobs import Logprobs
from .schemas import ChatRequest
from .service import Service
from .usage import Usage


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        llm = service.llm
        options = {**body.prompt_options(), **body.settings()}
        if body.stream:
            chunks = await begun(service, request.receive, llm.stream(body.messages, **options))
            return EventStream(_events(service, body, chunks))
        outputs, usage = await whole(service, request.receive, llm.chat(body.messages, **options))
        choices = [_choice(service, body, answer) for answer in outputs[0].outputs]
        return JSON({**service.head("chatcmpl", "chat.completion"), "choices": choices, "usage": usage.json()})

    return router


def _choice(service: Service, body: ChatRequest, answer: CompletionOutput) -> dict[str, Any]:
    return {
        "index": answer.index,
        "message": {**answer.message, "refusal": None},
        "logprobs": _logprobs(service, body, answer),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }


def _logprobs(service: Service, body: ChatRequest, answer: Chunk | CompletionOutput) -> dict[str, Any] | None:
    return Logprobs(service, answer, bool(body.include_stop_str_in_output)).chat() if body.logprobs else None


async def _events(
    service: Service, body: ChatRequest, chunks: AsyncGenerator[Chunk, None]
) -> AsyncGenerator[dict[str, Any], None]:
    head = service.head("chatcmpl", "chat.completion.chunk")
    rest = {"usage": None} if body.include_usage else {}

    def event(chunk: Chunk, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": chunk.index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return {**head, "choices": [choice], **rest}

    greeted: set[int] = set()
    last: list[Chunk] = []
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk.index not in greeted:
                greeted.add(chunk.index)
                yield event(chunk, {"role": "assistant", "content": ""})
            delta: dict[str, Any] = {"content": chunk.text} if chunk.text else {}
            if chunk.tool_calls:
                delta["tool_calls"] = [_delta(call) for call in chunk.tool_calls]
            logprobs = _logprobs(service, body, chunk)
            if delta or (logprobs and logprobs["content"]):
                yield event(chunk, delta, logprobs=logprobs)
            if chunk.finish_reason is not None:
                last.append(chunk)
                yield event(chunk, {}, finish_reason=chunk.finish_reason, stop_reason=chunk.stop_reason)
    if body.include_usage:
        yield {**head, "choices": [], "usage": Usage.of_chunks(last).json()}


def _delta(call: ToolCallDelta) -> dict[str, Any]:
    first = {"id": call.id, "type": "function"} if call.id else {}
    name = {"name": call.name} if call.name else {}
    return {"index": call.index, **first, "function": {**name, "arguments": call.arguments}}
