"""What LLM returns: whole answers, or chunks of one as it is generated."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engine.answer import Answer, Update
from ..engine.request import Request
from ..sampling.params import SamplingParams
from ..tools.calls import ToolCall, ToolCallDelta
from ..tools.text_stream import ToolTextStream


@dataclass(frozen=True)
class Chunk:
    """What a token adds to a streamed answer; several tokens, where an asynchronous reader was slower than they came.

    Attributes:
        text: new text, whole characters only, possibly "". Calls of tools are no part of it.
        token_ids: the new tokens; none where an answer ends without one.
        logprobs, top_logprobs: of the new tokens, as in CompletionOutput.
        finish_reason, stop_reason: None until the last chunk, then as in CompletionOutput.
        prompt_tokens, decode_tokens: the number of tokens so far.
        prompt_tps: prompt tokens per second, from the call to the first token.
        decode_tps: tokens per second after the first token; 0.0 while there are none.
        peak_memory: the most memory so far, in gigabytes, of the GPU or of the process.
        cached_tokens, drafted, accepted: as in RequestOutput, so far.
        index: the answer's place among the `n` answers to the prompt.
        prompt_index: the prompt's place among those of the call.
        tool_calls: what is new in calls of tools.
        timings: None until the last chunk, then those of this answer.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_tokens: int
    decode_tokens: int
    prompt_tps: float
    decode_tps: float
    peak_memory: float
    cached_tokens: int
    drafted: int = 0
    accepted: int = 0
    index: int = 0
    prompt_index: int = 0
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    timings: Timings | None = field(default=None, compare=False)


@dataclass(frozen=True)
class CompletionOutput:
    """One answer.

    Attributes:
        index: its place among the `n` answers to its prompt.
        text: without the token or stop string that ended it, unless include_stop_str_in_output; and without calls.
        token_ids: the generated tokens.
        logprobs: the log-probability of each token.
        top_logprobs: for each token the likeliest ones, {id: log-probability}; None unless `logprobs` was given.
        finish_reason: "stop", "tool_calls" (it stopped, and there are calls), "length" (max_tokens, or the end of the
            context window) or "error".
        stop_reason: the stop string or stop token id that ended it, None for the model's own end tokens; for "error"
            the message.
        tool_calls: the calls of tools in it, in order.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    tool_calls: list[ToolCall] = field(default_factory=list)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message that goes on with the conversation, in OpenAI's form."""
        if not self.tool_calls:
            return {"role": "assistant", "content": self.text}
        calls = [call.as_message_part() for call in self.tool_calls]
        return {"role": "assistant", "content": self.text or None, "tool_calls": calls}

    @property
    def cumulative_logprob(self) -> float:
        """The sum of `logprobs`."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class Timings:
    """Seconds; 0 where no token came.

    Attributes:
        prompt: from the start of prefill to the first token.
        first_token: from the call to the first token, the time spent waiting for other requests included.
        decode: from the first token to the last.
    """

    prompt: float
    first_token: float
    decode: float


@dataclass(frozen=True)
class RequestOutput:
    """The answers to one prompt.

    Attributes:
        prompt: the prompt's text, after the chat template; None if token ids were given.
        prompt_token_ids: the prompt's tokens.
        outputs: `n` answers.
        sampling_params: the parameters that were used.
        cached_tokens: prompt tokens whose keys and values an earlier prompt or answer left in the cache: whole
            pages of 64, or with batch_invariant whole chunks of 512; all of them if the same prompt ran beside it.
        drafted, accepted: how many tokens of the answers were drafted, and how many drafts were right, each of which
            saved a step; see the LLM's `speculation`.
        timings: how long it took.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    sampling_params: SamplingParams
    cached_tokens: int
    drafted: int = field(compare=False)
    accepted: int = field(compare=False)
    timings: Timings = field(compare=False)

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.outputs[0].text

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The first answer's calls of tools."""
        return self.outputs[0].tool_calls

    @property
    def message(self) -> dict[str, Any]:
        """The first answer as a message: see CompletionOutput."""
        return self.outputs[0].message


@dataclass(frozen=True)
class ToolUpdate(Update):
    """An Update of an answer that may call tools.

    tool_calls: what is new in its calls.
    """

    tool_calls: list[ToolCallDelta]


class ToolAnswer(Answer):
    """An answer that may call tools."""

    def __init__(self, request: Request, stream: ToolTextStream):
        super().__init__(request, stream)
        self.parser = stream.parser

    def read(self) -> ToolUpdate | None:
        update = super().read()
        return None if update is None else ToolUpdate(**vars(update), tool_calls=self.parser.new_deltas())


def completion_of(answer: Answer) -> CompletionOutput:
    """The output of a finished answer."""
    request = answer.request
    return CompletionOutput(
        request.answer,
        answer.text,
        request.token_ids,
        request.logprobs,
        request.top_logprobs if request.params.logprobs else None,
        _finish_reason(answer),
        request.stop_reason,
        answer.parser.calls if isinstance(answer, ToolAnswer) else [],
    )


def chunk_of(updates: Sequence[Update], called: float, prompt_index: int, device: torch.device) -> Chunk:
    """The chunk of one answer's next updates; `called`: the time.perf_counter() of the call."""
    last = updates[-1]
    request, read = last.answer.request, last.read_tokens
    new = slice(read - sum(update.token_id is not None for update in updates), read)
    times = request.times[:read]
    return Chunk(
        "".join(update.text for update in updates),
        request.token_ids[new],
        request.logprobs[new],
        request.top_logprobs[new] if request.params.logprobs else None,
        _finish_reason(last.answer) if last.finished else None,
        request.stop_reason if last.finished else None,
        len(request.prompt_ids),
        read,
        len(request.prompt_ids) / (times[0] - called) if times else 0.0,
        (read - 1) / (times[-1] - times[0]) if read > 1 else 0.0,
        peak_memory(device),
        request.cached_tokens,
        request.drafted,
        request.accepted,
        request.answer,
        prompt_index,
        [delta for update in updates if isinstance(update, ToolUpdate) for delta in update.tool_calls],
        timings_of([request], called) if last.finished else None,
    )


def _finish_reason(answer: Answer) -> str | None:
    reason = answer.request.finish_reason
    return "tool_calls" if reason == "stop" and isinstance(answer, ToolAnswer) and answer.parser.calls else reason


def timings_of(requests: Sequence[Request], called: float) -> Timings:
    """The timings of the requests of one prompt; `called`: the time.perf_counter() of the call."""
    timed = [request for request in requests if request.times]
    if not timed:
        return Timings(0.0, 0.0, 0.0)
    first = min(timed, key=lambda request: request.times[0])
    begun, last = first.times[0], max(request.times[-1] for request in timed)
    return Timings(begun - first.began, begun - called, last - begun)


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in gigabytes: PyTorch's on a GPU, else the process's; 0 if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows has none
        return 0.0
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
