"""POST /v1/responses."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response as HTTPResponse

from .answers import begun, whole
from .connection import EventStream
from .json_response import JSON
from .response import Response
from .response_events import events_of
from .response_schemas import ResponseRequest
from .service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(body: ResponseRequest, request: Request) -> HTTPResponse:
        service.check_model(body.model)
        llm, messages = service.llm, body.messages
        options = {
            "thinking": bool(body.thinking),
            "tools": body.chat_tools,
            "tool_choice": body.chat_tool_choice,
            **body.settings(),
        }
        response = Response(body, service.settings.model)
        if body.stream:
            chunks = await begun(service, request.receive, llm.stream(messages, **options))
            return EventStream(events_of(response, chunks))
        (output,), usage = await whole(service, request.receive, llm.chat(messages, **options))
        return JSON(response.whole(output.outputs[0], usage))

    return router
