"""What a decode step reads and writes, all of it on the device: where the rows stand, their tokens, their settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ...kernels.reference_sampling import FEW_TOKENS
from ..model.pages import Sequences
from .request import Request


class Tier(IntEnum):
    """Which stages of sampling a step has. One that a row leaves idle gives it the very bits of one turned off."""

    GREEDY = 0
    USUAL = 1  # temperature, a small top-k, top-p behind it, min-p, repetition penalty
    WIDE = 2  # the same, whatever top-k is
    FULL = 3


def tier_of(request: Request) -> Tier:
    """The lowest tier that has all stages of this request."""
    p = request.params
    masked = p.allowed_token_ids is not None or p.suppress_tokens or (p.min_tokens > 0 and bool(request.ends))
    if masked or p.logit_bias or p.typical_p != 1 or p.presence_penalty or p.frequency_penalty:
        return Tier.FULL
    if not p.greedy and (p.top_k > FEW_TOKENS or (p.top_k <= 0 and p.top_p < 1)):
        return Tier.WIDE
    return Tier.GREEDY if p.greedy and p.repetition_penalty == 1 else Tier.USUAL


_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_USUAL = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "prompt_counts", "output_counts")
_STAGES: dict[Tier, tuple[str, ...]] = {
    Tier.GREEDY: (),
    Tier.USUAL: _USUAL,
    Tier.WIDE: _USUAL,
    Tier.FULL: (*_FLOATS, "top_k", "prompt_counts", "output_counts", "logit_bias", "allowed"),
}


@dataclass
class DecodeState:
    """B rows, each one sequence or idle (seq_lens 0). V: vocabulary; W = ceil(V / 32) words, a bit for each token.

    Attributes:
        seqs: where the rows stand. `seq_lens` counts the token that the coming step reads, so it is also the place of
            the token that the step draws.
        token: [B] int64, what the coming step reads.
        max_len: [B] int32, the length at which a row ends.
        min_len: [B] int32, the length from which a row may end.
        report: [B, 3] int32, the step's report to the host (see `advance`).
        end_mask: [B, W] int32, tokens that end the row.
        seed, stream: [B] int64. top_k: [B] int64. temperature ... frequency_penalty: [B] float32.
        prompt_counts, output_counts: [B, V] int32, how often each token stands in the prompt and in the answer.
        logit_bias: [B, V] float32.
        permitted, allowed: [B, W] int32, the tokens that the user permits; these without `end_mask` below min_len.
    """

    seqs: Sequences
    token: Tensor
    max_len: Tensor
    min_len: Tensor
    report: Tensor
    end_mask: Tensor
    seed: Tensor
    stream: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    prompt_counts: Tensor
    output_counts: Tensor
    logit_bias: Tensor
    permitted: Tensor
    allowed: Tensor

    @classmethod
    def idle(cls, rows: int, pages: int, vocab_size: int, head_dim: int, device: torch.device) -> DecodeState:
        """Rows that no sequence has, of up to `pages` pages each."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        words = -(-vocab_size // 32)
        return cls(
            seqs=Sequences(zeros(pages), zeros(), zeros(head_dim // 2, dtype=torch.float32)),
            report=zeros(3),
            logit_bias=zeros(vocab_size, dtype=torch.float32),
            **{name: zeros() for name in ("max_len", "min_len")},
            **{name: zeros(dtype=torch.int64) for name in ("token", "seed", "stream", "top_k")},
            **{name: zeros(dtype=torch.float32) for name in _FLOATS},
            **{name: zeros(words) for name in ("end_mask", "permitted", "allowed")},
            **{name: zeros(vocab_size) for name in ("prompt_counts", "output_counts")},
        )

    def rows(self, first: int, last: int) -> DecodeState:
        """Rows first to last - 1, as views: what is written there is written here."""
        seqs = Sequences(*(getattr(self.seqs, name)[first:last] for name in _OF_SEQUENCES))
        rest = {name: getattr(self, name)[first:last] for name in _OF_ROWS}
        return DecodeState(seqs=seqs, **rest)

    def load(self, row: int, request: Request, prompt: Tensor, pages: list[int], inv_freq: Tensor) -> None:
        """A request's settings into a row, which stays idle: prompt [T] int64, its pages in order, inv_freq [D/2]."""
        p, length = request.params, len(prompt)
        ends, permitted = self._words(request.ends), p.allowed_token_ids
        self.end_mask[row] = ends
        self.permitted[row] = -1 if permitted is None else self._words(permitted)
        if p.suppress_tokens:
            self.permitted[row] &= ~self._words(p.suppress_tokens).to(self.permitted.device)
        self.allowed[row] = self.permitted[row]
        if p.min_tokens:
            self.allowed[row] &= ~ends.to(self.allowed.device)
        self.max_len[row] = length + request.max_tokens
        self.min_len[row] = length + p.min_tokens
        self.seed[row], self.stream[row] = request.seed, request.answer
        for name in _FLOATS:
            getattr(self, name)[row] = getattr(p, name)
        self.top_k[row] = max(p.top_k, 0)
        self.output_counts[row] = 0
        self.prompt_counts[row] = 0
        self.prompt_counts[row].index_add_(0, prompt, torch.ones_like(prompt, dtype=torch.int32))
        self.logit_bias[row] = 0
        if p.logit_bias:
            tokens = torch.tensor(list(p.logit_bias), device=self.token.device)
            self.logit_bias[row, tokens] = torch.tensor(list(p.logit_bias.values()), device=self.token.device)
        self.seqs.block_table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self.seqs.inv_freq[row] = inv_freq

    def clear(self, row: int) -> None:
        """Makes a row idle."""
        self.seqs.seq_lens[row] = 0

    def move(self, source: int, target: int) -> None:
        """What stands in one row goes on in another, and the first is idle."""
        for of, names in ((self.seqs, _OF_SEQUENCES), (self, _OF_ROWS)):
            for name in names:
                tensor = getattr(of, name)
                tensor[target] = tensor[source]
        self.clear(source)

    def stages(self, tier: Tier) -> dict[str, Any]:
        """The arguments of `sample` but for the logits."""
        keys = {"seed": self.seed, "stream": self.stream, "position": self.seqs.seq_lens}
        stages = {name: getattr(self, name) for name in _STAGES[tier]}
        return {"temperature": None, **keys, **stages, "few_candidates": tier == Tier.USUAL}

    def advanced(self) -> dict[str, Tensor]:
        """The arguments of `advance` except the sampled tokens and their log-probabilities."""
        names = ("token", "max_len", "end_mask", "report", "output_counts", "min_len", "permitted", "allowed")
        return {"seq_lens": self.seqs.seq_lens, **{name: getattr(self, name) for name in names}}

    def _words(self, token_ids: Iterable[int]) -> Tensor:
        """[W] int32 on the CPU with these tokens' bits."""
        ids = torch.tensor(sorted(set(token_ids)), dtype=torch.int64)
        words = torch.zeros(self.end_mask.shape[1], dtype=torch.int64)
        return words.index_add_(0, ids // 32, 1 << ids % 32).to(torch.int32)


_OF_SEQUENCES: Any = ("block_table", "seq_lens", "inv_freq")
_OF_ROWS: Any = tuple(field.name for field in fields(DecodeState) if field.name != "seqs")
