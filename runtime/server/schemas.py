"""The bodies of requests. Types are strict: 1 is no string, "1" no number, true no integer.

The settings of sampling come from the runtime's own table, and SamplingParams checks their ranges. A field that is in
no table here is an error, which names the nearest one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from ..common.keywords import nearest
from ..common.neutral import Neutral, without_neutral
from ..common.other_libraries import SAMPLING, SAMPLING_COUNTERPARTS
from ..sampling.response_format import FORMS
from ..sampling.settings import SETTINGS, Type
from .errors import ApiError

# Fields of OpenAI's API that do not concern the answer.
IGNORED = (
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
    "parallel_tool_calls",
)  # fmt: skip
# Fields of OpenAI's API that this server has not, with the values at which they mean nothing. Those that its API shares
# with other libraries, such as best_of, are in the table of these.
UNSUPPORTED: Neutral = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
_COUNTERPARTS = {
    **SAMPLING_COUNTERPARTS,
    "functions": "tools",
    "function_call": "tool_choice",
    "reasoning_effort": "thinking",
    "continue_final_message": "prompt of /v1/completions",
    "bad_words": "bad_words_ids",
    "guided_decoding": "structured_outputs",
    "use_beam_search": "n",
    "eos_token_id": "stop_token_ids",
}
_TYPES: dict[Type, Any] = {
    "integer": int,
    "number": float,
    "bool": bool,
    "strings": str | list[str],
    "token ids": list[int],
    "token biases": dict[str, float],
    "sequences": list[list[int]],
    "sequence biases": list[list[Any]],
    "start and factor": list[float],
    "text": str,
    "texts": list[str],
    "JSON schema": dict[str, Any] | str,
}
# vLLM's older names.
_GUIDED = {f"guided_{name}": name for name in ("regex", "choice", "grammar")} | {"guided_json": "json_schema"}
_SETTINGS = {setting.name: _TYPES[setting.type] for setting in SETTINGS if setting.name not in ("n", "logprobs")}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted: there is none


class TemplateKwargs(_Strict):
    """Either name means the field `thinking`."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class Body(_Strict):
    """A body whose fields are the model's own, and beside them those that are ignored or at a neutral value."""

    ignored: ClassVar[Collection[str]] = IGNORED
    unsupported: ClassVar[Neutral] = UNSUPPORTED
    counterparts: ClassVar[Mapping[str, str]] = _COUNTERPARTS

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, given: Any) -> Any:
        """Leaves out what is ignored or neutral. Raises ApiError for any other field that is not the model's own."""
        if not isinstance(given, Mapping):
            return given
        own = {name: value for name, value in given.items() if name in cls.model_fields}
        neutral = {**SAMPLING, **cls.unsupported}
        for name in given.keys() - own.keys() - {*cls.ignored}:
            try:
                without_neutral("the request", {name: given[name]}, neutral, known=own, counterparts=cls.counterparts)
            except ValueError as error:
                raise ApiError(400, str(error), param=name, code="unsupported_value") from None
            except TypeError:
                raise ApiError(400, cls._unknown(name), param=name, code="unknown_field") from None
        return own

    @classmethod
    def _unknown(cls, name: str) -> str:
        known = cls.model_fields
        match = cls.counterparts.get(name) or nearest(name, known)
        return f"unknown field {name!r}" + (
            f"; did you mean {match!r}?" if match else f"; known are {', '.join(known)}"
        )


_fields: dict[str, Any] = {name: (kind | None, None) for name, kind in _SETTINGS.items()}
_Sampling: Any = create_model("_Sampling", __base__=Body, **_fields)


class Sampling(_Sampling):
    """The settings of sampling, all but `n` and `logprobs`."""

    def settings(self) -> dict[str, Any]:
        """The keywords of SamplingParams that were given."""
        given = {name: getattr(self, name) for name in _SETTINGS}
        given = {name: value for name, value in given.items() if value is not None}
        if (biases := given.get("logit_bias")) is not None:
            if wrong := next((token for token in biases if not token.isascii() or not token.isdigit()), None):
                raise ApiError(400, f"logit_bias: {wrong[:40]!r} is no token id", param="logit_bias")
            given["logit_bias"] = {int(token): bias for token, bias in biases.items()}
        return given


def with_length(given: dict[str, Any], name: str, most: int | None) -> dict[str, Any]:
    """Settings with max_tokens from a field of another name, if that was given."""
    if most is None:
        return given
    if given.get("max_tokens", most) != most:
        raise ApiError(400, f"max_tokens and {name} are the same and differ; give one of them", param="max_tokens")
    return given | {"max_tokens": most}


class Generation(Sampling):
    """What requests for an answer and for a completion have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def settings(self) -> dict[str, Any]:
        given = super().settings()
        given |= {name: value for name in (*FORMS, "n") if (value := getattr(self, name)) is not None}
        for guided, name in _GUIDED.items():
            if (value := getattr(self, guided)) is not None:
                if name in given:
                    raise ApiError(400, f"{guided} and {name} are the same; give one of them", param=guided)
                given[name] = value
        return given


class ChatPrompt(Body):
    """What decides, beside its messages, what the prompt of a chat is."""

    thinking: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None

    @property
    def thinks(self) -> bool:
        extra = self.chat_template_kwargs or TemplateKwargs()
        said = [value for value in (self.thinking, extra.thinking, extra.enable_thinking) if value is not None]
        if len({*said}) > 1:
            raise ApiError(400, "thinking is true and false at once; give it once", param="thinking")
        return bool(said and said[0])

    def prompt_options(self) -> dict[str, Any]:
        """The keywords of LLM.chat for them."""
        return {"thinking": self.thinks, "tools": self.tools, "tool_choice": self.tool_choice or "auto"}


class ChatRequest(ChatPrompt, Generation):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def settings(self) -> dict[str, Any]:
        given = with_length(super().settings(), "max_completion_tokens", self.max_completion_tokens)
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return given | ({"logprobs": self.top_logprobs} if self.top_logprobs else {})


class CompletionRequest(Generation):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def settings(self) -> dict[str, Any]:
        given = {"max_tokens": 16, **super().settings()}
        if given["max_tokens"] == 0 and (self.stream or not self.scores_prompts):
            what = "max_tokens: 0 scores a prompt: it needs echo: true and logprobs, and is no stream"
            raise ApiError(400, what, param="max_tokens")
        return given | ({"logprobs": self.logprobs} if self.logprobs else {})

    @property
    def scores_prompts(self) -> bool:
        """Whether the log-probabilities of the prompts' tokens are asked for."""
        return bool(self.echo) and self.logprobs is not None


class TokenizeRequest(ChatPrompt):
    """Either a prompt or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]
