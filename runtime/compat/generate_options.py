"""The options of `generate`: from keywords, a generation config and the checkpoint to one checked set of settings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.checks import as_int, as_list, check_ids, check_int
from ..common.keywords import reject_unknown
from ..common.neutral import GENERATE_CHANGING, GENERATE_IDLE, GENERATE_NOTES
from ..model.config import InternLM3Config
from ..sampling.generation_config import GenerationSettings, refuse_unsupported
from ..sampling.params import SamplingParams
from ..sampling.settings import FILTERS, GENERATE

# transformers' own defaults.
DEFAULT_MAX_NEW_TOKENS = 20
DEFAULT_TOP_K = 50  # with do_sample

_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
_FLAGS = ("return_dict_in_generate", "output_scores", "output_logits", "renormalize_logits")
_KNOWN = (*_LENGTHS, *GENERATE, "eos_token_id", "pad_token_id", *_FLAGS, "do_sample")
_ACCEPTED = (*_KNOWN, *GENERATE_CHANGING, *GENERATE_IDLE, *GENERATE_NOTES)
_SAMPLED_ONLY = ("temperature", *FILTERS, "seed")


@dataclass(frozen=True)
class GenerateOptions:
    """The checked settings of one call.

    Attributes:
        params: how each token is chosen; min_tokens and n included, max_tokens not.
        max_new_tokens: the largest number of new tokens.
        eos_token_ids: the tokens that end an answer.
        pad_token_id: fills the columns after an answer's end.
        padding_id: the token that marks padding in prompts without an attention mask; None if there is none, or if it
            ends answers too.
        return_dict, output_scores, output_logits, renormalize: transformers' flags of what to return.
    """

    params: SamplingParams
    max_new_tokens: int
    eos_token_ids: list[int]
    pad_token_id: int
    padding_id: int | None
    return_dict: bool
    output_scores: bool
    output_logits: bool
    renormalize: bool


def read_options(
    config: InternLM3Config, defaults: Mapping[str, Any], given: Any, keywords: Mapping[str, Any], columns: int
) -> GenerateOptions:
    """The options of one call of `generate`. A later source overrides an earlier one.

    As in transformers, a keyword that is None turns its setting off, whatever the other sources say: no end token, no
    top-k, no penalty, and the default length. In the other sources None is not given.

    Args:
        config: the model's, for its vocabulary and its default end and padding tokens.
        defaults: the model's generation_config.
        given: the call's generation_config: a dictionary, an object with to_dict, or None.
        keywords: the call's keywords.
        columns: length T of the prompts, which max_length and min_length count.

    Raises:
        TypeError: an unknown keyword, an unknown key in a dictionary, or a generation_config that is none.
        ValueError: a setting that is bad, unsupported, or contradicts another one.
    """
    reject_unknown("generate", keywords, _ACCEPTED)
    refuse_unsupported(keywords, keywords=True)
    merged: dict[str, Any] = {"eos_token_id": config.eos_token_ids, "pad_token_id": config.pad_token_id}
    for source in (defaults, settings_of(given)):
        merged |= {name: value for name, value in source.items() if not _is_none(name, value)}
    merged |= keywords
    refuse_unsupported(merged)
    options = {name: value for name, value in merged.items() if name in _KNOWN and not _is_none(name, value)}

    vocab_size = config.vocab_size
    eos, pads = (_token_ids(name, options.get(name), vocab_size) for name in ("eos_token_id", "pad_token_id"))
    most, least = _lengths(options, keywords, columns)
    params = SamplingParams.from_kwargs(_params(options, keywords), min_tokens=least)
    params.check_vocab(vocab_size)
    return GenerateOptions(
        params,
        max_new_tokens=most,
        eos_token_ids=eos,
        pad_token_id=(*pads, *eos, 0)[0],
        padding_id=pads[0] if pads and pads[0] not in eos else None,
        return_dict=bool(options.get("return_dict_in_generate")),
        output_scores=bool(options.get("output_scores")),
        output_logits=bool(options.get("output_logits")),
        renormalize=bool(options.get("renormalize_logits")),
    )


def _is_none(name: str, value: Any) -> bool:
    """Whether this is None, or a pad_token_id of -1, which is some checkpoints' form of it."""
    return value is None or (name == "pad_token_id" and as_int(value) == -1)


def settings_of(given: Any) -> GenerationSettings:
    """A caller's generation_config. Raises TypeError for one that is none, or a dictionary with a misspelt key.

    An object's attributes are not checked: a GenerationConfig has some of its own, and of other models.
    """
    if isinstance(given, Mapping) and not isinstance(given, GenerationSettings):
        reject_unknown("generation_config", [str(name) for name in given if not str(name).startswith("_")], _ACCEPTED)
    return GenerationSettings.of(given)


def _token_ids(name: str, value: Any, vocab_size: int) -> list[int]:
    """One id, several, or none, as a list. Raises ValueError for an id outside the vocabulary."""
    ids = as_list(value)
    check_ids(name, ids, vocab_size)
    return ids


def _lengths(options: Mapping[str, Any], keywords: Mapping[str, Any], columns: int) -> tuple[int, int]:
    """The largest and the smallest number of new tokens.

    Raises ValueError for a call that gives both and contradicts itself. A smallest number that only another source
    contradicts gives way to the largest, with a warning: a short call may not meet a checkpoint's min_length.
    """
    lengths = {
        name: check_int(name, options[name], int(name.startswith("max"))) for name in _LENGTHS if name in options
    }
    most = lengths.get("max_new_tokens", lengths.get("max_length", columns + DEFAULT_MAX_NEW_TOKENS) - columns)
    if most < 1:
        raise ValueError(
            f"the prompt has {columns} tokens and max_length is {lengths['max_length']}: "
            "nothing would be generated; give max_new_tokens"
        )
    least = lengths.get("min_new_tokens", max(0, lengths.get("min_length", 0) - columns))
    if least > most:
        given = {name[:3] for name in _LENGTHS if keywords.get(name) is not None}
        problem = f"min_new_tokens (or min_length) asks for {least} new tokens, and the maximum is {most}"
        if given == {"min", "max"}:
            raise ValueError(problem)
        warnings.warn(f"{problem}: none of them will be an end of text", stacklevel=4)  # the line that calls generate
        least = most
    return most, least


def _params(options: Mapping[str, Any], keywords: Mapping[str, Any]) -> SamplingParams:
    sampled = options.get("do_sample", False)
    idle = [name for name in _SAMPLED_ONLY if keywords.get(name) is not None]
    if idle and not sampled:
        warnings.warn(
            f"no effect, since decoding is greedy unless do_sample=True is given: {', '.join(idle)}",
            stacklevel=4,  # the line that calls generate
        )
    settings = {name: options[name] for name in GENERATE if name in options}
    answers = as_int(settings.get("num_return_sequences"))
    if answers is not None and answers > 1 and not sampled:
        raise ValueError(
            f"num_return_sequences is {answers}, and greedy decoding gives {answers} times the same answer: "
            "give do_sample=True"
        )
    if sampled and "top_k" not in keywords:
        settings.setdefault("top_k", DEFAULT_TOP_K)
    return SamplingParams.from_kwargs(do_sample=sampled, **settings)
