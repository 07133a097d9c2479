"""Log-probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..api.outputs import Chunk, CompletionOutput
from ..api.prompt_logprobs import PromptLogprobs
from ..tokenization.text_stream import TextStream
from .service import Service

_LEAST = -9999.0  # JSON has no -inf


class TextOffsets:
    """Where in a text its tokens begin, as they come: each at the character that it begins or goes on with.

    Args:
        stream: makes the text, without stop strings.
        begin: where the first token begins.
    """

    def __init__(self, stream: TextStream, begin: int = 0):
        self._stream, self._length = stream, begin

    def of(self, ids: Iterable[int]) -> list[int]:
        """Those of the next tokens."""
        offsets = []
        for id in ids:
            offsets.append(self._length)
            self._length += len(self._stream.push(id))
        return offsets


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

    def completion(self, offsets: TextOffsets) -> dict[str, Any]:
        """As `logprobs` of a completion. `offsets` is at the first of the tokens."""
        return {
            "tokens": [_name(self._service, id) for id in self._ids],
            "token_logprobs": [max(logprob, _LEAST) for logprob in self._logprobs],
            "top_logprobs": [_by_name(self._service, top) for top in self._tops],
            "text_offset": offsets.of(self._ids),
        }

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        text, spelt = self._service.token(id)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": spelt}


def of_prompt(service: Service, scores: PromptLogprobs, text: str) -> dict[str, Any]:
    """As `logprobs` of a completion that repeats its prompt, whose text is given."""
    tokenizer, ids = service.llm.llm.tokenizer, scores.token_ids
    stream = TextStream(tokenizer, skip_special_tokens=False, exact=True)
    spelt = "".join(map(stream.push, ids)) + stream.flush()
    # What a tokenizer adds, a token that begins every prompt or a space, is before the text.
    added = max(spelt.find(text), 0)
    offsets = TextOffsets(TextStream(tokenizer, skip_special_tokens=False, exact=True), -added)
    return {
        "tokens": [_name(service, id) for id in ids],
        "token_logprobs": [None if logprob is None else max(logprob, _LEAST) for logprob in scores.logprobs],
        "top_logprobs": [None if top is None else _by_name(service, top) for top in scores.top_logprobs],
        "text_offset": [max(offset, 0) for offset in offsets.of(ids)],
    }


def _name(service: Service, id: int) -> str:
    """A token in a completion, which has no field for bytes: its text, or as OpenAI writes a part of a character."""
    text, spelt = service.token(id)
    part = text.encode() != bytes(spelt)
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt) if part else text


def _by_name(service: Service, top: Mapping[int, float]) -> dict[str, float]:
    """The likeliest tokens first, by name; of two with one name the likelier."""
    named: dict[str, float] = {}
    for id, value in top.items():
        named.setdefault(_name(service, id), max(value, _LEAST))
    return named
