"""The table of sampling settings: what each may be, and under which names and where it is used.

A setting is a row here, a field of `SamplingParams` (its type, default and documentation) and a key of
`SamplingKeywords` (for type checkers). `SamplingParams` checks it by `type` and `range`; the state of a decode step has
a tensor of it where `state` gives a dtype; `generate` takes it under the name `generate`; the command line has a switch
for it if `help` describes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Type = Literal[
    "integer",
    "number",
    "bool",
    "strings",  # one, or a sequence of them
    "token ids",
    "token biases",  # token id -> number
    "sequences",  # of token ids
    "sequence biases",  # sequence of token ids -> number, or -inf
    "start and factor",  # two numbers
    "text",
    "texts",
    "JSON schema",
]


@dataclass(frozen=True)
class Setting:
    """One sampling setting.

    Attributes:
        name: the field of SamplingParams.
        type: what its value is; runtime/sampling/validation.py has the check of each.
        range: of an integer or a number, as an interval: "(0, 1]" excludes 0 and includes 1.
        none: whether it may be None, which is then its default.
        aliases: names that other libraries give it.
        filter: whether it restricts which tokens are drawn from, and so has no effect on greedy decoding.
        state: dtype of its [B] tensor in the state of a decode step; None if the step does not read it as one scalar.
        generate: its name in transformers' `generate`; None if that has no such option.
        help: of its switch on the command line; None if there is no switch.
    """

    name: str
    type: Type
    range: str = ""
    none: bool = False
    aliases: tuple[str, ...] = ()
    filter: bool = False
    state: Literal["float32", "int64"] | None = None
    generate: str | None = None
    help: str | None = None


SETTINGS = (
    Setting("n", "integer", "[1, 65536]", aliases=("num_return_sequences",), generate="num_return_sequences"),
    Setting(
        "temperature", "number", "[0, inf)",
        aliases=("temp",), state="float32", generate="temperature",
        help="divides the logits; 0 is greedy",
    ),
    Setting(
        "top_k", "integer", "[-1, inf)",
        filter=True, state="int64", generate="top_k",
        help="draw from this many likeliest tokens",
    ),
    Setting(
        "top_p", "number", "[0, 1]",
        filter=True, state="float32", generate="top_p",
        help="draw from the likeliest tokens that together have this probability",
    ),
    Setting(
        "min_p", "number", "[0, 1]",
        filter=True, state="float32", generate="min_p",
        help="draw from tokens with at least this share of the likeliest token's probability",
    ),
    Setting(
        "typical_p", "number", "(0, 1]",
        filter=True, state="float32", generate="typical_p",
        help="draw from the most typical tokens that together have this probability",
    ),
    Setting(
        "repetition_penalty", "number", "(0, inf)",
        aliases=("repeat_penalty",), state="float32", generate="repetition_penalty",
        help="on tokens of the prompt and the answer; 1 is off",
    ),
    Setting(
        "presence_penalty", "number", "[-2, 2]",
        state="float32", generate="presence_penalty",
        help="on tokens of the answer, -2 to 2",
    ),
    Setting(
        "frequency_penalty", "number", "[-2, 2]",
        state="float32", generate="frequency_penalty",
        help="on tokens of the answer, for each occurrence, -2 to 2",
    ),
    Setting(
        "logit_bias", "token biases", none=True, generate="logit_bias",
        help="add BIAS to the logit of token ID; may be given again",
    ),
    Setting("allowed_token_ids", "token ids", none=True, help="only these tokens"),
    Setting(
        "seed", "integer", f"[{-(2**63)}, {2**63 - 1}]", none=True, aliases=("random_seed",), generate="seed",
        help="the same seed gives the same text; -1 draws one",
    ),
    Setting(
        "max_tokens", "integer", "[1, inf)", none=True, aliases=("max_new_tokens",),
        help="the longest answer, in tokens",
    ),
    Setting(
        "min_tokens", "integer", "[0, inf)", aliases=("min_new_tokens",),
        help="the shortest answer, in tokens",
    ),
    Setting(
        "stop", "strings", none=True, aliases=("stop_words", "stop_strings"), generate="stop_strings",
        help="end the answer at this text; may be given again",
    ),
    Setting("stop_token_ids", "token ids", none=True, help="end the answer at these tokens"),
    Setting("ignore_eos", "bool", help="go on after the model's own end of text"),
    Setting("include_stop_str_in_output", "bool", help="print the stop string that ended the answer"),
    Setting("logprobs", "integer", "[0, inf)", none=True),
    Setting("skip_special_tokens", "bool", help="print special tokens too"),
    Setting("speculation", "bool", help="do not draft tokens from what the text repeats"),
    Setting("priority", "integer", f"[{-(2**31)}, {2**31 - 1}]"),
    Setting("suppress_tokens", "token ids", none=True, generate="suppress_tokens", help="never these tokens"),
    Setting("json_schema", "JSON schema", none=True, help="the answer is JSON that this schema describes"),
    Setting("json_object", "bool", help="the answer is a JSON object"),
    Setting("regex", "text", none=True, help="the answer matches this regular expression"),
    Setting("choice", "texts", none=True, help="the answer is this text; may be given again"),
    Setting("grammar", "text", none=True, help="the answer is in the language of this Lark grammar"),
    Setting(
        "begin_suppress_tokens", "token ids", none=True, generate="begin_suppress_tokens",
        help="never these as the first token",
    ),
    Setting(
        "bad_words_ids", "sequences", none=True, generate="bad_words_ids",
        help="never these tokens in this order; may be given again",
    ),
    Setting(
        "no_repeat_ngram_size", "integer", "[0, inf)", generate="no_repeat_ngram_size",
        help="never the same sequence of this many tokens twice; 0 is off",
    ),
    Setting(
        "sequence_bias", "sequence biases", none=True, generate="sequence_bias",
        help="add BIAS to the logit of a token that completes this sequence; may be given again",
    ),
    Setting(
        "exponential_decay_length_penalty", "start and factor", none=True,
        generate="exponential_decay_length_penalty",
        help="make the end likelier with every token after START",
    ),
    Setting(
        "forced_eos_token_id", "token ids", none=True, generate="forced_eos_token_id",
        help="if the answer reaches --max-tokens, its last token is one of these",
    ),
)  # fmt: skip

# Those that say which texts an answer may be: one of them at most.
CONSTRAINTS = ("json_schema", "json_object", "regex", "choice", "grammar")
ALIASES = {alias: setting.name for setting in SETTINGS for alias in setting.aliases}
FILTERS = tuple(setting.name for setting in SETTINGS if setting.filter)
STATE = {setting.name: setting.state for setting in SETTINGS if setting.state}
GENERATE = tuple(setting.generate for setting in SETTINGS if setting.generate)
