"""What a user gets back from LLM."""

from dataclasses import dataclass, field

from ..sampling.params import SamplingParams


@dataclass(frozen=True)
class Chunk:
    """What one step adds to a streamed answer.

    text: whole characters only, possibly none. token_ids: the ids behind this step; logprobs and top_logprobs: theirs,
    as in CompletionOutput. finish_reason, stop_reason: None until the last chunk, then as in CompletionOutput.
    prompt_tokens, decode_tokens: counts so far. prompt_tps, decode_tps: tokens per second of prefill (its time ends
    with the first token) and of the tokens after the first (0.0 while there are none). peak_memory: gigabytes, of the
    GPU or of the process. cached_tokens: those of the prompt whose keys and values lay in the cache already.
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


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. logprobs: of each chosen token; top_logprobs: {id: log-probability} for each, where asked for.

    finish_reason: "stop", "length" (max_tokens or the context's end), or "error". stop_reason: the stop string or stop
    token id that ended it, None for the model's own ends; of "error" the sentence that says what is wrong.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]] | None
    finish_reason: str | None
    stop_reason: int | str | None

    @property
    def cumulative_logprob(self) -> float:
        return sum(self.logprobs)


@dataclass(frozen=True)
class Timings:
    """Seconds. prompt: from when the model began with it to its first token. first_token: from the call to the first
    token, so with the time that it waited for others. decode: from the first token to the last one. All are 0 where no
    token came.
    """

    prompt: float
    first_token: float
    decode: float


@dataclass(frozen=True)
class RequestOutput:
    """The answers to one prompt, the sampling parameters that were applied, and how long it took.

    cached_tokens: those of the prompt whose keys and values lay in the cache already.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    sampling_params: SamplingParams
    cached_tokens: int
    timings: Timings = field(compare=False)

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.outputs[0].text
