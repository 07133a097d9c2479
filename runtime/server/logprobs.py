"""Log-probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from ..api.outputs import Chunk, CompletionOutput
from ..api.prompt_logprobs import PromptLogprobs
from .service import Service

_LEAST = -9999.0  # JSON has no -inf


class Logprobs:
    """The tokens of an answer, or of a chunk of one, with their log-probabilities.

    The token that ended the answer is left out, as it is from the text.

    Args:
        ends_in_text: the end is a part of the text (`include_stop_str_in_output`).
    """

    def __init__(self, service: Service, answer: Chunk | CompletionOutput, ends_in_text: bool):
        self._service = service
        ended = answer.finish_reason in ("stop", "tool_calls") and not isinstance(answer.stop_reason, str)
        count = len(answer.token_ids) - (ended and not ends_in_text and bool(answer.token_ids))
        self._ids, self._logprobs = answer.token_ids[:count], answer.logprobs[:count]
        self._tops: Sequence[Mapping[int, float]] = (answer.top_logprobs or [{}] * count)[:count]

    def chat(self) -> dict[str, Any]:
        """As `logprobs` of a chat completion."""
        entries = []
        for id, logprob, top in zip(self._ids, self._logprobs, self._tops, strict=True):
            alternatives = [self._entry(other, value) for other, value in top.items()]
            entries.append({**self._entry(id, logprob), "top_logprobs": alternatives})
        return {"content": entries, "refusal": None}

    def completion(self, offset: int = 0) -> dict[str, Any]:
        """As `logprobs` of a completion whose text begins at `offset`."""
        tokens = [self._service.token(id)[0] for id in self._ids]
        tops = [_by_text(self._service, top) for top in self._tops]
        offsets = [*accumulate(map(len, tokens), initial=offset)][: len(tokens)]
        logprobs = [max(logprob, _LEAST) for logprob in self._logprobs]
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        text, spelt = self._service.token(id)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": spelt}


def of_prompt(service: Service, scores: PromptLogprobs, text: str) -> dict[str, Any]:
    """As `logprobs` of a completion that repeats its prompt, whose text is given."""
    tokens = [service.token(id)[0] for id in scores.token_ids]
    # What a tokenizer adds, a token that begins every prompt or a space, is before the text.
    added = max("".join(tokens).find(text), 0)
    begins = [*accumulate(map(len, tokens), initial=-added)][: len(tokens)]
    offsets = [max(begin, 0) for begin in begins]
    logprobs = [None if logprob is None else max(logprob, _LEAST) for logprob in scores.logprobs]
    tops = [None if top is None else _by_text(service, top) for top in scores.top_logprobs]
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _by_text(service: Service, top: Mapping[int, float]) -> dict[str, float]:
    return {service.token(id)[0]: max(value, _LEAST) for id, value in top.items()}
