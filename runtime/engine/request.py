"""One sequence: what was asked, and what has come of it so far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common.checks import check_ids
from ..sampling.logits_processors import LogitsProcessor
from ..sampling.params import SamplingParams

NOT_NUMBERS = (
    "the model's logits are not numbers (NaN or infinity), so no token can follow: load it as bfloat16 or float32 if "
    "this is float16, whose range is small; else its weights are damaged"
)


@dataclass(eq=False)
class Request:
    """A prompt to be continued, and its answer as it comes. What has come is written by the engine.

    ends: the model's own ends of text.
    answer: its index among the `n` answers to one prompt.
    watch: what its call must see of every step on the host.
    cached_tokens: how many of the prompt's tokens lay in the cache already.
    began, times: when it was given a row, and when each of its tokens came, by time.perf_counter.
    finish_reason: None while it runs, "stop" (an end token or stop string), "length", "error" or "abort".
    stop_reason: the stop token or string that ended it, None for the model's own ends; what is wrong, for "error".
    """

    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    answer: int = 0
    watch: Watch | None = None
    seed: int = field(init=False)
    ends: frozenset[int] = field(init=False)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    began: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        params = self.params
        self.seed = int(torch.randint(-(2**63), 2**63 - 1, ())) if params.seed is None else params.seed
        own = frozenset() if params.ignore_eos else self.eos_token_ids
        self.ends = own | frozenset(params.stop_token_ids or ())
        if params.allowed_token_ids is None:
            return
        permitted = {*params.allowed_token_ids}.difference(params.suppress_tokens or ())
        if not permitted:
            raise ValueError(
                f"suppress_tokens holds all of allowed_token_ids={list(params.allowed_token_ids)}: allow one"
            )
        if params.min_tokens and self.ends.issuperset(permitted):
            raise ValueError(
                f"min_tokens={params.min_tokens} holds back every token of allowed_token_ids={sorted(permitted)}; "
                "allow one that does not end the text, or set min_tokens=0"
            )

    @property
    def watched(self) -> bool:
        """Whether every step must show its logits to the host."""
        return self.watch is not None or bool(self.params.logprobs)

    def add(self, token_id: int, logprob: float, end: int) -> None:
        """A token, and how it ended the answer: 0 not, 1 an end, 2 the last that was asked for, 3 no token at all."""
        if end == 3:
            self.cut(len(self.token_ids))  # what was reported of it already
            self.finish("error", NOT_NUMBERS)
            return
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.times.append(time.perf_counter())
        if end == 1:
            self.finish("stop", token_id if token_id in (self.params.stop_token_ids or ()) else None)
        elif end == 2:
            self.finish("length")

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason

    def cut(self, tokens: int) -> None:
        """Forgets what came behind so many tokens."""
        for told in (self.token_ids, self.logprobs, self.top_logprobs, self.times):
            del told[tokens:]


@dataclass(eq=False)
class Watch:
    """What the host does with the logits of one call's requests, between the two halves of every step.

    prompts: [B, T] int64, the call's prompts as they were given, padding included.
    pad: stands in the ids behind an answer that has ended.
    early, processors: (ids [B, T + answer], scores [B, V] float32) -> scores, called one after the other, before and
        behind the penalties.
    logits, scores: by request, a float32 [V] for every token, where they are kept.
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

    @property
    def watches(self) -> bool:
        """Whether there is anything to see."""
        return bool(self.early or self.processors) or self.keep_logits or self.keep_scores

    def ids(self, told: Sequence[int]) -> Tensor:
        """[B, T + longest] the prompts and so many tokens of each answer, padded behind."""
        longest = max(told)
        answers = [
            request.token_ids[:count] + [self.pad] * (longest - count)
            for request, count in zip(self.requests, told, strict=True)
        ]
        return torch.cat((self.prompts, torch.tensor(answers, dtype=torch.int64).view(len(answers), longest)), 1)

    def process(self, processors: Sequence[LogitsProcessor], scores: dict[Request, Tensor]) -> dict[Request, Tensor]:
        """What processors make of the running requests' scores, [V] float32 each.

        They see the whole call, at the step of those whose scores they change: where some had to wait for a row, each
        step that is under way by itself. The scores of requests that are not at it are zero.
        """
        made = dict(scores)
        for step in {len(request.token_ids) for request in scores if processors}:
            now = {request: x for request, x in scores.items() if len(request.token_ids) == step}
            some = next(iter(now.values()))
            every = torch.stack([now.get(request, torch.zeros_like(some)) for request in self.requests])
            ids = self.ids([min(len(request.token_ids), step) for request in self.requests])
            for processor in processors:
                every = processor(ids.to(every.device), every)
            made |= {request: row for request, row in zip(self.requests, every, strict=True) if request in now}
        return made


def check_prompt(name: str, prompt: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError for an empty prompt, or one with an id that the model does not have."""
    if not prompt:
        raise ValueError(f"{name} is empty: give at least one token")
    check_ids(name, prompt, vocab_size)
