"""One request: what the caller asked for, and the tokens that the engine has generated for it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.checks import check_ids
from ..sampling.params import SamplingParams

NOT_NUMBERS = (
    "the model's logits are not numbers (NaN or infinity), so no token can follow: load it as bfloat16 or float32 if "
    "this is float16, whose range is small; else its weights are damaged"
)
NOTHING_LEFT = (
    "no token is left to choose: bans, allowed tokens, biases and logits processors together put every token at -inf "
    "or NaN; allow at least one at every step"
)


class Constraint(Protocol):
    """Which tokens may follow in one answer, whose form a grammar describes; see structured.grammars."""

    def allowed(self, token_ids: Sequence[int]) -> NDArray[np.uint32]:
        """Words [ceil(V / 32)]: a bit for each token that may follow these, which extend those of the call before.

        The tokens that end the answer are among them only where it is complete. Raises ValueError if none may follow.
        """


@dataclass(eq=False)
class Request:
    """A prompt to continue and, written by the engine, the tokens generated so far.

    Attributes:
        max_tokens: the most tokens to generate.
        eos_token_ids: the model's end-of-text tokens.
        answer: index among the `n` answers to one prompt; the random stream to sample from.
        hooks: the LogitsHooks of its call, if the host must do something with the logits of every step.
        constraint: which tokens may follow, if a grammar says so.
        ends: all tokens that end this answer.
        token_ids, logprobs, top_logprobs, times: for each generated token its id, log-probability, alternatives, and
            the time.perf_counter() at which the host received it.
        cached_tokens: prompt tokens whose keys and values were in the cache already.
        drafted, accepted: how many drafts steps have verified, and how many tokens those gave.
        began: the time.perf_counter() at which the request got a slot.
        on_change: called, in a step, when the request has a new token or has ended; must be quick.
        reader: whoever reads the answer. When it is gone, the request ends with "abort"; None: nobody need be there.
        finish_reason: None while it runs, then "stop" (an end token or stop string), "length", "error" or "abort".
        stop_reason: the stop token or stop string that ended it, None for the model's own end tokens; for "error" the
            message.
    """

    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    answer: int = 0
    hooks: Any = None
    constraint: Constraint | None = None
    seed: int = field(init=False)
    ends: frozenset[int] = field(init=False)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    began: float = 0.0
    on_change: Callable[[Request], None] | None = None
    reader: weakref.ref[Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        params = self.params
        if params.seed is None:
            self.seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu"))
        else:
            self.seed = params.seed
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
    def needs_host(self) -> bool:
        """Whether the host must see the logits of every step."""
        return self.hooks is not None or bool(self.params.logprobs)

    @property
    def ended(self) -> bool:
        """Whether no token comes any more. Ends the request if its reader is gone."""
        if self.finish_reason is None and self.reader is not None and self.reader() is None:
            self.finish("abort")
        return self.finish_reason is not None

    def append(self, token_id: int, logprob: float, end: int) -> None:
        """Adds a token. `end` says why it is the last, or that none came; see the op `advance`."""
        if end in (3, 4):
            self.truncate(len(self.token_ids))  # alternatives of the token that did not come
            self.finish("error", NOT_NUMBERS if end == 3 else NOTHING_LEFT)
            return
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.times.append(time.perf_counter())
        if end == 1:
            self.finish("stop", token_id if token_id in (self.params.stop_token_ids or ()) else None)
        elif end == 2:
            self.finish("length")
        elif self.on_change is not None:
            self.on_change(self)

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self.on_change is not None:
            self.on_change(self)

    def truncate(self, count: int) -> None:
        """Keeps the first `count` tokens."""
        for generated in (self.token_ids, self.logprobs, self.top_logprobs, self.times):
            del generated[count:]


def check_prompt(name: str, prompt: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError for an empty prompt, or one with an id outside the vocabulary."""
    if not prompt:
        raise ValueError(f"{name} is empty: give at least one token")
    check_ids(name, prompt, vocab_size)
