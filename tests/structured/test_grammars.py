"""Masks of a grammar against brute force, for every kind of tokenizer; ends, errors, and the traps of llguidance."""

import contextlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import InternLM3Tokenizer
from internlm3.runtime.sampling.params import SamplingParams
from internlm3.runtime.structured import grammars as module
from internlm3.runtime.structured.grammars import Grammars
from internlm3.runtime.structured.token_table import TokenTable
from internlm3.tests.support.tokenizers import ANY_TEXT, CORPUS

ENDS = frozenset({2, 5})  # </s>, and a token that else is text


def tokens_of(words):
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def text_bytes(tokenizer, token_ids):
    table = tokenizer.token_bytes()
    return b"".join(table[token] for token in token_ids)


@pytest.fixture(scope="session")
def grammars(tokenizer):
    """For a model with some more tokens than the tokenizer has, and a last word that is not full."""
    return Grammars(tokenizer, len(tokenizer) + 3)


# -------------------------------------------------------------------- the table


@settings(max_examples=25)
@given(text=ANY_TEXT)
def test_a_text_is_cut_as_inside_a_text(tokenizer, text):
    """The trap: a token of the dummy prefix, or of a text that the tokenizer changes, breaks the matcher silently."""
    table = _table(tokenizer)
    ids = table(text)
    assert b"".join(table.tokens[token] for token in ids) == text.encode()
    assert not {*ids} & {*table.special_token_ids}


_tables = {}


def _table(tokenizer):
    if tokenizer not in _tables:
        _tables[tokenizer] = TokenTable(tokenizer, len(tokenizer))
    return _tables[tokenizer]


def test_what_tokens_spell(tokenizer):
    """Decoding any tokens inside a text gives their bytes; special tokens have none."""
    table, rng = tokenizer.token_bytes(), random.Random(1)
    texts = [token for token, spelled in enumerate(table) if spelled]
    valid = 0
    for _ in range(400):
        ids = rng.choices(texts, k=rng.randrange(1, 5))
        with contextlib.suppress(UnicodeDecodeError):  # how the bytes of no character are shown differs
            expected = text_bytes(tokenizer, ids).decode()
            assert tokenizer.convert_tokens_to_string(["a", *tokenizer.convert_ids_to_tokens(ids)]) == "a" + expected
            valid += 1
    assert valid > 50
    assert len(table) == len(tokenizer)
    assert all(table[token] is None for token in tokenizer.added_tokens_decoder)
    assert {bytes([byte]) for byte in range(256)} <= {*table}


def test_the_tokenizers_own_cut_is_kept(tokenizer, monkeypatch):
    """Where the tokenizer does not change a text, its own tokens are given, which are not always the longest."""
    monkeypatch.setattr(TokenTable, "_longest_tokens", None)  # the way out for other texts
    if tokenizer.decode(tokenizer.encode("\n{", add_special_tokens=False)) != "\n{":
        pytest.skip("this one changes the beginning of a text")
    for text in CORPUS:
        ids = _table(tokenizer)(text)
        assert ids == tokenizer.encode("\n" + text, add_special_tokens=False)[-len(ids) :]


def test_the_trap_is_seen(folder, monkeypatch):
    """With a token of the dummy prefix the library's mask has the end only, and its error is no exception there."""
    tokenizer = InternLM3Tokenizer.from_pretrained(folder)
    monkeypatch.setattr(TokenTable, "__call__", lambda self, text: tokenizer.encode(text, add_special_tokens=False))
    with pytest.raises(ValueError, match=r"after 0 tokens of the answer json_object failed: \S[^<]{,200}$"):
        Grammars(tokenizer, len(tokenizer)).constraint(SamplingParams(json_object=True), ENDS)


# -------------------------------------------------------------------- masks

WORDS = st.lists(st.text('ab {"中é\n<', min_size=1, max_size=6), min_size=1, max_size=6, unique=True)


@settings(max_examples=25)
@given(WORDS, st.randoms())
def test_masks_are_those_of_brute_force(tokenizer, grammars, texts, rng):
    """Choices: after any tokens exactly those may follow with which one of the texts can still come.

    Where all go on the same way, the library permits only the token with which the tokenizer itself goes on.
    """
    table = tokenizer.token_bytes()
    constraint = grammars.constraint(SamplingParams(choice=texts), ENDS)
    spelled, token_ids, wanted = b"", [], [text.encode() for text in texts]
    while True:
        found = tokens_of(constraint.allowed(token_ids))
        left = [text[len(spelled) :] for text in wanted if text.startswith(spelled)]
        expected = {
            token
            for token, own in enumerate(table)
            if own and token not in ENDS and any(text.startswith(own) for text in left)
        }
        if b"" in left:
            expected |= ENDS
        if found != expected:
            (forced,) = found
            assert forced in expected and all(text.startswith(table[forced]) for text in left)
        token = rng.choice(sorted(found))
        if token in ENDS:
            assert spelled in wanted
            return
        token_ids.append(token)
        spelled += table[token]


@pytest.mark.parametrize(
    "params",
    [
        {"regex": r"(ab|a)*[0-9]{1,3}(中|é)?"},
        {"json_schema": {"type": "array", "items": {"enum": ["a", 1, None, "中"]}, "maxItems": 3}},
        {"grammar": 'start: "(" start ")" | "x"'},
    ],
    ids=str,
)
def test_every_allowed_token_is_accepted_and_no_other(tokenizer, grammars, params):
    """A random walk: another matcher takes each token of the mask, and none outside."""
    rng, params = random.Random(2), SamplingParams(**params)
    for _ in range(5):
        token_ids = []
        constraint = grammars.constraint(params, ENDS)
        for _ in range(12):
            found = tokens_of(constraint.allowed(token_ids))
            if found >= ENDS:
                break
            for token in [*rng.sample(sorted(found), min(4, len(found))), *rng.sample(range(len(tokenizer)), 8)]:
                fresh = grammars.constraint(params, ENDS)
                if token in found:
                    fresh.allowed([*token_ids, token])
                elif len(found) > 1 and token not in ENDS:
                    with pytest.raises(ValueError, match="failed"):
                        fresh.allowed([*token_ids, token])
            token_ids.append(rng.choice(sorted(found)))


def test_all_ends_or_none(grammars):
    """Of an answer that may go on, of one that may not, and of one that is not complete."""
    constraint = grammars.constraint(SamplingParams(regex="a*"), frozenset({2, 7, 9}))
    assert {2, 7, 9} < tokens_of(constraint.allowed([]))
    assert tokens_of(grammars.constraint(SamplingParams(choice=["a"]), ENDS).allowed([])).isdisjoint(ENDS)


def spell(tokenizer, text):
    """For each character the token with which the tokenizer spells it."""
    return [token for character in text for token in _table(tokenizer)(character)]


def test_min_tokens_and_permitted_tokens(tokenizer, grammars):
    a, b = spell(tokenizer, "ab")
    settings = {"regex": "[ab]*", "min_tokens": 2, "suppress_tokens": [b]}
    constraint = grammars.constraint(SamplingParams(**settings), ENDS)
    for count in range(4):
        found = tokens_of(constraint.allowed([a] * count))
        assert a in found and b not in found and ENDS.isdisjoint(found) == (count < 2)
    constraint = grammars.constraint(SamplingParams(regex="[ab]*", allowed_token_ids=[a, 2]), ENDS)
    assert tokens_of(constraint.allowed([a])) == {a, 2}


def test_answers_of_one_grammar_are_independent(tokenizer, grammars):
    params, (a, b) = SamplingParams(choice=["ab", "ba"]), spell(tokenizer, "ab")
    one, two = (grammars.constraint(params, ENDS) for _ in range(2))
    assert a in tokens_of(one.allowed([])) and b in tokens_of(one.allowed([a]))
    assert {a, b} <= tokens_of(two.allowed([])) and a in tokens_of(two.allowed([b]))
    assert tokens_of(one.allowed([a, b])) == ENDS


def test_tokens_out_of_order_are_refused(tokenizer, grammars):
    a, b = spell(tokenizer, "ab")
    constraint = grammars.constraint(SamplingParams(choice=["ab"]), ENDS)
    with pytest.raises(ValueError, match="after 2 tokens of the answer choice failed"):
        constraint.allowed([b, a])
    with pytest.raises(ValueError, match="failed"):  # for good
        constraint.allowed([b, a, b])


def test_special_tokens_are_no_text_unless_named(tokenizer, grammars):
    special = {*tokenizer.added_tokens_decoder}
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    free = grammars.constraint(SamplingParams(regex=r"(.|\n)*"), frozenset({2}))
    assert tokens_of(free.allowed([])) & special == {2}
    spelled = spell(tokenizer, "<|im_start|")
    assert start not in tokens_of(grammars.constraint(SamplingParams(choice=["<|im_start|>"]), ENDS).allowed(spelled))
    named = grammars.constraint(SamplingParams(grammar='start: <|im_start|> "a"'), ENDS)
    assert tokens_of(named.allowed([])) == {start}
    assert spell(tokenizer, "a")[0] in tokens_of(named.allowed([start]))


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"json_schema": {"type": "wobble"}}, "json_schema can't be compiled: Invalid type: wobble"),
        ({"json_schema": {"not": {}}}, r'json_schema can\'t be compiled: Unimplemented keys: \["not"\]'),
        ({"json_schema": {"minimum": 3, "maximum": 2, "type": "integer"}}, "Unsatisfiable schema: minimum"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "json_schema can't be compiled: .*nowhere"),
        ({"json_schema": {"$ref": "http://127.0.0.1:9/x"}}, "json_schema can't be compiled: .*does not fetch"),
        ({"json_schema": {"type": "string", "pattern": "(?=a)"}}, "json_schema can't be compiled: .*look-ahead"),
        ({"regex": "("}, "regex can't be compiled: .*unclosed group"),
        ({"regex": "(" * 5000 + ")" * 5000}, "regex can't be compiled"),
        ({"grammar": "start: nothing"}, 'grammar can\'t be compiled: .*unknown name: "nothing"'),
        ({"grammar": 'begin: "a"'}, "grammar can't be compiled: no start rule found"),
        ({"regex": "a" * 200_000}, "regex is too long: 2.* characters, and at most 131072 may be"),
        ({"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(2001))}, "more than 2000 rules"),
        (
            {
                "json_schema": {
                    "allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for i in range(8)]} for j in range(8)]
                }
            },
            "json_schema can't be compiled: it is too complex, repeat less in it .schema too large",
        ),
        ({"grammar": 'start: start "a"'}, "after 0 tokens of the answer grammar permits no token there"),
        ({"choice": ["b"], "suppress_tokens": range(3, 500)}, "choice and suppress_tokens permit no token there"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_what_can_not_be_a_constraint(grammars, given, says):
    with pytest.raises(ValueError, match=says) as caught:
        grammars.constraint(SamplingParams(**given), ENDS)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


# -------------------------------------------------------------------- schemas as people's libraries write them


def accepts(tokenizer, grammars, schema, text):
    """Whether the answer may be this text."""
    constraint = grammars.constraint(SamplingParams(json_schema=schema), ENDS)
    try:
        return tokens_of(constraint.allowed(spell(tokenizer, text))) >= ENDS
    except ValueError:
        return False


@pytest.mark.parametrize("format", ["password", "binary", "path", "json-string", "decimal", "nonsense"])
def test_a_format_that_is_only_a_note_says_nothing(tokenizer, grammars, format):
    """As Pydantic writes it for SecretStr, bytes, Path, Json and Decimal."""
    schema = {"properties": {"format": {"$ref": "#/$defs/a"}}, "required": ["format"], "type": "object"}
    schema = {"type": "array", "items": {"anyOf": [schema]}, "$defs": {"a": {"type": "string", "format": format}}}
    assert accepts(tokenizer, grammars, schema, '[{"format":"any"}]')
    assert not accepts(tokenizer, grammars, schema, '[{"format":1}]')


@pytest.mark.parametrize(
    ("format", "good"), [("date", "2026-12-01"), ("uuid", "123e4567-e89b-12d3-a456-426614174000"), ("ipv4", "10.0.0.1")]
)
def test_a_known_format_is_a_form(tokenizer, grammars, format, good):
    schema = {"type": "string", "format": format}
    assert accepts(tokenizer, grammars, schema, f'"{good}"') and not accepts(tokenizer, grammars, schema, '"any"')


def test_every_format_that_is_left_in_is_known(grammars):
    for format in module._FORMATS:
        assert grammars.constraint(SamplingParams(json_schema={"type": "string", "format": format}), ENDS)


def test_values_are_no_schemas(tokenizer, grammars):
    value = {"format": "x", "propertyNames": {}}
    text = '{"format":"x","propertyNames":{}}'
    for schema in ({"const": value}, {"enum": [value]}):
        assert accepts(tokenizer, grammars, schema, text) and not accepts(tokenizer, grammars, schema, "{}")


def test_names_of_a_record_are_strings_anyway(tokenizer, grammars):
    """As Zod says it; what else it says of names is refused."""
    record = {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}}
    assert accepts(tokenizer, grammars, record, '{"a":1}') and not accepts(tokenizer, grammars, record, '{"a":"b"}')
    with pytest.raises(ValueError, match="propertyNames"):
        accepts(tokenizer, grammars, {**record, "propertyNames": {"pattern": "a"}}, "")
