"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ..api.outputs import Chunk, CompletionOutput, RequestOutput
from .answers import begun, whole
from .connection import EventStream
from .errors import ApiError
from .logprobs import Logprobs
from .schemas import CompletionRequest
from .service import Service
from .usage import Usage


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        llm = service.llm
        options = body.settings()
        prompts = _prompts(body)
        answers, most = len(prompts) * (body.n or 1), service.settings.max_waiting
        if answers > most:
            raise ApiError(400, f"{answers} answers are asked for, and at most {most} may be", param="prompt")
        if body.stream:
            if len(prompts) > 1:
                raise ApiError(400, f"a stream answers one prompt; there are {len(prompts)}", param="prompt")
            chunks = await begun(service, request.receive, llm.stream(prompts[0], **options))
            return EventStream(_events(service, body, chunks))
        outputs, usage = await whole(service, request.receive, llm.generate(prompts, **options))
        choices = [
            _choice(service, body, place * (body.n or 1) + answer.index, output, answer)
            for place, output in enumerate(outputs)
            for answer in output.outputs
        ]
        return JSONResponse({**service.head("cmpl", "text_completion"), "choices": choices, "usage": usage.json()})

    return router


def _prompts(body: CompletionRequest) -> list[Any]:
    """The prompts in a list: texts, or lists of token ids."""
    if isinstance(body.prompt, str) or (body.prompt and isinstance(body.prompt[0], int)):
        return [body.prompt]
    if not body.prompt:
        raise ApiError(400, "prompt is an empty list: give at least one prompt, or one token", param="prompt")
    return [*body.prompt]


def _echo(service: Service, body: CompletionRequest, prompt: str | list[int] | None) -> str:
    """The beginning of the text that repeats the prompt, if that was asked for."""
    if not body.echo or prompt is None:
        return ""
    return prompt if isinstance(prompt, str) else str(service.llm.llm.tokenizer.decode(prompt))


def _choice(
    service: Service, body: CompletionRequest, index: int, output: RequestOutput, answer: CompletionOutput
) -> dict[str, Any]:
    echo = _echo(service, body, output.prompt if output.prompt is not None else output.prompt_token_ids)
    return {
        "index": index,
        "text": echo + answer.text,
        "logprobs": _logprobs(service, body, answer),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }


def _logprobs(
    service: Service, body: CompletionRequest, answer: Chunk | CompletionOutput, offset: int = 0
) -> dict[str, Any] | None:
    if body.logprobs is None:
        return None
    return Logprobs(service, answer, bool(body.include_stop_str_in_output)).completion(offset)


async def _events(
    service: Service, body: CompletionRequest, chunks: AsyncGenerator[Chunk, None]
) -> AsyncGenerator[dict[str, Any], None]:
    head = service.head("cmpl", "text_completion")
    rest = {"usage": None} if body.include_usage else {}
    lengths: dict[int, int] = {}
    last: list[Chunk] = []
    async with aclosing(chunks):
        async for chunk in chunks:
            echo = "" if chunk.index in lengths else _echo(service, body, _prompts(body)[0])
            begin = lengths.get(chunk.index, 0)
            lengths[chunk.index] = begin + len(chunk.text)
            choice = {
                "index": chunk.index,
                "text": echo + chunk.text,
                "logprobs": _logprobs(service, body, chunk, begin),
                "finish_reason": chunk.finish_reason,
                "stop_reason": chunk.stop_reason,
            }
            if chunk.text or echo or chunk.finish_reason or choice["logprobs"]:
                yield {**head, "choices": [choice], **rest}
            if chunk.finish_reason is not None:
                last.append(chunk)
    if body.include_usage:
        yield {**head, "choices": [], "usage": Usage.of_chunks(last).json()}
