"""What a request has cost: its tokens, and how long they took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..api.outputs import Chunk, RequestOutput, Timings


@dataclass(frozen=True)
class Usage:
    """Tokens and seconds of one request.

    Attributes:
        generated: tokens of all its answers.
        cached: prompt tokens that were in the KV cache.
        drafted, accepted: tokens that speculation drafted, and those that were right.
    """

    prompt: int
    generated: int
    cached: int
    drafted: int
    accepted: int
    timings: Timings

    @classmethod
    def of_output(cls, output: RequestOutput) -> Usage:
        generated = sum(len(answer.token_ids) for answer in output.outputs)
        tokens = len(output.prompt_token_ids), generated, output.cached_tokens
        return cls(*tokens, output.drafted, output.accepted, output.timings)

    @classmethod
    def of_chunks(cls, last: Sequence[Chunk]) -> Usage:
        """From the last chunk of each answer to some prompts."""
        prompts: dict[int, list[Chunk]] = {}
        for chunk in last:
            prompts.setdefault(chunk.prompt_index, []).append(chunk)
        first, *others = map(cls._of_prompt, prompts.values())
        return sum(others, start=first)

    @classmethod
    def _of_prompt(cls, last: Sequence[Chunk]) -> Usage:
        each = [chunk.timings for chunk in last if chunk.timings is not None]
        first = min(each, key=lambda timings: timings.first_token)
        end = max(timings.first_token + timings.decode for timings in each)
        return cls(
            last[0].prompt_tokens,
            sum(chunk.decode_tokens for chunk in last),
            min(chunk.cached_tokens for chunk in last),
            sum(chunk.drafted for chunk in last),
            sum(chunk.accepted for chunk in last),
            Timings(first.prompt, first.first_token, end - first.first_token),
        )

    def __add__(self, other: Usage) -> Usage:
        """That of both, which ran at the same time."""
        a, b = self.timings, other.timings
        return Usage(
            self.prompt + other.prompt,
            self.generated + other.generated,
            self.cached + other.cached,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            Timings(max(a.prompt, b.prompt), max(a.first_token, b.first_token), max(a.decode, b.decode)),
        )

    def json(self) -> dict[str, Any]:
        """As `usage` of OpenAI's API, with timings. Tokens a second are of the whole request, after its first token."""
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "timings": {
                "time_to_first_token_ms": _ms(self.timings.first_token),
                "prompt_ms": _ms(self.timings.prompt),
                "predicted_ms": _ms(self.timings.decode),
                "predicted_per_second": round((self.generated - 1) / self.timings.decode, 2)
                if self.timings.decode
                else None,
            },
        }
        if self.drafted:
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            }
        return usage


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
