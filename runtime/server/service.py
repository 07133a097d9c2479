"""The model behind a server: loading, ready or draining."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

from ..api.async_llm import AsyncLLM
from .errors import ApiError
from .metrics import Metrics
from .settings import Settings


class Service:
    """What the routes of one app share.

    Args:
        model: an AsyncLLM, or what loads one, which `start` calls in a thread of its own.

    Attributes:
        created: Unix time of the start.
        draining: whether new requests are refused, since the server is about to end.
        active: requests under way.
        failure: what loading raised.
        scoring: held while a prompt is scored, which takes a KV cache of its own: one at a time.
    """

    def __init__(self, model: AsyncLLM | Callable[[], AsyncLLM], settings: Settings):
        self.settings, self.created = settings, int(time.time())
        self.draining, self.active = False, 0
        self.failure: BaseException | None = None
        self.scoring = asyncio.Lock()
        self._llm = model if isinstance(model, AsyncLLM) else None
        self._load = None if isinstance(model, AsyncLLM) else model
        self.metrics = Metrics(settings.model, lambda: self._llm)

    def start(self) -> None:
        """Begins to load. A thread that is no daemon would keep Ctrl-C waiting for the weights."""
        if self._load is not None:
            threading.Thread(target=self._loading, args=(self._load,), name="internlm3-load", daemon=True).start()

    def _loading(self, load: Callable[[], AsyncLLM]) -> None:
        try:
            loaded = load()
            if loaded.llm.model.device.type == "cuda":
                loaded.llm.warm_up()
            self._llm = loaded
        except BaseException as error:
            self.failure = error

    @property
    def loading(self) -> bool:
        """Whether the model is still being loaded."""
        return self._llm is None and self.failure is None

    @property
    def llm(self) -> AsyncLLM:
        """Raises ApiError, with status 503, while it is loading."""
        if self._llm is None:
            raise ApiError(503, "Loading model", code="loading")
        return self._llm

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()

    def check_model(self, name: str | None) -> None:
        """Raises ApiError, with status 404, if this is not the model's name. None is the model that is served."""
        if name not in (None, self.settings.model):
            known = f"the model {name!r} does not exist here; {self.settings.model!r} does"
            raise ApiError(404, known, param="model", code="model_not_found")

    def head(self, prefix: str, kind: str) -> dict[str, Any]:
        """The fields that begin an answer, and are the same in every chunk of it: an id of its own with this prefix."""
        name, now = f"{prefix}-{secrets.token_hex(12)}", int(time.time())
        return {"id": name, "object": kind, "created": now, "model": self.settings.model}

    @cached_property
    def token_bytes(self) -> list[bytes | None]:
        """The bytes of every token, None for those that are no text."""
        return self.llm.llm.tokenizer.token_bytes()

    def token(self, id: int) -> tuple[str, list[int]]:
        """A token's text, and its bytes in UTF-8; of a part of a character the text is U+FFFD."""
        found = self.token_bytes[id] if id < len(self.token_bytes) else None
        spelt = found if found is not None else str(self.llm.llm.tokenizer.convert_ids_to_tokens(id)).encode()
        return spelt.decode(errors="replace"), list(spelt)
