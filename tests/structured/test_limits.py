"""What a grammar may cost: hostile ones end with an error, soon, and none ends the process."""

import pytest
from llguidance import LLParserLimits

from internlm3 import InternLM3Tokenizer, SamplingParams
from internlm3.runtime.structured import grammars as module
from internlm3.runtime.structured.grammars import Grammars

ENDS = frozenset({2})


@pytest.fixture(scope="module")
def grammars(folder):
    tokenizer = InternLM3Tokenizer.from_pretrained(folder)
    return Grammars(tokenizer, len(tokenizer))


@pytest.mark.parametrize("regex", ["(a{1000}){1000}", "((a{100}){100}){100}", "a(a{1000}){1000}", "(a?){2000}a{2000}"])
def test_a_repetition_of_repetitions_ends_with_an_error(grammars, folder, regex):
    """Within a few tokens, as long as the compiler is given limits: else each token may take seconds."""
    (a,) = InternLM3Tokenizer.from_pretrained(folder).encode("\na", add_special_tokens=False)[-1:]
    constraint, token_ids = grammars.constraint(SamplingParams(regex=regex), ENDS), []
    says = r"after \d tokens of the answer regex failed: it is too complex, repeat less in it .*too many expressions"
    with pytest.raises(ValueError, match=says):
        for _ in range(9):
            token_ids.append(a)
            constraint.allowed(token_ids)


def test_the_compiler_is_given_limits_below_its_own(grammars, monkeypatch):
    given, compile_ = [], module.LLMatcher

    def noted(*args, limits, **kwargs):
        given.append(limits)
        return compile_(*args, limits=limits, **kwargs)

    monkeypatch.setattr(module, "LLMatcher", noted)
    grammars._matcher("regex", "start: /a/")
    (limits,), usual = given, LLParserLimits()
    assert 5 * limits.initial_lexer_fuel <= usual.initial_lexer_fuel
    assert 2 * limits.step_lexer_fuel <= usual.step_lexer_fuel


def test_the_first_mask_is_computed_once(grammars, monkeypatch):
    """Not for each of many answers, nor for the next request."""
    calls, fill = [], module.fill_next_token_bitmask
    monkeypatch.setattr(module, "fill_next_token_bitmask", lambda *args: (calls.append(1), fill(*args))[1])
    words = [grammars.constraint(SamplingParams(regex="[ab]{3}x"), ENDS).allowed([]).tolist() for _ in range(5)]
    assert len(calls) == 1 and words == [words[0]] * 5


DEEP = {
    "rules": {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(1900)) + '\nr1900: "a"'},
    "terminals": {"grammar": "start: R0\n" + "\n".join(f'R{i}: R{i + 1} "a"' for i in range(1900)) + '\nR1900: "a"'},
    "references": {
        "json_schema": {
            "$ref": "#/$defs/d0",
            "$defs": {
                **{f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(1900)},
                "d1900": {"type": "null"},
            },
        }
    },
}


@pytest.mark.parametrize("given", DEEP.values(), ids=DEEP)
def test_a_deep_grammar_does_not_end_the_process(grammars, given):
    """The compiler's recursion would, on the stack of a usual thread: for references at about 1000."""
    assert grammars.constraint(SamplingParams(**given), ENDS).allowed([]).any()
