"""One engine for all callers of a model."""

from __future__ import annotations

from ..model.model import LanguageModel
from .engine import Engine
from .exclusive import Exclusive
from .graphs import Capture


class SharedEngine(Exclusive):
    """The engine of one model, made on first use, and replaced if it is too small or the model was moved.

    Args:
        cache_tokens, capture, speculation: as for Engine.
    """

    def __init__(
        self, cache_tokens: int | None = None, capture: Capture | None = None, speculation: bool | None = None
    ):
        super().__init__()
        self._cache_tokens, self._capture, self._speculation = cache_tokens, capture, speculation
        self._engine: Engine | None = None

    def get(self, model: LanguageModel, max_batch_size: int, max_seq_len: int) -> Engine:
        """An engine for at least `max_batch_size` requests at a time, of `max_seq_len` tokens each.

        One that does not serve is replaced as soon as it is idle. Raises as Engine.
        """
        with self.exclusively():
            engine = self._engine
            if engine is not None and engine.serves(model, max_batch_size, max_seq_len):
                return engine
            if engine is not None:
                max_batch_size = max(max_batch_size, engine.max_batch_size)
                max_seq_len = max(max_seq_len, engine.max_seq_len)
                engine.drop_if_stale()
                while engine.busy:
                    engine.step()
                self._engine = engine = None  # its memory must be free before the next one takes some
            self._engine = Engine(
                model,
                max_batch_size=max_batch_size,
                max_seq_len=max_seq_len,
                cache_tokens=self._cache_tokens,
                capture=self._capture,
                speculation=self._speculation,
            )
            return self._engine

    def repair(self) -> None:
        """Nothing to do: the engine is made last."""
