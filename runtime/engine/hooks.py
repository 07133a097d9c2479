"""Logits on the host: processors that change them, copies that are kept, and sampling from the result.

A captured step samples on the device. If any active request has hooks or asks for log-probabilities of alternatives,
the engine runs the model and then `sample_with_hooks` instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...kernels.reference_sampling import FILTERS, PENALTIES, filter_logits, log_probability, penalize
from ..common.shown import shown
from ..sampling.logits_processors import LogitsProcessor
from .request import Request
from .state import DecodeState, Tier


@dataclass(eq=False)
class LogitsHooks:
    """What the host does with the logits of one call's requests, between the model and sampling.

    Attributes:
        prompts: [B, T] int64, the call's prompts as they were given, padding included.
        pad: token id that fills the ids after an answer that has ended.
        early, processors: (ids [B, T + answer], scores [B, V] float32) -> scores, called in order, before and after the
            penalties.
        requests: the call's requests, one for each row of `prompts`.
        keep_logits, keep_scores: whether to keep the model's logits, and the scores that are sampled from.
        logits, scores: what was kept: for each request a float32 [V] for every token.
        error: what a processor raised. The requests have ended with "abort" then.
    """

    prompts: Tensor
    pad: int
    early: Sequence[LogitsProcessor] = ()
    processors: Sequence[LogitsProcessor] = ()
    requests: list[Request] = field(default_factory=list)
    keep_logits: bool = False
    keep_scores: bool = False
    logits: dict[Request, list[Tensor]] = field(default_factory=dict)
    scores: dict[Request, list[Tensor]] = field(default_factory=dict)
    error: BaseException | None = None

    @property
    def needed(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.early or self.processors) or self.keep_logits or self.keep_scores

    def ids(self, counts: Sequence[int]) -> Tensor:
        """[B, T + longest] each prompt with the first counts[b] tokens of its answer, padded on the right."""
        longest = max(counts)
        answers = [
            request.token_ids[:count] + [self.pad] * (longest - count)
            for request, count in zip(self.requests, counts, strict=True)
        ]
        new = torch.tensor(answers, dtype=torch.int64, device="cpu").view(len(answers), longest)
        return torch.cat((self.prompts, new), 1)

    def process(self, processors: Sequence[LogitsProcessor], scores: dict[Request, Tensor]) -> dict[Request, Tensor]:
        """Runs processors on the scores, [V] float32 each, of the active requests.

        Processors get every row of the call. Rows admitted later are at an earlier step, so each step present is
        processed separately; the scores of rows at other steps are zero.
        """
        processed = dict(scores)
        for step in {len(request.token_ids) for request in scores if processors}:
            now = {request: x for request, x in scores.items() if len(request.token_ids) == step}
            some = next(iter(now.values()))
            rows = torch.stack([now.get(request, torch.zeros_like(some)) for request in self.requests])
            ids = self.ids([min(len(request.token_ids), step) for request in self.requests])
            for processor in processors:
                rows = _checked(processor, processor(ids.to(rows.device), rows), rows)
            processed |= {request: row for request, row in zip(self.requests, rows, strict=True) if request in now}
        return processed

    def fail(self, error: BaseException) -> None:
        """Ends the requests of this call, whose reader gets the error."""
        self.error = error
        for request in self.requests:
            if request.finish_reason is None:
                request.finish("abort")


def _checked(processor: LogitsProcessor, scores: Any, given: Tensor) -> Tensor:
    """What a processor returned, if it has the shape of what it was given; as float32 on its device."""
    if not isinstance(scores, Tensor) or scores.shape != given.shape:
        what = f"a tensor {list(scores.shape)}" if isinstance(scores, Tensor) else shown(scores)
        raise ValueError(f"{shown(processor)} must return scores of shape {list(given.shape)}; it returned {what}")
    return scores.to(given)


def sample_with_hooks(
    ops: ModuleType, logits: Tensor, state: DecodeState, tier: Tier, requests: Sequence[Request | None]
) -> None:
    """Like `decode.sample` for logits [B, V], with hooks and log-probabilities; requests[b] has slot b.

    Processors run where transformers runs them: after bias, penalties and masks (sequence_bias before them), before
    temperature and filters. Log-probabilities stay the model's own. Slots without a request are left alone.

    An exception of a processor ends the requests of its call.
    """
    slots = {request: slot for slot, request in enumerate(requests) if request is not None}
    calls = {request.hooks: None for request in slots if request.hooks is not None}

    def process(x: Tensor, *, early: bool) -> dict[Request, Tensor]:
        scores = {request: x[slot] for request, slot in slots.items() if not request.ended}
        for call in calls:
            own = {request: x for request, x in scores.items() if request.hooks is call}
            try:
                scores |= call.process(call.early if early else call.processors, own)
            except BaseException as error:
                call.fail(error)
        return {request: x for request, x in scores.items() if not request.ended}

    biased = logits.float()
    if any(call.early for call in calls):
        biased = biased.clone()
        for request, changed in process(biased, early=True).items():
            biased[slots[request]] = changed
    penalties = {name: x for name, x in state.stages(tier).items() if name in PENALTIES}
    scores = process(penalize(biased, **penalties), early=False)
    for request, x in scores.items():
        slot, x = slots[request], x[None]
        own, mine = state.slots(slot, slot + 1), logits[slot : slot + 1]
        stages = stages_after_penalties(own, tier)
        sampled, _ = ops.sample(x, **stages)
        hooks = request.hooks
        if hooks is not None and hooks.keep_logits:
            hooks.logits.setdefault(request, []).append(mine[0].float())
        if hooks is not None and hooks.keep_scores:
            hooks.scores.setdefault(request, []).append(_filtered(x, stages)[0])
        if request.params.logprobs:
            ids, values = top_logprobs(mine, request.params.logprobs)
            request.top_logprobs.append(dict(zip(ids[0].tolist(), values[0].tolist(), strict=True)))
        ops.advance(sampled, log_probability(mine, sampled), **own.advance_arguments())


def stages_after_penalties(state: DecodeState, tier: Tier) -> dict[str, Any]:
    """The arguments of the op `sample` for scores that penalties and masks have changed already."""
    return {name: stage for name, stage in state.stages(tier).items() if name not in PENALTIES}


def _filtered(x: Tensor, stages: Mapping[str, Any]) -> Tensor:
    """The scores that `sample` samples from: float32 [B, V], -inf where filtered out; greedy rows unfiltered."""
    temperature = stages["temperature"]
    if temperature is None:
        return x
    kept = filter_logits(x, **{name: stage for name, stage in stages.items() if name in ("temperature", *FILTERS)})
    return torch.where(temperature[:, None] == 0, x, kept)


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row of logits [B, V]: ids, int64, and log-probabilities, float32.

    The log-probabilities are those that the sampled token gets, to the last bit.
    """
    token_ids = logits.float().topk(min(count, logits.shape[-1])).indices
    return token_ids, log_probability(logits, token_ids)


def scores_of(logits: Tensor, tokens: Tensor, count: int) -> list[tuple[float, dict[int, float]]]:
    """The log-probability of a token, int64 [B], in each row of logits [B, V], and the `count` likeliest there."""
    own = log_probability(logits, tokens).tolist()
    top = [
        dict(zip(*each, strict=True)) for each in zip(*(x.tolist() for x in top_logprobs(logits, count)), strict=True)
    ]
    return list(zip(own, top, strict=True))
