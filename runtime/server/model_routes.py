"""Routes about the model and the server: /v1/models, /tokenize, /detokenize, /health, /metrics, and the page at /."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from ..api.inputs import encode_prompt
from .errors import ApiError, told_to_the_client
from .limits import draining
from .schemas import DetokenizeRequest, TokenizeRequest
from .service import Service

_PAGE = Path(__file__).with_name("page.html")
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        with told_to_the_client():
            tokens = await asyncio.to_thread(_tokens, service, body)
        return {"count": len(tokens), "max_model_len": service.llm.llm.max_seq_len, "tokens": tokens}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        tokenizer = service.llm.llm.tokenizer
        if wrong := [token for token in body.tokens if not 0 <= token < len(tokenizer)]:
            raise ApiError(400, f"tokens: {wrong[0]} is not in [0, {len(tokenizer)})", param="tokens")
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)}

    @router.head("/health")  # as probes ask
    @router.get("/health")
    async def health() -> dict[str, str]:
        if service.draining:
            raise draining()
        assert service.llm
        return {"status": "ok"}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=PROMETHEUS)

    @router.get("/")
    async def page() -> Response:
        # Its own policy, in a meta element, can't forbid that another page frames it.
        return FileResponse(
            _PAGE, media_type="text/html", headers={"content-security-policy": "frame-ancestors 'none'"}
        )

    return router


def _model(service: Service) -> dict[str, Any]:
    own = {"id": service.settings.model, "object": "model", "created": service.created, "owned_by": "internlm3"}
    return {**own, "max_model_len": service.llm.llm.max_seq_len}


def _tokens(service: Service, body: TokenizeRequest) -> list[int]:
    llm = service.llm.llm
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give prompt or messages, one of them", param="prompt")
    if body.messages is None:
        special = {"add_special_tokens": body.add_special_tokens}
        return encode_prompt(llm.tokenizer, body.prompt or "", llm.max_seq_len, **special)
    return llm.chat_prompt_ids(body.messages, **body.prompt_options())
