"""What a user asks for when the next token is chosen."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypedDict

from torch import Tensor

from ..common.checks import check_ids
from ..common.keywords import reject_unknown

ALIASES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
    "stop_words": "stop",
    "stop_strings": "stop",
    "random_seed": "seed",
    "num_return_sequences": "n",
}


def _check_is(name: str, value: object, kind: type, wanted: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {wanted}; got {value!r}")


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as Python's integer; NumPy's and torch's are integers too."""
    wanted = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    try:
        number = None if _is_bool(value) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {wanted}; got {value!r}")
    return number


def _check_float(name: str, value: object, range_: str, inside: Callable[[float], bool]) -> float:
    """`value` as Python's number; NumPy's and torch's are numbers too."""
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    number = isinstance(plain, (int, float)) and not isinstance(plain, bool)
    if not number or not math.isfinite(plain) or not inside(plain):  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a number in {range_}; got {value!r}")
    return plain  # type: ignore[return-value]


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _as_tuple(name: str, values: object) -> tuple[Any, ...]:
    if values is None:
        return ()
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence; got {values!r}")
    return tuple(values.tolist() if hasattr(values, "tolist") else values)


def _token_ids(name: str, values: object) -> tuple[int, ...]:
    return tuple(check_int(f"{name}: a token id", token, 0) for token in _as_tuple(name, values))


def _sequence(name: str, values: object) -> tuple[int, ...]:
    if not (ids := _token_ids(name, values)):
        raise ValueError(f"{name} must hold sequences of one token id at least; it holds {values!r}")
    return ids


def _sequence_bias(given: object) -> dict[tuple[int, ...], float]:
    """By sequence; in a file, which has no such keys, it is a list of [sequence, bias]."""
    name = "sequence_bias"
    pairs = [*given.items()] if isinstance(given, Mapping) else _as_tuple(name, given)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{name} must be a mapping from sequences to biases, or a list of pairs; got {given!r}")
    for sequence, bias in pairs:
        if bias != -math.inf:  # which forbids
            _check_float(f"{name}[{sequence}]", bias, "[-inf, inf)", lambda _: True)
    return {_sequence(name, sequence): float(bias) for sequence, bias in pairs}


def _decay(given: object) -> tuple[float, float]:
    name = "exponential_decay_length_penalty"
    pair = _as_tuple(name, given)
    if len(pair) != 2:
        raise ValueError(f"{name} must be (start, factor); got {given!r}")
    start = _check_float(f"{name}: start", pair[0], "[0, inf)", lambda tokens: tokens >= 0)
    return start, _check_float(f"{name}: factor", pair[1], "(0, inf)", lambda factor: factor > 0)


class SamplingKeywords(TypedDict, total=False):
    """What SamplingParams.from_kwargs takes, for type checkers; None for a setting's default."""

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
    suppress_tokens: Sequence[int] | None
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


# Settings that are token ids.
_TOKENS = (
    "allowed_token_ids", "stop_token_ids", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"
)  # fmt: skip
_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("temperature", "[0, inf)", lambda t: t >= 0),
    ("top_p", "[0, 1]", lambda p: 0 <= p <= 1),
    ("min_p", "[0, 1]", lambda p: 0 <= p <= 1),
    ("typical_p", "(0, 1]", lambda p: 0 < p <= 1),
    ("repetition_penalty", "(0, inf)", lambda p: p > 0),
    ("presence_penalty", "[-2, 2]", lambda p: -2 <= p <= 2),
    ("frequency_penalty", "[-2, 2]", lambda p: -2 <= p <= 2),
)


@dataclass(frozen=True)
class SamplingParams:
    """What to generate for one prompt; names and meanings as in vLLM. Any bad value is a ValueError that names it.

    n: how many answers. temperature: 0 is greedy, and the filters below are then ignored. top_k: 0 or -1 is off.
    top_p, min_p, typical_p: 1, 0 and 1 are off; top_p 0 keeps the likeliest token.
    repetition_penalty: over prompt and answer, once per token, as in transformers. presence_penalty,
    frequency_penalty: over the answer, as in OpenAI's API. logit_bias: by token id.
    allowed_token_ids: only these may be chosen. seed: None or -1 draws one from torch's default generator.
    max_tokens: None is until the context's end. min_tokens: no end of sequence and no stop token before.
    stop, stop_token_ids: end the answer, besides the model's own ends. ignore_eos: the model's own ends do not count.
    include_stop_str_in_output: the stop string stays in the text. logprobs: how many alternatives to report per token.
    skip_special_tokens: they are left out of the text.

    As in transformers: suppress_tokens are never chosen. The settings that follow go by the text so far; with one of
    them the host takes part in every step, which on a GPU is slower. begin_suppress_tokens: not as the first one.
    bad_words_ids: sequences that never come, no_repeat_ngram_size: nor any of so many tokens a second time.
    sequence_bias: sequence -> what is added to the logit of the token that completes it.
    exponential_decay_length_penalty: (start, factor), makes an end likelier with every token beyond `start`.
    forced_eos_token_id: one or more, of which one is the last of max_tokens.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    no_repeat_ngram_size: int = 0
    sequence_bias: Mapping[tuple[int, ...], float] | None = None
    exponential_decay_length_penalty: tuple[float, float] | None = None
    forced_eos_token_id: Sequence[int] | None = None

    def __post_init__(self) -> None:
        keep = partial(object.__setattr__, self)  # frozen, yet stored in one form
        keep("n", check_int("n", self.n, 1))
        keep("top_k", check_int("top_k", self.top_k, -1))
        for name, range_, inside in _RANGES:
            keep(name, _check_float(name, getattr(self, name), range_, inside))
        if self.seed is not None:
            seed = check_int("seed", self.seed, -(2**63), 2**63 - 1)
            keep("seed", None if seed == -1 else seed)
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n must be 1 at temperature 0, where every answer would be the same; got {self.n}")
        if self.max_tokens is not None:
            keep("max_tokens", check_int("max_tokens", self.max_tokens, 1))
        keep("min_tokens", check_int("min_tokens", self.min_tokens, 0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens = {self.max_tokens}; got {self.min_tokens}")
        if self.logprobs is not None:
            keep("logprobs", check_int("logprobs", self.logprobs, 0))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if self.logit_bias is not None:
            _check_is("logit_bias", self.logit_bias, Mapping, "a mapping from token id to bias")
            bias = {
                check_int("logit_bias: a token id", token, 0): _check_float(
                    f"logit_bias[{token}]", value, "(-inf, inf)", lambda _: True
                )
                for token, value in self.logit_bias.items()
            }
            keep("logit_bias", bias)
        keep("stop", (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop))
        for text in self.stops:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must be a string or strings of one character at least; got {text!r}")
        if isinstance(self.forced_eos_token_id, int):
            keep("forced_eos_token_id", (self.forced_eos_token_id,))
        for name in _TOKENS:
            if (given := getattr(self, name)) is not None:
                keep(name, _token_ids(name, given))
        if self.bad_words_ids is not None:
            words = _as_tuple("bad_words_ids", self.bad_words_ids)
            keep("bad_words_ids", tuple(_sequence("bad_words_ids", word) for word in words))
        keep("no_repeat_ngram_size", check_int("no_repeat_ngram_size", self.no_repeat_ngram_size, 0))
        if self.sequence_bias is not None:
            keep("sequence_bias", _sequence_bias(self.sequence_bias))
        if self.exponential_decay_length_penalty is not None:
            keep("exponential_decay_length_penalty", _decay(self.exponential_decay_length_penalty))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must name one token at least, or be None for all; got none")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, none or more."""
        return tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @classmethod
    def from_kwargs(cls, base: "SamplingParams | None" = None, **kwargs: Any) -> "SamplingParams":
        """`base` (default: all defaults) with `kwargs` over it, which may use the names of other libraries (`ALIASES`).

        `do_sample=False` means temperature 0, whatever temperature says; `do_sample=True` over a greedy base means
        temperature 1. None for a setting that has no None of its own means its default. Raises TypeError for an unknown
        keyword, ValueError for a bad value or for a name and its alias that differ.
        """
        defaults = {field.name: field.default for field in fields(cls)}
        reject_unknown("sampling parameters", kwargs, [*defaults, *ALIASES, "do_sample"])
        do_sample = kwargs.pop("do_sample", None)
        given: dict[str, Any] = {}
        origin: dict[str, str] = {}
        for key, value in kwargs.items():
            name = ALIASES.get(key, key)
            if name in given and given[name] != value:
                raise ValueError(
                    f"{origin[name]}={given[name]!r} and {key}={value!r} name the same setting; give one of them"
                )
            given[name], origin[name] = value, key
        given = {name: defaults[name] if value is None else value for name, value in given.items()}
        base = base or cls()
        if do_sample is not None:
            _check_is("do_sample", do_sample, bool, "True, False or None")
            if not do_sample:
                given["temperature"] = 0.0
            elif given.get("temperature") == 0:
                raise ValueError("do_sample=True contradicts temperature=0, which is greedy; give one of them")
            elif base.greedy:
                given.setdefault("temperature", defaults["temperature"])
        return replace(base, **given)

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> "SamplingParams":
        """The settings of a checkpoint's generation_config.json; greedy unless it says `do_sample`, as in transformers.

        What the file does not name is off. (transformers would put top_k = 50 there, which no model asked for.) A
        max_length there is passed over.
        """
        names = {field.name for field in fields(cls)} | set(ALIASES)
        do_sample = config.get("do_sample")
        return cls.from_kwargs(
            do_sample=False if do_sample is None else do_sample, **{key: config[key] for key in config if key in names}
        )

    def check_vocab(self, vocab_size: int) -> None:
        """Raises ValueError for a token id of these parameters that the model does not have."""
        for name in ("logit_bias", *_TOKENS):
            check_ids(name, getattr(self, name) or (), vocab_size)
        for name in ("bad_words_ids", "sequence_bias"):
            for sequence in getattr(self, name) or ():
                check_ids(name, sequence, vocab_size)


# InternLM3's README: the settings it recommends for chat, and those for its deep-thinking mode.
RECOMMENDED = SamplingParams(temperature=1.0, top_p=0.8, top_k=40, repetition_penalty=1.005, max_tokens=1024)
RECOMMENDED_THINKING = replace(RECOMMENDED, max_tokens=8192)


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row of `logits` [B, V]: ids, int64, and log-probabilities, float32."""
    logprobs, token_ids = logits.float().log_softmax(-1).topk(min(count, logits.shape[-1]))
    return token_ids, logprobs
