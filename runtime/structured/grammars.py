"""The constraint of a request: a grammar, compiled by llguidance for one tokenizer, and how far an answer is in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence, Set
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from ..common.shown import one_line
from ..sampling.params import SamplingParams
from ..sampling.token_masks import holding, packed, permitted
from ..tokenization.tokenizer import InternLM3Tokenizer
from .token_table import TokenTable

# Between two parts of JSON: a line break and an indentation, or some spaces. Without a limit a weak model may write
# spaces until its answer is full.
_SPACE = r"\n?[ \t]{0,32}"
# llguidance's error where no token may follow, and the answer may not end.
_DEAD_END = "NoExtensionBias"
# Compiled grammars that are kept: many requests come with the same one.
_KEPT = 64


class Grammars:
    """Makes the constraints of requests, for one tokenizer and a vocabulary of V tokens.

    Making the first one for a tokenizer takes about a second, since every token is put into a tree.
    """

    def __init__(self, tokenizer: InternLM3Tokenizer, vocab_size: int):
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(TokenizerWrapper(TokenTable(tokenizer, vocab_size)))
        self._compiled = lru_cache(_KEPT)(self._compile)

    def constraint(self, params: SamplingParams, ends: Set[int]) -> TokenConstraint:
        """The constraint of one answer.

        Args:
            params: settings with a constraint.
            ends: the tokens that end the answer.

        Raises ValueError, naming the setting, for a grammar that can't be compiled, or that permits no answer.
        """
        name = params.constraint
        assert name is not None
        matcher = self._compiled(name, getattr(params, name)).deep_copy()
        return TokenConstraint(matcher, params, ends, self._vocab_size)

    def _compile(self, name: str, value: str | bool | tuple[str, ...]) -> LLMatcher:
        try:
            matcher = LLMatcher(self._tokenizer, _GRAMMARS[name](value), log_level=0)
            error = matcher.get_error()
        except ValueError as raised:
            error = str(raised)
        if error:
            raise ValueError(f"{name} can't be compiled: {_shortened(error)}")
        return matcher


def _shortened(error: str) -> str:
    """llguidance's message, without the states of its parser and its stack."""
    return one_line(re.split("<state>|<backtrace>", error)[0].strip())


def _of_schema(schema: str) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _SPACE})


def _of_choice(texts: Sequence[str]) -> str:
    return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, texts)))


_GRAMMARS: dict[str, Callable[[Any], str]] = {
    "json_schema": _of_schema,
    "json_object": lambda _: _of_schema('{"type": "object"}'),
    "regex": LLMatcher.grammar_from_regex,
    "choice": _of_choice,
    "grammar": LLMatcher.grammar_from_lark,
}


class TokenConstraint:
    """Which tokens may follow in one answer.

    The answer may end where the grammar is satisfied, and with any of its end tokens. Where it is not, it can't end.
    Settings that allow or suppress tokens apply as well.
    """

    def __init__(self, matcher: LLMatcher, params: SamplingParams, ends: Set[int], vocab_size: int):
        self._matcher, self._params = matcher, params
        self._accepted = 0
        # A bit for each token, and one for the end after them.
        self._bits = allocate_token_bitmask(1, vocab_size + 1)
        words = -(-vocab_size // 32)
        self._end = divmod(vocab_size, 32)
        self._ends = packed(holding(ends, 32 * words))
        self._permitted = packed(permitted(params, 32 * words))
        self._words = self._next_words()

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
            self._words = self._next_words()
        return self._words

    def _next_words(self) -> NDArray[np.uint32]:
        fill_next_token_bitmask(self._matcher, self._bits)
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
