"""The log-probabilities of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..engine.engine import Engine
from ..engine.hooks import scores_of
from ..model.kv_cache import PagedKVCache, pages_of
from ..model.model import LanguageModel
from .prompt_logits import prompt_logits


@dataclass(frozen=True)
class PromptLogprobs:
    """How likely each token of a prompt is after those before it.

    Attributes:
        token_ids: the prompt's tokens, T of them.
        logprobs: the log-probability of each; None for the first one, which has none before it.
        top_logprobs: for each the likeliest tokens there, {id: log-probability}; None for the first one.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    top_logprobs: list[dict[int, float] | None]


# Of some tokens in order: the log-probability of each, and the likeliest tokens in its place.
Scores = list[tuple[float, dict[int, float]]]


def scores(model: LanguageModel, engine: Engine, ids: list[int], count: int) -> Iterator[Scores]:
    """The scores of a prompt's tokens from the second one on, chunk by chunk.

    Each chunk is computed when it is asked for, between two steps of the engine. The engine's own cache has no part in
    it: of tokens that are cached there are no logits.
    """
    with engine.between_steps():
        kv_cache = PagedKVCache(model.config, pages_of(len(ids)), model.dtype, model.device)
    chunks = prompt_logits(model, kv_cache, ids)
    while True:
        with engine.between_steps():
            if (chunk := next(chunks, None)) is None:
                return
            new = scores_of(*chunk, count)
        yield new


def joined(ids: list[int], chunks: Iterable[Scores]) -> PromptLogprobs:
    """The result of `scores`."""
    each = [score for chunk in chunks for score in chunk]
    return PromptLogprobs(ids, [None, *(logprob for logprob, _ in each)], [None, *(top for _, top in each)])
