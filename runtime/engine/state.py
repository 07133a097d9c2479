"""The slots of the batch: which request has each, and the device tensors that a decode step reads and writes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

from torch import Tensor

from ...kernels.reference_sampling import FEW_TOKENS
from ..model.kv_cache import BatchMetadata
from ..sampling.settings import STATE
from .gain import Gain
from .layout import Layout
from .request import Request


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
    masked = (
        request.constraint is not None
        or p.allowed_token_ids is not None
        or p.suppress_tokens
        or (p.min_tokens > 0 and bool(request.ends))
    )
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
        prefilled: how many tokens of the prompt have been through the model, for this slot or before.
        started: whether the whole prompt has, so that decode steps run this slot.
        twin: another slot, scheduled at the same time, with the same prompt: its prefill serves both.
        drafts: how many drafts the next step has.
        gain: what drafts have cost and gained so far.
    """

    request: Request
    index: int
    pages: list[int]
    tier: Tier
    prefilled: int = 0
    started: bool = False
    twin: Slot | None = None
    drafts: int = 0
    gain: Gain = field(default_factory=Gain)

    @property
    def remaining(self) -> int:
        """How many tokens of the prompt still have to run."""
        return len(self.request.prompt_ids) - self.prefilled


@dataclass
class DecodeState:
    """B slots, each with one sequence or idle (seq_lens 0). V: vocabulary; W = ceil(V / 32) words, a bit per token.

    Attributes:
        batch: block tables, lengths and rotary frequencies. `seq_lens` counts the token that the next step reads, so it
            is also the position of the token that the step generates.
        token: [B] int64, what the next step reads.
        history: [B, Z] int32, the tokens of prompt and answer, the first seq_lens of which count.
        max_len: [B] int32, the sequence length at which a request has all its tokens.
        min_len: [B] int32, the sequence length from which it may end.
        most_drafts: [B] int32, the most drafts of a step (see `draft`).
        report: [B, 3M+1] int32, the step's report to the host, of up to M tokens (see `advance` and `draft`).
        end_mask: [B, W] int32, tokens that end the answer.
        seed, stream: [B] int64. top_k: [B] int64. temperature ... frequency_penalty: [B] float32.
        prompt_counts, output_counts: [B, V] int32, how often each token is in the prompt and in the answer.
        logit_bias: [B, V] float32.
        permitted, allowed: [B, W] int32, tokens that the caller permits, and these without the ends of text while
            seq_lens < min_len.
    """

    batch: BatchMetadata
    token: Tensor
    history: Tensor
    max_len: Tensor
    min_len: Tensor
    most_drafts: Tensor
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
    def of(cls, layout: Layout, buffer: Tensor) -> DecodeState:
        """The slots in a buffer [B * W] int32 of a `state_layout`. They are idle if it is zero."""
        views = layout.views(buffer)
        return cls(batch=BatchMetadata(*(views.pop(name) for name in _BATCH_FIELDS)), **views)

    def slots(self, first: int, last: int) -> DecodeState:
        """Slots first to last - 1, as views of these tensors."""
        batch = BatchMetadata(*(getattr(self.batch, name)[first:last] for name in _BATCH_FIELDS))
        rest = {name: getattr(self, name)[first:last] for name in _SLOT_FIELDS}
        return DecodeState(batch=batch, **rest)

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
        masks = ("end_mask", "permitted", "allowed")
        names = ("token", "history", "max_len", "min_len", *masks, "output_counts", "report")
        return {"seq_lens": self.batch.seq_lens, **{name: getattr(self, name) for name in names}}


_BATCH_FIELDS: Any = ("block_table", "seq_lens", "inv_freq")
_SLOT_FIELDS: Any = tuple(each.name for each in fields(DecodeState) if each.name != "batch")
