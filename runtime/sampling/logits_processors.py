"""transformers' settings that go by the tokens so far: what each makes of a step's scores.

All of them are callables (ids [B, L] int64, scores [B, V] float32) -> scores, on steps that the host watches.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .params import SamplingParams

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


def early_processors(params: SamplingParams) -> list[LogitsProcessor]:
    """Those that come before all penalties."""
    return [sequence_bias(params.sequence_bias.items())] if params.sequence_bias else []


def processors(
    params: SamplingParams, *, begin: int, most: int, ends: Iterable[int], prefix: Sequence[LogitsProcessor] = ()
) -> list[LogitsProcessor]:
    """Those that come behind the penalties, in transformers' order.

    begin: columns of the prompt. most: new tokens at most. ends: the tokens that end a text. prefix: what
    prefix_allowed_tokens_fn asks for.
    """
    ends, found = sorted(ends), []
    if params.no_repeat_ngram_size:
        found.append(no_repeat_ngram(params.no_repeat_ngram_size))
    # An end of text is no bad word, as in transformers.
    if words := [word for word in params.bad_words_ids or () if len(word) > 1 or word[0] not in ends]:
        found.append(sequence_bias((word, -math.inf) for word in words))
    found += prefix
    if params.forced_eos_token_id:
        found.append(forced_tokens(params.forced_eos_token_id, begin + most - 1))
    if params.exponential_decay_length_penalty and ends:
        start, factor = params.exponential_decay_length_penalty
        found.append(exponential_decay(begin + start, factor, ends))
    if params.begin_suppress_tokens:
        found.append(suppress_at(begin, params.begin_suppress_tokens))
    return found


def sequence_bias(biases: Iterable[tuple[Sequence[int], float]]) -> LogitsProcessor:
    """Adds to a token's score where it would complete one of these sequences; -inf forbids it."""
    by_length: dict[int, list[tuple[Sequence[int], float]]] = defaultdict(list)
    for sequence, bias in biases:
        by_length[len(sequence)].append((sequence, bias))
    groups = [
        (torch.tensor([sequence for sequence, _ in group]), torch.tensor([bias for _, bias in group]))
        for group in by_length.values()
    ]

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        total = torch.zeros_like(scores)
        for sequences, values in groups:
            begins, lasts = sequences[:, :-1].to(ids.device), sequences[:, -1].to(ids.device)
            known = begins.shape[1]
            if known <= ids.shape[1]:
                text_ends = ids[:, None, ids.shape[1] - known :]
                completes = (text_ends == begins).all(-1)
                total.index_add_(1, lasts, torch.where(completes, values.to(scores), 0.0))
        return scores + total

    return process


def no_repeat_ngram(size: int) -> LogitsProcessor:
    """Forbids a token that would complete a sequence of `size` tokens which the text holds already."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        length = ids.shape[1]
        if length < size:
            return scores
        grams = ids.unfold(1, size, 1)
        again = (grams[..., :-1] == ids[:, None, length - size + 1 :]).all(-1)
        rows, places = again.nonzero(as_tuple=True)
        return scores.index_put((rows, grams[rows, places, -1]), scores.new_tensor(-math.inf))

    return process


def forced_tokens(tokens: Sequence[int], at: int) -> LogitsProcessor:
    """Allows these tokens alone, where a text has `at` tokens."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] != at:
            return scores
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor(tokens, device=scores.device), 0.0)

    return process


def exponential_decay(start: float, factor: float, ends: Sequence[int]) -> LogitsProcessor:
    """Adds |score| * (factor ** tokens - 1) to the ends of text, for the tokens that a text has beyond `start`."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        beyond = ids.shape[1] - start
        if beyond <= 0:
            return scores
        tokens = torch.tensor(ends, device=scores.device)
        own = scores[:, tokens]
        more = (own.abs() * (factor**beyond - 1)).masked_fill(~own.isfinite(), 0.0)
        return scores.index_add(1, tokens, more)

    return process


def suppress_at(at: int, tokens: Sequence[int]) -> LogitsProcessor:
    """Forbids these tokens where a text has `at` tokens."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] != at:
            return scores
        return scores.index_fill(1, torch.tensor(tokens, device=scores.device), -math.inf)

    return process
