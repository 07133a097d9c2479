"""SamplingParams: values, aliases, errors, documentation; and the table of settings with all that is made from it."""

import argparse
import math
from dataclasses import fields
from decimal import Decimal
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from internlm3.runtime.cli.sampling_switches import add_switches
from internlm3.runtime.engine.state import DecodeState
from internlm3.runtime.sampling.keywords import SamplingKeywords
from internlm3.runtime.sampling.params import RECOMMENDED, RECOMMENDED_THINKING, SamplingParams
from internlm3.runtime.sampling.settings import ALIASES, SETTINGS, STATE


def test_the_table_has_a_row_for_every_field_and_every_field_is_documented():
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    assert [setting.name for setting in SETTINGS] == [*defaults]
    for setting in SETTINGS:
        assert f"\n    {setting.name}: " in (SamplingParams.__doc__ or "")
        assert setting.none == (defaults[setting.name] is None)
    assert {*defaults, *ALIASES, "do_sample"} == get_type_hints(SamplingKeywords).keys()
    assert STATE.keys() <= {field.name for field in fields(DecodeState)}


@pytest.mark.parametrize("one", [1, True + 0, np.float64(1), np.float32(1), np.int64(1), torch.tensor(1), Decimal(1)])
def test_a_number_of_any_kind_is_the_float(one):
    for setting in SETTINGS:
        if setting.type == "number":
            given = getattr(SamplingParams(**{setting.name: one}), setting.name)
            assert given == 1.0 and type(given) is float, setting.name
    params = SamplingParams(
        logit_bias={5: one}, sequence_bias={(5, 6): one}, exponential_decay_length_penalty=(one, one)
    )
    assert params.logit_bias == {5: 1.0} and type(params.logit_bias[5]) is float
    assert params.sequence_bias == {(5, 6): 1.0} and type(params.sequence_bias[5, 6]) is float
    assert params.exponential_decay_length_penalty == (1.0, 1.0)


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
        switch = f"--{setting.name.replace('_', '-')} " if setting.name != "skip_special_tokens" else "--no-skip-"
        assert (switch in shown.replace("\n", " ").replace("]", " ")) == (setting.help is not None), setting.name
    given = vars(parser.parse_args(["--temp", "0.5", "-n", "7"]))
    assert (given["temperature"], given["max_tokens"]) == (0.5, 7)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"n": 0}, r"n must be an integer >= 1; got 0"),
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
