"""The app: its routes, its middleware, and the life of its model."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from ..api.async_llm import AsyncLLM
from ..version import VERSION
from . import chat, completions, errors, model_routes, responses
from .guard import Guard
from .limits import Limits
from .service import Service
from .settings import Settings


def create_app(model: AsyncLLM | Callable[[], AsyncLLM], settings: Settings) -> FastAPI:
    """An ASGI app that serves one model under OpenAI's API.

    Args:
        model: an AsyncLLM, or what loads one: it is called in a thread when the app starts, and until it returns
            requests get status 503. The app closes it when it ends.
    """
    service = Service(model, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        service.start()
        yield
        service.close()

    # No pages of documentation: they load scripts from elsewhere. Their content is at /openapi.json.
    app = FastAPI(title="internlm3", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for room in (chat, completions, responses, model_routes):
        app.include_router(room.routes(service))
    errors.install(app)
    app.add_middleware(Limits, service=service)
    app.add_middleware(Guard, settings=settings)
    if settings.allow_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allow_origin, allow_methods=["*"], allow_headers=["*"]
        )
    return app
