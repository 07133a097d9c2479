"""The constraint of a request: a grammar, compiled by llguidance for one tokenizer, and how far an answer is in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence, Set
from functools import lru_cache, partial
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from ..common.large_stack import on_large_stack
from ..common.shown import one_line
from ..sampling.params import SamplingParams
from ..sampling.token_masks import holding, packed, permitted
from ..tokenization.tokenizer import InternLM3Tokenizer
from .token_table import TokenTable

# Between two parts of JSON: a line break and an indentation, or some spaces. Without a limit a weak model may write
# spaces until its answer is full.
_SPACE = r"\n?[ \t]{0,32}"
# The values of `format` that llguidance knows. By JSON Schema any other one is a note to the reader.
_FORMATS = frozenset(["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])
# Keywords of a schema whose values are schemas by name, and those whose values are no schemas.
_BY_NAME = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
_DATA = frozenset({"const", "enum", "default", "example", "examples"})
_OBJECT = '{"type": "object"}'
# llguidance's error where no token may follow, and the answer may not end.
_DEAD_END = "NoExtensionBias"
# What a grammar may cost. Where one repeats a repetition, as (a{1000}){1000}, llguidance's own limits let it compute
# for seconds, also in a step, which other requests wait for. With these the worst that was found takes 0.3 s before the
# first token, or 0.1 s in one step, and its answer ends with an error.
_LIMITS = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=100_000)
# The compiler descends along references and rules, and the regex engine along those of terminals. Both have room for
# what fits into grammars of this size, the first one on a stack of its own.
_LONGEST = 1 << 17  # characters
_MOST_RULES = 2000
_STACK = 256 << 20  # bytes; 64 MB were enough for the deepest that was found
# llguidance's errors where a limit is reached.
_TOO_COMPLEX = ("too many expressions", "Too many items", "too big", "too large", "items; max is")
# Compiled grammars that are kept: many requests come with the same one.
_KEPT = 64


class Grammars:
    """Makes the constraints of requests, for one tokenizer and a vocabulary of V tokens.

    Making the first one for a tokenizer takes about a second, since every token is put into a tree.
    """

    def __init__(self, tokenizer: InternLM3Tokenizer, vocab_size: int):
        self._vocab_size = vocab_size
        self._tokenizer_ids = tokenizer.added_tokens_encoder
        self._tokenizer = LLTokenizer(TokenizerWrapper(TokenTable(tokenizer, vocab_size)))
        self._compiled = lru_cache(_KEPT)(self._compile)

    def constraint(
        self, params: SamplingParams, ends: Set[int], calls: tuple[str, str, str] | None = None
    ) -> TokenConstraint:
        """The constraint of one answer.

        Args:
            params: settings with a constraint.
            ends: the tokens that end the answer.
            calls: (mark, schema, mark): what the answer may be in place of JSON, objects by a JSON schema, each between
                two marks, the last of which may be missing. Without effect on other constraints.

        Raises ValueError, naming the setting, for a grammar that can't be compiled, or that permits no answer.
        """
        name = params.constraint
        assert name is not None
        matcher, bits = self._compiled(name, getattr(params, name), calls if name in _JSON else None)
        return TokenConstraint(matcher.deep_copy(), bits.copy(), params, ends, self._vocab_size)

    def _compile(
        self, name: str, value: str | bool | tuple[str, ...], calls: tuple[str, str, str] | None
    ) -> tuple[LLMatcher, NDArray[np.int32]]:
        try:
            grammar = _GRAMMARS[name](value) if calls is None else self._or_calls(_JSON[name](value), *calls)
        except (ValueError, RecursionError) as raised:
            raise ValueError(f"{name} can't be compiled: {_shortened(str(raised))}") from None
        if len(grammar) > _LONGEST:
            raise ValueError(f"{name} is too long: {len(grammar)} characters, and at most {_LONGEST} may be")
        if name == "grammar" and grammar.count(":") > _MOST_RULES:
            raise ValueError(f"grammar has more than {_MOST_RULES} rules (they are counted by their colons)")
        return on_large_stack(partial(self._matcher, name, grammar), _STACK)

    def _or_calls(self, schema: str, begin: str, call: str, end: str) -> str:
        begin, end = self._mark(begin), self._mark(end)
        return (
            f"start: json | {begin} call ({end} SPACE {begin} call)* ({end})?\n"
            f"json: {_json_rule(schema)}\ncall: SPACE object SPACE\nobject: {_json_rule(call)}\nSPACE: /{_SPACE}/\n"
        )

    def _mark(self, text: str) -> str:
        """A text in a grammar, in which special tokens of the model are these tokens."""
        ids = self._tokenizer_ids
        parts = [part for part in re.split(r"(<[^<>\s]+>)", text) if part]
        return " ".join(
            part if ids.get(part, self._vocab_size) < self._vocab_size else json.dumps(part) for part in parts
        )

    def _matcher(self, name: str, grammar: str) -> tuple[LLMatcher, NDArray[np.int32]]:
        """The matcher, and its first mask: a bit for each token, and one for the end after them."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if error := matcher.get_error():
            raise ValueError(f"{name} can't be compiled: {_shortened(error)}")
        bits = allocate_token_bitmask(1, self._vocab_size + 1)
        fill_next_token_bitmask(matcher, bits)
        return matcher, bits


def _shortened(error: str) -> str:
    """llguidance's message, without the states of its parser and its stack."""
    short = one_line(re.split("<state>|<backtrace>", error)[0].strip())
    complex_ = any(part in error for part in _TOO_COMPLEX)
    return f"it is too complex, repeat less in it ({short})" if complex_ else short


def _effective(schema: str) -> Any:
    """A schema without what says nothing about an answer, and llguidance would refuse.

    That is a format it does not know, as Pydantic writes for a SecretStr or a Path, and that names are strings, as Zod
    writes for a record.
    """
    whole = json.loads(schema)
    unread = [whole]
    while unread:
        each = unread.pop()
        if isinstance(each, list):
            unread += each
        elif isinstance(each, dict):
            if isinstance(each.get("format"), str) and each["format"] not in _FORMATS:
                del each["format"]
            if each.get("propertyNames") in ({}, {"type": "string"}):
                del each["propertyNames"]
            for key, value in each.items():
                if key in _BY_NAME and isinstance(value, dict):
                    unread += value.values()
                elif key not in _DATA:
                    unread.append(value)
    return whole


def _of_schema(schema: str) -> str:
    text = json.dumps(_effective(schema), ensure_ascii=False)
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _SPACE})


def _of_choice(texts: Sequence[str]) -> str:
    return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, texts)))


def _json_rule(schema: str) -> str:
    """JSON by a schema, in a Lark grammar, with the white space of `_of_schema`."""
    options = {"x-guidance": {"whitespace_pattern": _SPACE}}
    return f"%json {json.dumps({**_effective(schema), **options})}"


# Constraints to JSON, each of them as a schema.
_JSON: dict[str, Callable[[Any], str]] = {"json_schema": lambda schema: schema, "json_object": lambda _: _OBJECT}
_GRAMMARS: dict[str, Callable[[Any], str]] = {
    "json_schema": _of_schema,
    "json_object": lambda _: _of_schema(_OBJECT),
    "regex": LLMatcher.grammar_from_regex,
    "choice": _of_choice,
    "grammar": LLMatcher.grammar_from_lark,
}


class TokenConstraint:
    """Which tokens may follow in one answer.

    The answer may end where the grammar is satisfied, and with any of its end tokens. Where it is not, it can't end.
    Settings that allow or suppress tokens apply as well.

    Args:
        bits: the matcher's first mask.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        bits: NDArray[np.int32],
        params: SamplingParams,
        ends: Set[int],
        vocab_size: int,
    ):
        self._matcher, self._params = matcher, params
        self._accepted = 0
        self._bits = bits
        words = -(-vocab_size // 32)
        self._end = divmod(vocab_size, 32)
        self._ends = packed(holding(ends, 32 * words))
        self._permitted = packed(permitted(params, 32 * words))
        self._words = self._read_words()

    def allowed(self, token_ids: Sequence[int]) -> NDArray[np.uint32]:
        """The tokens that may follow the first tokens of the answer: words [ceil(V / 32)], a bit for each.

        Args:
            token_ids: the answer so far, which extends that of the call before.

        Raises ValueError if no token may follow, or the grammar does not have these ones.
        """
        new = list(token_ids[self._accepted :])
        if new:
            self._accepted = len(token_ids)
            self._matcher.consume_tokens(new)
            fill_next_token_bitmask(self._matcher, self._bits)
            self._words = self._read_words()
        return self._words

    def _read_words(self) -> NDArray[np.uint32]:
        # An error is no exception there: the mask has the end only, from then on.
        error = _shortened(self._matcher.get_error())
        if error and error != _DEAD_END:
            raise self._error(f" failed: {error}")
        bits = self._bits[0].view(np.uint32)
        word, bit = self._end
        may_end = bits[word] >> bit & 1 and self._accepted >= self._params.min_tokens
        words = bits[: len(self._ends)] & ~self._ends
        if word < len(words):
            words[word] &= (1 << bit) - 1
        if may_end:
            words |= self._ends
        words &= self._permitted
        if error or not words.any():
            names = ("allowed_token_ids", "suppress_tokens", "min_tokens")
            also = "".join(f" and {name}" for name in names if getattr(self._params, name))
            raise self._error(f"{also} permit no token there: change them" if also else " permits no token there")
        return words

    def _error(self, what: str) -> ValueError:
        return ValueError(f"after {self._accepted} tokens of the answer {self._params.constraint}{what}")
