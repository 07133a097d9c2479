"""Sets of tokens as masks: a bit for each token, in words as the device reads them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from .params import SamplingParams


def holding(tokens: Collection[int], count: int) -> NDArray[np.bool_]:
    """[count] whether each token is one of `tokens`."""
    mask = np.zeros(count, bool)
    mask[[*tokens]] = True
    return mask


def permitted(params: SamplingParams, count: int) -> NDArray[np.bool_]:
    """[count] whether these settings permit each token."""
    mask = np.ones(count, bool) if params.allowed_token_ids is None else holding(params.allowed_token_ids, count)
    mask[[*(params.suppress_tokens or ())]] = False
    return mask


def packed(mask: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """The words of a mask, whose length is a multiple of 32: token i is bit i % 32 of word i // 32.

    That is bit i % 8 of byte i // 8, since hosts of GPUs are little-endian.
    """
    return np.packbits(mask, bitorder="little").view(np.uint32)
