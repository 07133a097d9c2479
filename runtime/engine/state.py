"""The slots of the batch: which request has each, and the device tensors that a decode step reads and writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ...kernels.reference_sampling import FEW_TOKENS
from ..model.kv_cache import BatchMetadata
from ..sampling.settings import STATE
from .request import Request

_INT32_MAX = 2**31 - 1


class Tier(IntEnum):
    """Which stages of sampling a step runs.

    An unused stage leaves a row bit-identical, so one step serves requests of different tiers.
    """

    GREEDY = 0
    USUAL = 1  # temperature, a small top-k and top-p after it, min-p, repetition penalty
    WIDE = 2  # the same with any top-k
    FULL = 3  # all


def tier_of(request: Request) -> Tier:
    """The lowest tier with all stages that a request needs."""
    p = request.params
    masked = p.allowed_token_ids is not None or p.suppress_tokens or (p.min_tokens > 0 and bool(request.ends))
    if masked or p.logit_bias or p.typical_p != 1 or p.presence_penalty or p.frequency_penalty:
        return Tier.FULL
    if not p.greedy and (p.top_k > FEW_TOKENS or (p.top_k <= 0 and p.top_p < 1)):
        return Tier.WIDE
    return Tier.GREEDY if p.greedy and p.repetition_penalty == 1 else Tier.USUAL


_USUAL = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "prompt_counts", "output_counts")
_STAGES: dict[Tier, tuple[str, ...]] = {
    Tier.GREEDY: (),
    Tier.USUAL: _USUAL,
    Tier.WIDE: _USUAL,
    Tier.FULL: (*STATE, "prompt_counts", "output_counts", "logit_bias", "allowed"),
}


@dataclass(eq=False)
class Slot:
    """A place in the batch, and the request that has it.

    Attributes:
        index: position in the batch.
        pages: pages of the KV cache, in order.
        tier: the stages of sampling that the request needs.
        twin: another slot, scheduled at the same time, with the same prompt: its prefill serves both.
        launched: the number of tokens whose steps were launched.
        prompt: [T] int64, on the device, once the slot's state is loaded.
    """

    request: Request
    index: int
    pages: list[int]
    tier: Tier
    twin: Slot | None = None
    launched: int = 0
    prompt: Tensor = field(init=False)


@dataclass
class DecodeState:
    """B slots, each with one sequence or idle (seq_lens 0). V: vocabulary; W = ceil(V / 32) words, a bit per token.

    Attributes:
        batch: block tables, lengths and rotary frequencies. `seq_lens` counts the token that the next step reads, so it
            is also the position of the token that the step generates.
        token: [B] int64, what the next step reads.
        max_len: [B] int32, the sequence length at which a request has all its tokens.
        min_len: [B] int32, the sequence length from which it may end.
        report: [B, 3] int32, the step's report to the host (see `advance`).
        end_mask: [B, W] int32, tokens that end the answer.
        seed, stream: [B] int64. top_k: [B] int64. temperature ... frequency_penalty: [B] float32.
        prompt_counts, output_counts: [B, V] int32, how often each token is in the prompt and in the answer.
        logit_bias: [B, V] float32.
        permitted, allowed: [B, W] int32, tokens that the caller permits, and these without the ends of text while
            seq_lens < min_len.
    """

    batch: BatchMetadata
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
    def idle(cls, slots: int, pages: int, vocab_size: int, head_dim: int, device: torch.device) -> DecodeState:
        """Idle slots for sequences of up to `pages` pages."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        words = -(-vocab_size // 32)
        return cls(
            batch=BatchMetadata(zeros(pages), zeros(), zeros(head_dim // 2, dtype=torch.float32)),
            report=zeros(3),
            logit_bias=zeros(vocab_size, dtype=torch.float32),
            **{name: zeros() for name in ("max_len", "min_len")},
            **{name: zeros(dtype=torch.int64) for name in ("token", "seed", "stream")},
            **{name: zeros(dtype=getattr(torch, dtype)) for name, dtype in STATE.items()},
            **{name: zeros(words) for name in ("end_mask", "permitted", "allowed")},
            **{name: zeros(vocab_size) for name in ("prompt_counts", "output_counts")},
        )

    def slots(self, first: int, last: int) -> DecodeState:
        """Slots first to last - 1, as views of these tensors."""
        batch = BatchMetadata(*(getattr(self.batch, name)[first:last] for name in _BATCH_FIELDS))
        rest = {name: getattr(self, name)[first:last] for name in _SLOT_FIELDS}
        return DecodeState(batch=batch, **rest)

    def load(self, slot: Slot, inv_freq: Tensor) -> None:
        """Writes a request's prompt, pages and settings into its slot, which stays idle. inv_freq: [D/2] float32."""
        index, request, prompt, pages = slot.index, slot.request, slot.prompt, slot.pages
        p, length = request.params, len(prompt)
        end_mask, permitted = self._words(request.ends), p.allowed_token_ids
        self.end_mask[index] = end_mask
        self.permitted[index] = -1 if permitted is None else self._words(permitted)
        if p.suppress_tokens:
            self.permitted[index] &= ~self._words(p.suppress_tokens).to(self.permitted.device)
        self.allowed[index] = self.permitted[index]
        if p.min_tokens:
            self.allowed[index] &= ~end_mask.to(self.allowed.device)
        self.max_len[index] = length + request.max_tokens
        self.min_len[index] = min(length + p.min_tokens, _INT32_MAX)  # never, beyond any context
        self.seed[index], self.stream[index] = request.seed, request.answer
        for name in STATE:
            value = getattr(p, name)
            # A top_k of -1 is off; one beyond the vocabulary may be any number.
            getattr(self, name)[index] = min(max(value, 0), _INT32_MAX) if name == "top_k" else value
        self.output_counts[index] = 0
        self.prompt_counts[index] = 0
        self.prompt_counts[index].index_add_(0, prompt, torch.ones_like(prompt, dtype=torch.int32))
        self.logit_bias[index] = 0
        if p.logit_bias:
            tokens = torch.tensor(list(p.logit_bias), dtype=torch.int64, device=self.token.device)
            biases = torch.tensor(list(p.logit_bias.values()), dtype=torch.float32, device=self.token.device)
            self.logit_bias[index, tokens] = biases
        self.batch.block_table[index, : len(pages)] = torch.tensor(pages, dtype=torch.int32, device="cpu")
        self.batch.inv_freq[index] = inv_freq

    def clear(self, index: int) -> None:
        """Makes a slot idle."""
        self.batch.seq_lens[index] = 0

    def move(self, source: int, target: int) -> None:
        """Moves everything in one slot to another; the first becomes idle."""
        for owner, names in ((self.batch, _BATCH_FIELDS), (self, _SLOT_FIELDS)):
            for name in names:
                tensor = getattr(owner, name)
                tensor[target] = tensor[source]
        self.clear(source)

    def stages(self, tier: Tier) -> dict[str, Any]:
        """The arguments of the op `sample` besides the logits."""
        keys = {"seed": self.seed, "stream": self.stream, "position": self.batch.seq_lens}
        stages = {name: getattr(self, name) for name in _STAGES[tier]}
        return {"temperature": None, **keys, **stages, "few_candidates": tier == Tier.USUAL}

    def advance_arguments(self) -> dict[str, Tensor]:
        """The arguments of the op `advance` besides what was sampled."""
        names = ("token", "max_len", "end_mask", "report", "output_counts", "min_len", "permitted", "allowed")
        return {"seq_lens": self.batch.seq_lens, **{name: getattr(self, name) for name in names}}

    def _words(self, token_ids: Iterable[int]) -> Tensor:
        """[W] int32 on the CPU with the bits of these tokens set."""
        ids = torch.tensor(sorted(set(token_ids)), dtype=torch.int64, device="cpu")
        words = torch.zeros(self.end_mask.shape[1], dtype=torch.int64, device="cpu")
        return words.index_add_(0, ids // 32, 1 << ids % 32).to(torch.int32)


_BATCH_FIELDS: Any = ("block_table", "seq_lens", "inv_freq")
_SLOT_FIELDS: Any = tuple(field.name for field in fields(DecodeState) if field.name != "batch")
