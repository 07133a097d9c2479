"""transformers' settings that depend on the text so far, as logits processors.

A processor is a callable (ids [B, L] int64, scores [B, V] float32) -> scores [B, V]. It runs on the host between the
forward pass and sampling; scores are on the model's device.
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
    """The processors that run before the penalties."""
    return [sequence_bias(params.sequence_bias.items())] if params.sequence_bias else []


def processors(
    params: SamplingParams, *, begin: int, most: int, ends: Iterable[int], prefix: Sequence[LogitsProcessor] = ()
) -> list[LogitsProcessor]:
    """The processors that run after the penalties, in transformers' order.

    Args:
        params: the settings.
        begin: length of the prompt, in columns.
        most: the largest number of new tokens.
        ends: the end-of-text tokens.
        prefix: processors made from prefix_allowed_tokens_fn.
    """
    ends, found = sorted({*ends}), []
    if params.no_repeat_ngram_size:
        found.append(no_repeat_ngram(params.no_repeat_ngram_size))
    # As in transformers, bad_words_ids never forbids an end-of-text token.
    if words := [word for word in params.bad_words_ids or () if len(word) > 1 or word[0] not in ends]:
        found.append(sequence_bias((word, -math.inf) for word in words))
    found += prefix
    if params.forced_ends:
        found.append(forced_tokens(params.forced_ends, begin + most - 1))
    if params.exponential_decay_length_penalty and ends:
        start, factor = params.exponential_decay_length_penalty
        found.append(exponential_decay(begin + start, factor, ends))
    if params.begin_suppress_tokens:
        found.append(suppress_at(begin, params.begin_suppress_tokens))
    return found


def sequence_bias(biases: Iterable[tuple[Sequence[int], float]]) -> LogitsProcessor:
    """Adds a bias to the score of each token that would complete its sequence; -inf forbids the token."""
    by_length: dict[int, list[tuple[Sequence[int], float]]] = defaultdict(list)
    for sequence, bias in biases:
        by_length[len(sequence)].append((sequence, bias))
    groups = [
        (
            torch.tensor([ids for ids, _ in group], dtype=torch.int64, device="cpu"),
            torch.tensor([bias for _, bias in group], dtype=torch.float32, device="cpu"),
        )
        for group in by_length.values()
    ]

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        total = torch.zeros_like(scores)
        for sequences, values in groups:
            prefixes, lasts = sequences[:, :-1].to(ids.device), sequences[:, -1].to(ids.device)
            known = prefixes.shape[1]
            if known <= ids.shape[1]:
                tails = ids[:, None, ids.shape[1] - known :]
                completes = (tails == prefixes).all(-1)
                total.index_add_(1, lasts, torch.where(completes, values.to(scores), 0.0))
        return scores + total

    return process


def no_repeat_ngram(size: int) -> LogitsProcessor:
    """Forbids tokens that would complete a sequence of `size` tokens that already occurs in the text."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        length = ids.shape[1]
        if length < size:
            return scores
        grams = ids.unfold(1, size, 1)
        repeated = (grams[..., :-1] == ids[:, None, length - size + 1 :]).all(-1)
        rows, columns = repeated.nonzero(as_tuple=True)
        return scores.index_put((rows, grams[rows, columns, -1]), scores.new_tensor(-math.inf))

    return process


def forced_tokens(tokens: Sequence[int], at: int) -> LogitsProcessor:
    """Allows only these tokens as the next one after exactly `at` tokens."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] != at:
            return scores
        kept = torch.tensor(tokens, dtype=torch.int64, device=scores.device)
        return torch.full_like(scores, -math.inf).index_fill(1, kept, 0.0)

    return process


def exponential_decay(start: float, factor: float, ends: Sequence[int]) -> LogitsProcessor:
    """Adds |score| * (factor ** beyond - 1) to end-of-text tokens, where `beyond` counts the tokens after `start`."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        beyond = ids.shape[1] - start
        if beyond <= 0:
            return scores
        tokens = torch.tensor(ends, dtype=torch.int64, device=scores.device)
        end_scores = scores[:, tokens]
        bonus = (end_scores.abs() * (factor**beyond - 1)).masked_fill(~end_scores.isfinite(), 0.0)
        return scores.index_add(1, tokens, bonus)

    return process


def suppress_at(at: int, tokens: Sequence[int]) -> LogitsProcessor:
    """Forbids these tokens as the next one after exactly `at` tokens."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] != at:
            return scores
        dropped = torch.tensor(tokens, dtype=torch.int64, device=scores.device)
        return scores.index_fill(1, dropped, -math.inf)

    return process
