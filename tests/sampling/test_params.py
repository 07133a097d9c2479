"""SamplingParams: values, aliases, errors, documentation; and the table of settings with all that is made from it."""

import argparse
import copy
import inspect
import json
import math
import pickle
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from internlm3.runtime.cli.sampling_switches import add_switches
from internlm3.runtime.common.other_libraries import SAMPLING, SAMPLING_COUNTERPARTS
from internlm3.runtime.engine.state import DecodeState
from internlm3.runtime.sampling.keywords import SamplingKeywords
from internlm3.runtime.sampling.params import RECOMMENDED, RECOMMENDED_THINKING, SamplingParams
from internlm3.runtime.sampling.response_format import FORMS
from internlm3.runtime.sampling.settings import ALIASES, SETTINGS, STATE


def test_the_table_has_a_row_for_every_field_and_every_field_is_documented():
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    assert [setting.name for setting in SETTINGS] == [*defaults]
    for setting in SETTINGS:
        assert f"\n    {setting.name}: " in (SamplingParams.__doc__ or "")
        assert setting.none == (defaults[setting.name] is None)
    assert {*defaults, *ALIASES, *FORMS, "do_sample"} == get_type_hints(SamplingKeywords).keys()
    assert STATE.keys() <= {field.name for field in fields(DecodeState)}


# Every kind of number that 1 may be; those that are no integer are refused where one is meant.
INTEGERS = [1, np.int64(1), np.uint8(1), np.array(1), torch.tensor(1), torch.tensor(1, dtype=torch.int8)]
FLOATS = [1.0, np.float64(1), np.float32(1), np.float16(1), torch.tensor(1.0), torch.tensor(1, dtype=torch.bfloat16),
          np.array(1.0), Decimal(1), Fraction(1)]  # fmt: skip
TRUES = [True, np.True_, torch.tensor(True)]


def forms(setting, one):
    """Values of a setting that hold the number 1 in this form, and what is stored: the same with Python's own."""
    return {
        "integer": (one, 1),
        "number": (one, 1.0),
        "bool": (one, True),
        "token ids": ([one, 3], (1, 3)),
        "token biases": ({5: one}, {5: 1.0}),
        "sequences": ([[one, 3], [one]], ((1, 3), (1,))),
        "sequence biases": ({(5, 6): one}, {(5, 6): 1.0}),
        "start and factor": ((one, one), (1.0, 1.0)),
    }[setting.type]


@pytest.mark.parametrize("one", [*INTEGERS, *FLOATS, *TRUES], ids=lambda one: f"{type(one).__name__} {one!r}")
def test_a_number_of_any_kind_is_pythons_own(one):
    """Else an integer bias fails in a step that other callers share, and a NumPy scalar compares and prints apart."""
    accepted = {"integer": INTEGERS, "token ids": INTEGERS, "sequences": INTEGERS, "bool": TRUES}
    for setting in SETTINGS:
        if setting.type in ("strings", "text", "texts", "JSON schema"):
            continue
        given, stored = forms(setting, one)
        if any(one is other for other in accepted.get(setting.type, [*INTEGERS, *FLOATS])):
            found = getattr(SamplingParams(**{setting.name: given}), setting.name)
            assert repr(found) == repr(stored), setting.name
        else:
            with pytest.raises(ValueError, match=f"{setting.name}.* must be"):
                SamplingParams(**{setting.name: given})


def test_ids_of_arrays_and_single_ids():
    for name in ("suppress_tokens", "stop_token_ids", "forced_eos_token_id"):
        for ids in (np.array([3, 4]), torch.tensor([3, 4]), {3: 0, 4: 0}.keys(), (np.int32(3), torch.tensor(4))):
            assert repr(getattr(SamplingParams(**{name: ids}), name)) == "(3, 4)"
    for one in (3, np.int32(3), np.array(3), torch.tensor(3)):
        assert SamplingParams(forced_eos_token_id=one).forced_eos_token_id == (3,)
        with pytest.raises(ValueError, match="stop_token_ids must be a sequence; got"):
            SamplingParams(stop_token_ids=one)
    biases = SamplingParams(sequence_bias={(np.int64(5),): torch.tensor(-math.inf), (6,): Decimal("-Infinity")})
    assert repr(biases.sequence_bias) == "{(5,): -inf, (6,): -inf}"
    assert repr(SamplingParams(logit_bias={np.int64(5): -100}).logit_bias) == "{5: -100.0}"


@pytest.mark.parametrize("beyond", [1e39, 1e-50, 10**400, Decimal("1e400"), np.float64(1e300)], ids=str)
def test_a_number_that_the_device_cannot_hold_is_refused(beyond):
    """Else it would fail, or mean infinity or zero, in a step that other callers share."""
    for name in ("temperature", "repetition_penalty"):
        with pytest.raises(ValueError, match=f"{name} must be a number"):
            SamplingParams(**{name: beyond})
    with pytest.raises(ValueError, match=r"logit_bias\[5\] must be a number"):
        SamplingParams(logit_bias={5: beyond})


def test_switches_are_those_of_the_table():
    parser = argparse.ArgumentParser()
    add_switches(parser.add_argument_group())
    shown = parser.format_help()
    for setting in SETTINGS:
        on = getattr(SamplingParams(), setting.name) is True
        switch = f"--{'no-' if on else ''}{setting.name.replace('_', '-')} "
        assert (switch in shown.replace("\n", " ").replace("]", " ")) == (setting.help is not None), setting.name
    given = vars(parser.parse_args(["--temp", "0.5", "-n", "7"]))
    assert (given["temperature"], given["max_tokens"]) == (0.5, 7)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"n": 0}, r"n must be an integer in \[1, 65536\]; got 0"),
        ({"n": 65537}, r"n must be an integer in \[1, 65536\]; got 65537"),
        ({"n": True}, r"n must be an integer"),
        ({"temperature": -0.1}, r"temperature must be a number in \[0, inf\); got -0.1"),
        ({"temperature": math.nan}, r"temperature .* got nan"),
        ({"temperature": math.inf}, r"temperature .* got inf"),
        ({"temperature": "1"}, r"temperature .* got '1'"),
        ({"top_k": -2}, r"top_k must be an integer >= -1; got -2"),
        ({"top_k": 4.0}, r"top_k must be an integer .* got 4.0"),
        ({"top_p": -0.1}, r"top_p must be a number in \[0, 1\]; got -0.1"),
        ({"top_p": 1.5}, r"top_p .* got 1.5"),
        ({"min_p": -0.1}, r"min_p must be a number in \[0, 1\]; got -0.1"),
        ({"typical_p": 0}, r"typical_p must be a number in \(0, 1\]; got 0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be a number in \(0, inf\); got 0.0"),
        ({"presence_penalty": 2.5}, r"presence_penalty must be a number in \[-2, 2\]; got 2.5"),
        ({"frequency_penalty": -3}, r"frequency_penalty must be a number in \[-2, 2\]; got -3"),
        ({"logit_bias": [1]}, r"logit_bias must be a mapping"),
        ({"logit_bias": {-1: 1.0}}, r"logit_bias: a token id must be an integer >= 0; got -1"),
        ({"logit_bias": {1: math.inf}}, r"logit_bias\[1\] must be a number"),
        ({"allowed_token_ids": []}, r"allowed_token_ids must name at least one token"),
        ({"allowed_token_ids": 3}, r"allowed_token_ids must be a sequence; got 3"),
        ({"stop_token_ids": ["a"]}, r"stop_token_ids: a token id must be an integer >= 0; got 'a'"),
        ({"seed": 2**63}, r"seed must be an integer in .* got 9223372036854775808"),
        ({"seed": 1.5}, r"seed must be an integer"),
        ({"seed": np.bool_(True)}, r"seed must be an integer"),
        ({"max_tokens": torch.tensor(True)}, r"max_tokens must be an integer"),
        ({"max_tokens": torch.tensor(1.5)}, r"max_tokens must be an integer"),
        ({"top_p": np.float32(1.5)}, r"top_p must be a number"),
        ({"top_p": np.array([0.5])}, r"top_p must be a number"),
        ({"min_p": torch.tensor(True)}, r"min_p must be a number"),
        ({"max_tokens": 0}, r"max_tokens must be an integer >= 1; got 0"),
        ({"min_tokens": -1}, r"min_tokens must be an integer >= 0; got -1"),
        ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens must be at most max_tokens = 8; got 9"),
        ({"stop": ""}, r"stop must be .* got ''"),
        ({"stop": ["a", 3]}, r"stop must be .* got 3"),
        ({"stop": 7}, r"stop must be a sequence; got 7"),
        ({"logprobs": -1}, r"logprobs must be an integer >= 0; got -1"),
        ({"ignore_eos": 1}, r"ignore_eos must be True or False; got 1"),
        ({"do_sample": True, "temperature": 0}, r"do_sample=True contradicts temperature=0"),
        ({"do_sample": "no"}, r"do_sample must be True, False or None; got 'no'"),
        ({"max_tokens": 5, "max_new_tokens": 6}, r"max_tokens=5 and max_new_tokens=6 name the same setting"),
    ],
)
def test_a_bad_value_is_one_clear_error(bad, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams.from_kwargs(**bad)


@pytest.mark.parametrize("wrong, near", [("temprature", "temperature"), ("topk", "top_k"), ("max_token", "max_tokens")])
def test_an_unknown_keyword_names_its_neighbour(wrong, near):
    given: Any = {wrong: 1}
    with pytest.raises(TypeError, match=f"unknown keyword '{wrong}'; did you mean '{near}'"):
        SamplingParams.from_kwargs(**given)


WAYS = [SamplingParams, SamplingParams.from_kwargs, lambda **given: SamplingParams.from_kwargs(RECOMMENDED, **given)]


@pytest.mark.parametrize("way", WAYS)
def test_the_constructor_takes_what_a_call_takes(way):
    """Aliases, do_sample, None and neutral keywords; and the same errors."""
    assert way(max_new_tokens=5, temp=0.5) == way(max_tokens=5, temperature=0.5)
    assert way(do_sample=False).greedy and way(do_sample=True, top_p=None).top_p == 1.0
    assert way(max_tokens=None, max_new_tokens=5).max_tokens == way(max_new_tokens=5, max_tokens=None).max_tokens == 5
    assert way(best_of=1, use_beam_search=False, prompt_logprobs=None, length_penalty=1) == way()
    for wrong, near in (("temprature", "temperature"), ("max_token", "max_tokens"), ("repitition_penalty", "rep")):
        with pytest.raises(TypeError, match=f"unknown keyword '{wrong}'; did you mean '{near}"):
            way(**{wrong: 1})
    with pytest.raises(ValueError, match="max_tokens=5 and max_new_tokens=6 name the same setting"):
        way(max_tokens=5, max_new_tokens=6)


def test_a_dataclass_with_other_names_is_still_one():
    params = SamplingParams(2, 0.5, max_new_tokens=5)
    assert (params.n, params.temperature, params.max_tokens) == (2, 0.5, 5)
    assert replace(params, temperature=0.7) == SamplingParams(n=2, temperature=0.7, max_tokens=5)
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert [*inspect.signature(SamplingParams).parameters] == [field.name for field in fields(SamplingParams)]
    with pytest.raises(TypeError, match="multiple values"):
        SamplingParams(2, n=3)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"best_of": 4}, TypeError, "did you mean 'n'"),
        ({"bad_words": ["no"]}, TypeError, "did you mean 'bad_words_ids'"),
        ({"max_length": 20}, TypeError, "did you mean 'max_tokens'"),
        ({"n_predict": 20}, TypeError, "did you mean 'max_tokens'"),
        ({"max_completion_tokens": 20}, TypeError, "did you mean 'max_tokens'"),
        ({"eos_token_id": 2}, TypeError, "did you mean 'stop_token_ids'"),
        ({"logits_processors": [print]}, TypeError, "logits_processor of InternLM3ForCausalLM.generate"),
        ({"stream": True}, TypeError, "did you mean 'llm.stream'"),
        ({"use_beam_search": True}, ValueError, "use_beam_search=True is not supported; it can only be False"),
        ({"num_beams": 4}, ValueError, "num_beams=4 is not supported; it can only be 1"),
        ({"mirostat_mode": 2}, ValueError, "mirostat_mode=2 is not supported; it can only be 0"),
        ({"prompt_logprobs": 1}, ValueError, "prompt_logprobs=1 is not supported; it can only be None"),
        ({"guided_json": {}}, TypeError, "did you mean 'json_schema'"),
        ({"guided_decoding": {}}, TypeError, "did you mean 'json_schema, regex, choice or grammar'"),
    ],
)
def test_words_of_other_libraries_that_would_mean_something(given, error, says):
    with pytest.raises(error, match=says):
        SamplingParams(**given)


def test_a_counterpart_is_no_word_that_is_taken():
    taken = {field.name for field in fields(SamplingParams)} | {*ALIASES}
    assert not taken & {*SAMPLING, *SAMPLING_COUNTERPARTS}
    assert taken >= {name for name in SAMPLING_COUNTERPARTS.values() if name.endswith(("_tokens", "_ids"))}


@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_token_ids_lie_inside_the_vocabulary(name):
    given: Any = {name: {100: 1.0} if name == "logit_bias" else [100]}
    params = SamplingParams(**given)
    params.check_vocab(101)
    with pytest.raises(ValueError, match=f"{name} holds 100, which is outside the vocabulary of 100"):
        params.check_vocab(100)


def test_names_of_other_libraries():
    params = SamplingParams.from_kwargs(
        max_new_tokens=5, temp=0.5, repeat_penalty=1.1, stop_words="end", random_seed=3, num_return_sequences=2
    )
    expected = SamplingParams(max_tokens=5, temperature=0.5, repetition_penalty=1.1, stop=["end"], seed=3, n=2)
    assert params == expected and params.stops == ("end",)
    assert SamplingParams.from_kwargs(max_tokens=5, max_new_tokens=5).max_tokens == 5


def test_do_sample_and_none():
    assert SamplingParams.from_kwargs(do_sample=False, temperature=0.7).greedy
    assert SamplingParams.from_kwargs(SamplingParams(temperature=0), do_sample=True).temperature == 1.0
    assert SamplingParams.from_kwargs(SamplingParams(temperature=0.3), do_sample=True).temperature == 0.3
    assert SamplingParams.from_kwargs(RECOMMENDED, top_p=None, max_tokens=None) == SamplingParams(
        top_k=40, repetition_penalty=1.005
    )


def test_a_short_call_on_top_of_a_longer_minimum():
    """A checkpoint's min_new_tokens gives way, as in transformers; a call that contradicts itself is an error."""
    base = SamplingParams.from_generation_config({"min_new_tokens": 10, "max_new_tokens": 90})
    with pytest.warns(UserWarning, match="min_tokens=10 gives way to max_tokens=3"):
        short = SamplingParams.from_kwargs(base, max_new_tokens=3)
    assert (short.min_tokens, short.max_tokens) == (3, 3)
    assert SamplingParams.from_kwargs(base, max_tokens=10).min_tokens == 10
    with pytest.raises(ValueError, match="min_tokens must be at most max_tokens = 3; got 4"):
        SamplingParams.from_kwargs(base, max_tokens=3, min_tokens=4)
    with pytest.raises(ValueError, match="max_tokens must be an integer >= 1; got 0"):
        SamplingParams.from_kwargs(base, max_tokens=0)


def test_recommended_settings_of_the_model():
    for params, max_tokens in ((RECOMMENDED, 1024), (RECOMMENDED_THINKING, 8192)):
        assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (1.0, 0.8, 40, 1.005)
        assert params.max_tokens == max_tokens


def test_generation_config_is_greedy_unless_it_samples():
    config = {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": None,
        "eos_token_id": [2, 7],
        "pad_token_id": 2,
    }
    assert SamplingParams.from_generation_config(config) == SamplingParams(temperature=0.8, top_p=0.9)
    assert SamplingParams.from_generation_config({**config, "do_sample": False}).greedy
    assert SamplingParams.from_generation_config({"max_new_tokens": 7}) == SamplingParams(temperature=0, max_tokens=7)


@pytest.mark.parametrize("given", ["false", "true", 0, 1, "no", []])
def test_do_sample_in_a_file_is_true_or_false(given):
    with pytest.raises(ValueError, match="do_sample must be True, False or None"):
        SamplingParams.from_generation_config({"do_sample": given})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0), ("min_new_tokens", -1), ("num_return_sequences", 0), ("temp", -1.0),
        ("repeat_penalty", 0), ("random_seed", 2**64), ("stop_strings", [""]), ("stop_words", 5),
    ],
)  # fmt: skip
def test_an_error_names_the_word_that_was_given(name, value):
    """Not ours for it, also where it comes from generation_config.json."""
    with pytest.raises(ValueError, match=f"^{name} must be"):
        SamplingParams(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} must be"):
        SamplingParams.from_kwargs(SamplingParams(max_tokens=9), **{name: value})
    with pytest.raises(ValueError, match=f"^{name} must be"):
        SamplingParams.from_generation_config({name: value})


def test_numbers_of_numpy_and_torch():
    given = SamplingParams.from_kwargs(
        n=np.int64(2), temperature=np.float32(0.5), top_k=torch.tensor(7), top_p=torch.tensor(0.25),
        min_p=np.float64(0.5), logit_bias={np.int32(3): np.float16(1.5)}, allowed_token_ids=torch.tensor([3, 4]),
        seed=np.uint8(9), max_tokens=torch.tensor([5]), min_tokens=np.array(2), stop_token_ids=np.array([4]),
        logprobs=np.int8(0),
    )  # fmt: skip
    plain = SamplingParams(
        n=2, temperature=0.5, top_k=7, top_p=0.25, min_p=0.5, logit_bias={3: 1.5}, allowed_token_ids=[3, 4], seed=9,
        max_tokens=5, min_tokens=2, stop_token_ids=[4], logprobs=0,
    )  # fmt: skip
    assert given == plain
    assert repr(given) == repr(plain)


def test_seed_minus_one_is_drawn_as_none_is():
    """As in vLLM and llama.cpp."""
    assert SamplingParams(seed=-1) == SamplingParams(seed=None)
    assert SamplingParams(seed=-2).seed == -2


# -------------------------------------------------------------------- constraints

SCHEMA = {"type": "object", "properties": {"乙": {}, "b": {}, "a": {"type": "integer"}}}


def test_a_schema_is_stored_as_text_with_its_keys_in_order():
    class Model:
        @classmethod
        def model_json_schema(cls):
            return SCHEMA

    text = '{"type": "object", "properties": {"乙": {}, "b": {}, "a": {"type": "integer"}}}'
    for given in (SCHEMA, text, json.dumps(SCHEMA), Model):
        params = SamplingParams(json_schema=given)
        assert params.json_schema == text and params.constraint == "json_schema"
        assert replace(params, seed=1).json_schema == text and pickle.loads(pickle.dumps(params)) == params
    assert SamplingParams(choice=iter(["b", "a"])).choice == ("b", "a")
    assert SamplingParams().constraint is None and SamplingParams(json_object=True).constraint == "json_object"


def test_a_constraint_replaces_that_of_the_base():
    base = SamplingParams(regex="a", seed=3)
    assert SamplingParams.from_kwargs(base, temperature=0.5, json_schema=None, response_format=None).regex == "a"
    changed = SamplingParams.from_kwargs(base, choice=["x"])
    assert (changed.regex, changed.choice, changed.seed) == (None, ("x",), 3)
    assert SamplingParams.from_kwargs(base, response_format={"type": "text"}).constraint is None
    assert SamplingParams.from_kwargs(SamplingParams(json_object=True), grammar="start: A").constraint == "grammar"


def test_constraints_in_other_libraries_forms():
    named = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    assert SamplingParams(response_format=named) == SamplingParams(json_schema=SCHEMA)
    assert SamplingParams(response_format={"type": "json_object"}) == SamplingParams(json_object=True)
    assert SamplingParams(response_format={"type": "text"}, structured_outputs=None) == SamplingParams()
    given = SimpleNamespace(json=None, regex="a+", choice=None, grammar=None, json_object=None, disable_fallback=False)
    assert SamplingParams(structured_outputs=given) == SamplingParams(regex="a+")
    assert SamplingParams(structured_outputs={"json": SCHEMA}) == SamplingParams(json_schema=SCHEMA)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"json_schema": "{"}, r"json_schema is no JSON: Expecting .*; got '\{'"),
        ({"json_schema": "[]"}, r"json_schema must be a JSON object, as a dict or a string; got '\[\]'"),
        ({"json_schema": True}, "json_schema must be a JSON object"),
        ({"json_schema": {"enum": {1, 2}}}, "json_schema is no JSON: .*set is not JSON serializable"),
        ({"json_schema": {"minimum": math.nan}}, "json_schema is no JSON: Out of range float"),
        ({"json_schema": {"const": "\ud800"}}, "json_schema has a lone surrogate"),
        ({"regex": ""}, "regex must be a string of at least one character; got ''"),
        ({"regex": 3}, "regex must be a string .* got 3"),
        ({"grammar": "a\udfff"}, "grammar has a lone surrogate"),
        ({"choice": []}, "choice must name at least one string; got none"),
        ({"choice": "yes"}, "choice must be a sequence; got 'yes'"),
        ({"choice": ["yes", ""]}, "choice must be a string of at least one character; got ''"),
        ({"json_object": "yes"}, "json_object must be True or False"),
        ({"regex": "a", "choice": ["a"]}, "regex and choice each say what the answer may be; give one of them"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos contradicts regex"),
        ({"json_object": True, "forced_eos_token_id": 2}, "forced_eos_token_id contradicts json_object"),
        ({"forced_eos_token_id": 2, "allowed_token_ids": [3]}, "^allowed_token_ids permit no token of forced_eos"),
        ({"response_format": {"type": "yaml"}}, "response_format must be .*got {'type': 'yaml'}"),
        ({"response_format": "json_object"}, "response_format must be"),
        ({"response_format": {"type": "json_schema"}}, r"response_format has no schema at \['json_sch"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex is given twice, or next to a form"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "json_object is given"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs must have one of json, "),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs must have one of json, "),
        ({"structured_outputs": object()}, "structured_outputs must have one of json, "),
    ],
)  # fmt: skip
def test_bad_constraints(given, says):
    with pytest.raises(ValueError, match=says) as caught:
        SamplingParams(**given)
    assert len(str(caught.value)) < 300
