"""One call of LLM or AsyncLLM: its prompts, their settings, and the answers that come."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..engine.answer import Answer, Update
from ..sampling.params import SamplingParams
from .outputs import Chunk, RequestOutput, chunk_of, completion_of, timings_of


@dataclass(frozen=True, eq=False)
class Call:
    """A call, before or while it is answered.

    Attributes:
        prompts: each one's text, None if token ids were given, and its token ids.
        params: the settings of each.
        answers: those to the first prompt, `n` of them, then those to the next.
        single: whether the caller gave one prompt, rather than a list.
        called: the time.perf_counter() of the call.
    """

    prompts: list[tuple[str | None, list[int]]]
    params: list[SamplingParams]
    answers: list[Answer]
    single: bool
    called: float = field(default_factory=lambda: time.perf_counter())

    def outputs(self) -> RequestOutput | list[RequestOutput]:
        """The output of each prompt, once all answers have finished; that of a single one by itself."""
        outputs, done = [], iter(self.answers)
        for (text, ids), params in zip(self.prompts, self.params, strict=True):
            own = list(itertools.islice(done, params.n))
            outputs.append(
                RequestOutput(
                    text,
                    ids,
                    [completion_of(answer) for answer in own],
                    params,
                    own[0].request.cached_tokens,
                    sum(answer.request.drafted for answer in own),
                    sum(answer.request.accepted for answer in own),
                    timings_of([answer.request for answer in own], self.called),
                )
            )
        return outputs[0] if self.single else outputs

    def chunk(self, updates: Sequence[Update], device: torch.device) -> Chunk:
        """The chunk of one answer's next updates."""
        return chunk_of(updates, self.called, self._prompts_of[updates[-1].answer], device)

    @cached_property
    def _prompts_of(self) -> dict[Answer, int]:
        """For each answer the place of its prompt."""
        places = [place for place, params in enumerate(self.params) for _ in range(params.n)]
        return dict(zip(self.answers, places, strict=True))
