"""The keywords of sampling settings, for type checkers."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class SamplingKeywords(TypedDict, total=False):
    """What SamplingParams.from_kwargs takes: settings, their aliases, do_sample, and other libraries' forms of a
    constraint. None means a setting's default.
    """

    n: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop_str_in_output: bool | None
    logprobs: int | None
    skip_special_tokens: bool | None
    speculation: bool | None
    priority: int | None
    suppress_tokens: Sequence[int] | None
    json_schema: Mapping[str, Any] | type | str | None
    json_object: bool | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    response_format: Mapping[str, Any] | None
    structured_outputs: Any
    begin_suppress_tokens: Sequence[int] | None
    bad_words_ids: Sequence[Sequence[int]] | None
    no_repeat_ngram_size: int | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[tuple[Sequence[int], float]] | None
    exponential_decay_length_penalty: tuple[float, float] | None
    forced_eos_token_id: int | Sequence[int] | None
    do_sample: bool | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    temp: float | None
    repeat_penalty: float | None
    stop_words: str | Sequence[str] | None
    stop_strings: str | Sequence[str] | None
    random_seed: int | None
    num_return_sequences: int | None
