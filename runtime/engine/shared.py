"""One engine for all callers of a model."""

from __future__ import annotations

import threading

from ..model.model import LanguageModel
from .engine import Engine
from .graphs import Capture


class SharedEngine:
    """The engine of one model, made on first use, and replaced if it is too small or the model was moved.

    Args:
        cache_tokens, capture: as for Engine.
    """

    def __init__(self, model: LanguageModel, cache_tokens: int | None = None, capture: Capture | None = None):
        self._model, self._cache_tokens, self._capture = model, cache_tokens, capture
        self._lock = threading.Lock()
        self._engine: Engine | None = None

    def get(self, max_batch_size: int, max_seq_len: int) -> Engine:
        """An engine for at least `max_batch_size` requests at a time, of `max_seq_len` tokens each.

        One that does not serve is replaced as soon as it is idle. Raises as Engine.
        """
        with self._lock:
            engine = self._engine
            if engine is not None and engine.serves(self._model, max_batch_size, max_seq_len):
                return engine
            if engine is not None:
                max_batch_size = max(max_batch_size, engine.max_batch_size)
                max_seq_len = max(max_seq_len, engine.max_seq_len)
                while engine.busy:
                    engine.step()
                self._engine = engine = None  # its memory must be free before the next one takes some
            self._engine = Engine(
                self._model,
                max_batch_size=max_batch_size,
                max_seq_len=max_seq_len,
                cache_tokens=self._cache_tokens,
                capture=self._capture,
            )
            return self._engine
