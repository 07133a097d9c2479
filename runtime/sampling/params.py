"""SamplingParams: what a user asks for when the next token is chosen."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from ..common.checks import as_int, check_bool, check_ids
from ..common.field_docs import document_fields
from ..common.neutral import without_neutral
from ..common.other_libraries import SAMPLING, SAMPLING_COUNTERPARTS
from ..common.shown import shown
from .response_format import FORMS, constraint_of
from .settings import ALIASES, CONSTRAINTS, SETTINGS
from .validation import check

Class = TypeVar("Class")

_SETTING = {setting.name: setting for setting in SETTINGS}


def _takes_other_names(cls: type[Class]) -> type[Class]:
    """Class decorator: the constructor of a dataclass of settings takes the keywords of `_translated`, too."""
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: Class, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **_translated(kwargs, greedy=False))

    cls.__init__ = __init__  # type: ignore[assignment, method-assign]
    return cls


@_takes_other_names
@document_fields
@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt: names and meanings as in vLLM, and where vLLM has none, as in transformers.

    The stages of sampling, in order: logit_bias, the penalties, allowed_token_ids and suppress_tokens, temperature,
    top_k, top_p, min_p, typical_p. Values are checked on construction: a bad one raises ValueError with the setting's
    name. Integers and floats of NumPy and torch are accepted and stored as Python's own.

    A setting may be given under the names of other libraries (`ALIASES`): max_new_tokens=5 is max_tokens=5.
    do_sample=False means temperature 0, and overrides `temperature`. OpenAI's `response_format` and vLLM's
    `structured_outputs` become the setting that they name: json_schema, json_object, regex, choice or grammar. None for
    a setting that cannot be None means its default. What vLLM and llama.cpp have and this runtime has not is accepted
    at its neutral value, such as best_of=1. An unknown keyword raises TypeError; the message names the nearest one.

        >>> SamplingParams(temperature=0.7, top_p=0.9, max_tokens=256, stop="\\n\\n")
    """

    n: int = 1
    """How many answers to one prompt, from 1 to 65536. More than 1 needs a temperature above 0."""

    temperature: float = 1.0
    """Divides the logits, at least 0. Below 1 likely tokens become likelier. 0 is greedy: the likeliest token is taken,
    and top_k, top_p, min_p, typical_p and seed have no effect."""

    top_k: int = 0
    """Draws from this many likeliest tokens; tokens that tie with the last of them stay. 0 and -1 are off."""

    top_p: float = 1.0
    """Draws from the smallest set of likeliest tokens whose probabilities add up to this, in [0, 1], after top_k. 1 is
    off; 0 keeps the likeliest token."""

    min_p: float = 0.0
    """Draws from tokens with at least this share of the likeliest token's probability, in [0, 1]. 0 is off."""

    typical_p: float = 1.0
    """Locally typical sampling: draws from the tokens whose information is closest to the entropy, up to this
    probability, in (0, 1]. 1 is off."""

    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that occur in the prompt or the answer, and multiplies their negative ones,
    once per token, as in transformers. Above 0; 1 is off."""

    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that occurs in the answer, as in OpenAI's API, in [-2, 2]. 0 is off."""

    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it occurs in the answer, as in OpenAI's API, in [-2, 2]. 0 is
    off."""

    logit_bias: Mapping[int, float] | None = None
    """Token id -> a number that is added to its logit, before the penalties. None adds nothing."""

    allowed_token_ids: Sequence[int] | None = None
    """The only tokens that may be chosen, at least one. None allows all."""

    seed: int | None = None
    """Seed of the random numbers, 64 bits. They do not depend on the batch, and each of n answers has its own stream.
    None and -1 draw a seed from torch's default generator."""

    max_tokens: int | None = None
    """The longest answer, in tokens, at least 1. None goes on until the context is full."""

    min_tokens: int = 0
    """Neither an end-of-text token nor one of stop_token_ids is chosen before the answer has this many tokens."""

    stop: str | Sequence[str] | None = None
    """A string, or several, that end the answer where they first occur in its text; stored as a tuple."""

    stop_token_ids: Sequence[int] | None = None
    """Tokens that end the answer, besides the model's own end-of-text tokens."""

    ignore_eos: bool = False
    """The model's own end-of-text tokens do not end the answer; stop and stop_token_ids still do."""

    include_stop_str_in_output: bool = False
    """The stop string that ended the answer stays in its text."""

    logprobs: int | None = None
    """Reports the log-probabilities of this many likeliest tokens at every step, under the model's own softmax. On a
    GPU decoding is slower, as the host reads every step's logits. None and 0 report none."""

    skip_special_tokens: bool = True
    """Special tokens are left out of the text."""

    speculation: bool = True
    """Where the text repeats an earlier part of itself, a step may generate several tokens; they are the same tokens.
    True leaves that to the LLM's `speculation`, False generates one token a step."""

    priority: int = 0
    """Of the requests that wait for a place in the batch the one with the lowest number comes first, and among equals
    the one that came first. What is under way is not interrupted."""

    suppress_tokens: Sequence[int] | None = None
    """Tokens that are never chosen."""

    json_schema: str | Mapping[str, Any] | type | None = None
    """The answer is JSON that this schema describes: a dict, its JSON text, or a Pydantic model; stored as text. At
    most one of this, json_object, regex, choice and grammar may be given. The model's end of text then ends the answer
    where it is complete, and nowhere else. Needs the extra `json`: pip install 'internlm3[json]'."""

    json_object: bool = False
    """The answer is any JSON object."""

    regex: str | None = None
    """The answer matches this regular expression from its first to its last character. The syntax is that of Rust's
    regex crate, which has no look-around and no back-references."""

    choice: Sequence[str] | None = None
    """The answer is one of these strings."""

    grammar: str | None = None
    """The answer is in the language of this context-free grammar, in llguidance's variant of Lark's syntax."""

    begin_suppress_tokens: Sequence[int] | None = None
    """Tokens that are not chosen as the answer's first one. This setting and all below depend on the text so far: the
    host takes part in every step, which on a GPU is slower."""

    bad_words_ids: Sequence[Sequence[int]] | None = None
    """Sequences of token ids that never occur in the answer."""

    no_repeat_ngram_size: int = 0
    """No sequence of this many tokens occurs twice in prompt and answer. 0 is off."""

    sequence_bias: Mapping[tuple[int, ...], float] | None = None
    """Sequence of token ids -> a number that is added to the logit of the token that would complete it; -inf forbids
    it. A list of [sequence, bias] is accepted too, as a JSON file has it."""

    exponential_decay_length_penalty: tuple[float, float] | None = None
    """(start, factor): from `start` new tokens on, the end-of-text logits grow by |logit| * (factor ** tokens - 1),
    with the tokens counted from `start`."""

    forced_eos_token_id: Sequence[int] | None = None
    """If the answer reaches max_tokens, its last token is this one, or one of several, which suppress_tokens and
    allowed_token_ids permit."""

    def __post_init__(self) -> None:
        for setting in SETTINGS:
            self._store(setting.name, check(setting, getattr(self, setting.name)))
        if self.seed == -1:
            self._store("seed", None)
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n must be 1 at temperature 0, where every answer would be the same; got {self.n}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens = {self.max_tokens}; got {self.min_tokens}")
        if self.forced_eos_token_id and not self.forced_ends:
            given = [name for name in ("suppress_tokens", "allowed_token_ids") if getattr(self, name)]
            forced = list(self.forced_eos_token_id)
            raise ValueError(f"{' and '.join(given)} permit no token of forced_eos_token_id={forced}: permit one")
        self._check_constraint()

    def _check_constraint(self) -> None:
        given = [name for name in CONSTRAINTS if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say what the answer may be; give one of them")
        # Both would end the answer where it is not complete, or not end it where it is.
        for name in ("ignore_eos", "forced_eos_token_id"):
            if given and getattr(self, name):
                raise ValueError(f"{name} contradicts {given[0]}, by which the answer ends where it is complete")

    def _store(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen; only __post_init__ calls this

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, none or more."""
        return tuple(self.stop or ())

    @property
    def forced_ends(self) -> tuple[int, ...]:
        """The tokens of forced_eos_token_id that may be chosen."""
        allowed, dropped = self.allowed_token_ids, self.suppress_tokens or ()
        forced = self.forced_eos_token_id or ()
        return tuple(token for token in forced if (allowed is None or token in allowed) and token not in dropped)

    @property
    def constraint(self) -> str | None:
        """The name of the setting that says which texts the answer may be."""
        return next((name for name in CONSTRAINTS if getattr(self, name)), None)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken at every step."""
        return self.temperature == 0

    @classmethod
    def from_kwargs(cls, base: "SamplingParams | None" = None, **kwargs: Any) -> "SamplingParams":
        """`base` (default: all defaults) with `kwargs` on top, which are keywords of the constructor.

        do_sample=True on top of a greedy base means temperature 1. A constraint replaces the base's. A
        max_tokens below the base's min_tokens wins, with a warning.

        Raises:
            TypeError: an unknown keyword.
            ValueError: a bad value; a name and its alias that differ; do_sample=True with temperature=0.
        """
        if base is None:
            return cls(**kwargs)
        given = _translated(kwargs, greedy=base.greedy)
        most = as_int(given.get("max_tokens"))
        if "min_tokens" not in given and most is not None and 1 <= most < base.min_tokens:
            warnings.warn(f"min_tokens={base.min_tokens} gives way to max_tokens={most}", stacklevel=3)
            given["min_tokens"] = most
        if any(given.get(name) for name in CONSTRAINTS) or any(kwargs.get(form) is not None for form in FORMS):
            given = {**dict.fromkeys(CONSTRAINTS), "json_object": False, **given}
        return replace(base, **given)

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> "SamplingParams":
        """The settings of a checkpoint's generation_config.json, greedy unless do_sample is true, as in transformers.

        A setting that the file does not name is off. (transformers would set top_k = 50, which no model asked for.)
        max_length is ignored: it would count the prompt.
        """
        names = {field.name for field in fields(cls)} | set(ALIASES)
        do_sample = config.get("do_sample")
        return cls.from_kwargs(
            do_sample=False if do_sample is None else do_sample, **{key: config[key] for key in config if key in names}
        )

    def check_vocab(self, vocab_size: int) -> None:
        """Raises ValueError for a token id in these settings that is not in [0, vocab_size)."""
        for setting in SETTINGS:
            value = getattr(self, setting.name) or ()
            if setting.type in ("token ids", "token biases"):
                check_ids(setting.name, value, vocab_size)
            elif setting.type in ("sequences", "sequence biases"):
                for sequence in value:
                    check_ids(setting.name, sequence, vocab_size)


def _translated(kwargs: Mapping[str, Any], *, greedy: bool) -> dict[str, Any]:
    """Keywords that SamplingParams takes as its fields; `greedy`: whether these settings change greedy ones.

    Raises TypeError and ValueError as `SamplingParams.from_kwargs`.
    """
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    kwargs = dict(kwargs)
    constraints = [constraint_of(form, value) for form in FORMS if (value := kwargs.pop(form, None)) is not None]
    known = [*defaults, *ALIASES, *FORMS, "do_sample"]
    kwargs = without_neutral("sampling parameters", kwargs, SAMPLING, known=known, counterparts=SAMPLING_COUNTERPARTS)
    do_sample = kwargs.pop("do_sample", None)
    given: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in kwargs.items():
        name = ALIASES.get(key, key)
        if value is None and name in given:
            continue
        if name != key and value is not None:
            check(replace(_SETTING[name], name=key), value)  # an error names the word that was given
        if given.get(name) is not None and given[name] != value:
            raise ValueError(
                f"{origin[name]}={shown(given[name])} and {key}={shown(value)} name the same setting; give one of them"
            )
        given[name], origin[name] = value, key
    given = {name: defaults[name] if value is None else value for name, value in given.items()}
    for constraint in constraints:
        if already := [name for name in CONSTRAINTS if given.get(name)]:
            raise ValueError(f"{already[0]} is given twice, or next to a form of another library; give one of them")
        given |= constraint
    if do_sample is not None:
        check_bool("do_sample", do_sample, "True, False or None")
        if not do_sample:
            given["temperature"] = 0.0
        elif given.get("temperature") == 0:
            raise ValueError("do_sample=True contradicts temperature=0, which is greedy; give one of them")
        elif greedy:
            given.setdefault("temperature", defaults["temperature"])
    return given


# What InternLM3's README recommends for chat, and for deep-thinking mode.
RECOMMENDED = SamplingParams(temperature=1.0, top_p=0.8, top_k=40, repetition_penalty=1.005, max_tokens=1024)
RECOMMENDED_THINKING = replace(RECOMMENDED, max_tokens=8192)
