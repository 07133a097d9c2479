"""Drafts that are planted: right ones, wrong ones, and ends of text."""

import numpy as np
import torch
from torch import Tensor


class Planted:
    """An op `draft` for a CPU, which continues texts that it knows, and others at random.

    Args:
        texts: the token ids of prompts with their answers.
        wrong: the share of drafts that are replaced by a random token, or by an end of text.
    """

    def __init__(self, texts: list[list[int]], vocab_size: int, end: int, wrong: float = 0.0, seed: int = 0):
        self._texts, self._tokens, self._end = texts, vocab_size, end
        self._wrong, self._rng = wrong, np.random.default_rng(seed)

    def __call__(
        self,
        history: Tensor,
        seq_lens: Tensor,
        max_len: Tensor,
        min_len: Tensor,
        most_drafts: Tensor,
        *,
        report: Tensor,
        drafts: Tensor,
        draft_lens: Tensor,
    ) -> None:
        for x in (drafts, draft_lens, report[:, -1:]):
            x.zero_()
        limits = zip(seq_lens.tolist(), max_len.tolist(), min_len.tolist(), most_drafts.tolist(), strict=True)
        for row, (length, longest, least, most) in enumerate(limits):
            if length == 0:
                continue
            text = history[row, :length].tolist()
            room = least - length - 1 if length < least else longest
            count = max(min(drafts.shape[1] - 1, most, longest - length - 1, room), 0)
            known = next((known for known in self._texts if known[:length] == text), text)
            guess = [*known[length:], *self._rng.integers(self._tokens, size=count).tolist()][:count]
            lies = [self._end if self._rng.random() < 0.5 else int(self._rng.integers(self._tokens)) for _ in guess]
            guess = [lie if self._rng.random() < self._wrong else token for token, lie in zip(guess, lies, strict=True)]
            drafts[row, : count + 1] = torch.tensor([text[-1], *guess])
            draft_lens[row, : count + 1] = length + torch.arange(count + 1)
            report[row, -1] = count

    __name__ = "draft"
