"""Constrained requests: before each step samples, the host writes into their slots which tokens may follow.

A constraint needs the token before, so such a step is launched in two parts. While the device runs the model, the host
reads the last step's tokens and makes the masks; then it copies them to the slots, and launches the second part, which
samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from .state import Slot


class Constraints:
    """Brings the masks of constrained requests to their slots.

    Args:
        allowed: [B, W] int32, the state's words of the tokens that each slot may sample.
    """

    def __init__(self, allowed: Tensor):
        self._allowed = allowed
        self._host = torch.empty(allowed.shape, dtype=torch.int32, device="cpu", pin_memory=allowed.is_cuda)
        self._words = self._host.numpy().view(np.uint32)

    def write(self, slots: Sequence[Slot | None]) -> None:
        """Writes the masks of the next token. All tokens before it must have been read.

        A request of which no token may follow ends with "error"; its slot is freed at the next step.
        """
        written = [slot.index for slot in slots if slot is not None and self._make(slot)]
        for _, run in groupby(enumerate(written), key=lambda pair: pair[1] - pair[0]):
            neighbours = [index for _, index in run]
            rows = slice(neighbours[0], neighbours[-1] + 1)
            self._allowed[rows].copy_(self._host[rows], non_blocking=True)

    def _make(self, slot: Slot) -> bool:
        """Makes a slot's mask in the host's memory. False if it has none."""
        request = slot.request
        if request.constraint is None or request.finish_reason is not None:
            return False
        try:
            self._words[slot.index] = request.constraint.allowed(request.token_ids)
        except ValueError as error:
            request.finish("error", str(error))
        return request.finish_reason is None
