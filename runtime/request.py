"""One sequence: what was asked, and what has come of it so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .sampling import SamplingParams
from .token_ids import check_ids


@dataclass(eq=False)
class Request:
    """A prompt to be continued, and its answer as it comes.

    answer: its index among the `n` answers to one prompt.
    finish_reason: None while it runs, "stop" (an end token or stop string), "length", or "abort".
    stop_reason: the stop token or string that ended it, None for the model's own ends.
    """

    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    answer: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason


def check_prompt(name: str, prompt: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError for an empty prompt, or one with an id that the model does not have."""
    if not prompt:
        raise ValueError(f"{name} is empty: give at least one token")
    check_ids(name, prompt, vocab_size)
