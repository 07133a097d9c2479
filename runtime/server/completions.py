"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive

from ..api.outputs import Chunk, CompletionOutput, Timings
from ..sampling.params import SamplingParams
from ..tokenization.text_stream import TextStream
from .answers import begun, scored, whole
from .connection import EventStream
from .errors import ApiError, told_to_the_client
from .json_response import JSON
from .logprobs import Logprobs, TextOffsets, of_prompt
from .schemas import CompletionRequest
from .service import Service
from .usage import Usage

# Characters of a prompt's end that decide how an answer's first token is spelt after it, with room to spare.
_TAIL = 64


@dataclass(frozen=True)
class _Echo:
    """What an answer repeats of its prompt.

    Attributes:
        logprobs: of the prompt's tokens, in the form of the API.
    """

    text: str = ""
    logprobs: dict[str, Any] | None = None


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        llm, n = service.llm, body.n or 1
        options = body.settings()
        prompts = _prompts(body)
        answers, most = len(prompts) * n, service.settings.max_waiting
        if answers > most:
            raise ApiError(400, f"{answers} answers are asked for, and at most {most} may be", param="prompt")
        if body.max_tokens == 0:
            return await _only_scored(service, body, request.receive, prompts)
        echoes = await _echoes(service, body, request.receive, prompts)
        if body.stream:
            chunks = await begun(service, request.receive, llm.stream(prompts, **options))
            return EventStream(_events(service, body, prompts, echoes, chunks))
        outputs, usage = await whole(service, request.receive, llm.generate(prompts, **options))
        choices = [
            _choice(
                service, body, place * n + answer.index, echo, answer, _offsets(service, body, prompts[place], echo)
            )
            for place, (output, echo) in enumerate(zip(outputs, echoes, strict=True))
            for answer in output.outputs
        ]
        return JSON({**service.head("cmpl", "text_completion"), "choices": choices, "usage": usage.json()})

    return router


def _prompts(body: CompletionRequest) -> list[Any]:
    """The prompts in a list: texts, or lists of token ids."""
    if isinstance(body.prompt, str) or (body.prompt and isinstance(body.prompt[0], int)):
        return [body.prompt]
    if not body.prompt:
        raise ApiError(400, "prompt is an empty list: give at least one prompt, or one token", param="prompt")
    return [*body.prompt]


async def _echoes(service: Service, body: CompletionRequest, receive: Receive, prompts: list[Any]) -> list[_Echo]:
    """What the answers to each prompt begin with."""
    if not body.echo:
        return [_Echo()] * len(prompts)
    decode = service.llm.llm.tokenizer.decode
    texts = [prompt if isinstance(prompt, str) else str(decode(prompt)) for prompt in prompts]
    if body.logprobs is None:
        return [_Echo(text) for text in texts]
    scores = await scored(service, receive, prompts, body.logprobs)
    return [_Echo(text, of_prompt(service, own, text)) for text, own in zip(texts, scores, strict=True)]


async def _only_scored(service: Service, body: CompletionRequest, receive: Receive, prompts: list[Any]) -> Response:
    """The answer for max_tokens 0: prompts with their log-probabilities, and nothing after them."""
    with told_to_the_client():
        SamplingParams.from_kwargs(SamplingParams(), **{**body.settings(), "max_tokens": None})
    began = time.perf_counter()
    echoes = await _echoes(service, body, receive, prompts)
    seconds = time.perf_counter() - began
    n, nothing = body.n or 1, CompletionOutput(0, "", [], [], None, "length", None)
    choices = [
        _choice(service, body, place * n + index, echo, nothing, _offsets(service, body, prompts[place], echo))
        for place, echo in enumerate(echoes)
        for index in range(n)
    ]
    count = sum(len(echo.logprobs["tokens"]) for echo in echoes if echo.logprobs)
    usage = Usage(count, 0, 0, 0, 0, Timings(seconds, seconds, 0.0))
    service.metrics.finished(usage, ["length"] * len(choices))
    return JSON({**service.head("cmpl", "text_completion"), "choices": choices, "usage": usage.json()})


def _offsets(service: Service, body: CompletionRequest, prompt: Any, echo: _Echo) -> TextOffsets | None:
    """Where the tokens of an answer to a prompt begin, after what it repeats; None where nobody asks for it."""
    if body.logprobs is None:
        return None
    tokenizer, skips = service.llm.llm.tokenizer, body.skip_special_tokens is not False
    ids = tokenizer.encode(prompt[-_TAIL:], add_special_tokens=False) if isinstance(prompt, str) else prompt
    return TextOffsets(TextStream(tokenizer, prompt_ids=ids, skip_special_tokens=skips), len(echo.text))


def _choice(
    service: Service,
    body: CompletionRequest,
    index: int,
    echo: _Echo,
    answer: Chunk | CompletionOutput,
    offsets: TextOffsets | None,
) -> dict[str, Any]:
    """One choice, or a piece of it."""
    logprobs: dict[str, Any] | None = None
    if offsets is not None:
        own = Logprobs(service, answer, bool(body.include_stop_str_in_output))
        logprobs = own.completion(offsets)
        if echo.logprobs is not None:
            logprobs = {name: echo.logprobs[name] + values for name, values in logprobs.items()}
    return {
        "index": index,
        "text": echo.text + answer.text,
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }


async def _events(
    service: Service,
    body: CompletionRequest,
    prompts: list[Any],
    echoes: list[_Echo],
    chunks: AsyncGenerator[Chunk, None],
) -> AsyncGenerator[dict[str, Any], None]:
    head = service.head("cmpl", "text_completion")
    rest = {"usage": None} if body.include_usage else {}
    begun: dict[int, TextOffsets | None] = {}
    last: list[Chunk] = []
    async with aclosing(chunks):
        async for chunk in chunks:
            index, echo = chunk.prompt_index * (body.n or 1) + chunk.index, _Echo()
            if index not in begun:
                echo = echoes[chunk.prompt_index]
                begun[index] = _offsets(service, body, prompts[chunk.prompt_index], echo)
            choice = _choice(service, body, index, echo, chunk, begun[index])
            if choice["text"] or choice["finish_reason"] or choice["logprobs"]:
                yield {**head, "choices": [choice], **rest}
            if chunk.finish_reason is not None:
                last.append(chunk)
    if body.include_usage:
        yield {**head, "choices": [], "usage": Usage.of_chunks(last).json()}
