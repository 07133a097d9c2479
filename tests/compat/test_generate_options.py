"""Where the options of `generate` come from, which keywords mean nothing here, and what is refused."""

import inspect
import re
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from internlm3.runtime.compat.generate_options import read_options
from internlm3.runtime.sampling.settings import SETTINGS
from internlm3.tests.support.prompts import PROMPTS


def test_numbers_of_numpy_and_torch_are_numbers(tiny):
    plain = tiny.ours.generate(PROMPTS, max_new_tokens=7, min_new_tokens=3, eos_token_id=[30, 5], pad_token_id=3)
    for number, several in (
        (np.int64, np.array),
        (torch.tensor, torch.tensor),
        (int, lambda ids: [*map(np.int32, ids)]),
    ):
        lengths = {"max_new_tokens": number(7), "min_new_tokens": number(3)}
        assert tiny.ours.generate(PROMPTS, eos_token_id=several([30, 5]), pad_token_id=number(3), **lengths).equal(
            plain
        )
        one = tiny.ours.generate(PROMPTS, eos_token_id=number(30), max_length=number(13))
        assert one.equal(tiny.ours.generate(PROMPTS, eos_token_id=30, max_length=13))


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64, torch.tensor, np.array, Decimal, Fraction])
def test_every_option_that_is_a_number_takes_any_kind(tiny, kind):
    """As the same option with Python's own number; a kind that is no integer is refused where one is meant."""
    integral = kind in (np.int64, torch.tensor, np.array)
    names = {setting.generate: setting for setting in SETTINGS if setting.generate}
    numbers = [name for name, setting in names.items() if setting.type in ("integer", "number")]

    def options(**given):
        return read_options(tiny.ours.config, {}, None, {"do_sample": True, **given}, 1)

    for name in (*numbers, "max_new_tokens", "min_new_tokens", "max_length", "min_length"):
        one = 2 if name.endswith("length") else 1
        if integral or (name in names and names[name].type == "number"):
            assert repr(options(**{name: kind(one)})) == repr(options(**{name: one})), name
        else:
            with pytest.raises(ValueError, match="must be an integer"):
                options(**{name: kind(one)})
    for neutral in ({"length_penalty": 1}, {"num_beams": 1}, {"guidance_scale": 1}, {"epsilon_cutoff": 0}):
        [(name, value)] = neutral.items()
        assert options(**{name: kind(value)}) == options()
        with pytest.raises(ValueError, match=f"{name}=.* is not supported"):
            options(**{name: kind(2)})


def test_generation_config_objects(tiny):
    """The checkpoint's file, then the object or dictionary, then keywords; the last one wins."""
    plain = tiny.ours.generate(PROMPTS, do_sample=False, max_new_tokens=7)
    for config in (
        transformers.GenerationConfig(do_sample=False, max_new_tokens=7),
        {"do_sample": False, "max_new_tokens": 7},
        {"do_sample": False, "max_new_tokens": 7, "transformers_version": "5", "cache_implementation": None},
    ):
        assert tiny.ours.generate(PROMPTS, generation_config=config).equal(plain)
        assert tiny.ours.generate(PROMPTS, generation_config=config, max_new_tokens=3).equal(plain[:, :9])
    tiny.ours.generation_config = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": 2}
    try:
        assert tiny.ours.generate(PROMPTS).equal(plain[:, :9])
        assert tiny.ours.generate(PROMPTS, generation_config={"max_new_tokens": 5}).equal(plain[:, :11])
    finally:
        tiny.ours.generation_config = {}


OF_THE_CHECKPOINT: Any = {
    "max_new_tokens": 9, "min_new_tokens": 3, "min_length": 9, "eos_token_id": [2, 5, 18], "pad_token_id": 3,
    "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "bad_words_ids": [[33], [18]], "suppress_tokens": [40, 41],
    "begin_suppress_tokens": [1, 2, 3, 44], "sequence_bias": [[[3], 5.0]], "forced_eos_token_id": 2, "temperature": 0.3,
    "top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.7,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")  # transformers', without a length
@pytest.mark.parametrize("name", [*OF_THE_CHECKPOINT, "do_sample"])
def test_a_keyword_that_is_none_turns_a_setting_off(tiny, name):
    """It does not leave it to the checkpoint or to a GenerationConfig, as in transformers."""
    wants: Any = {"return_dict_in_generate": True, "output_scores": True, "attention_mask": torch.ones_like(PROMPTS)}
    for sampled in (False, True):
        config = transformers.GenerationConfig(**OF_THE_CHECKPOINT, do_sample=sampled)
        outs = []
        for model in (tiny.ours, tiny.theirs):
            kept = model.generation_config
            try:
                model.generation_config = config
                out = model.generate(PROMPTS, **wants, **{name: None})
            finally:
                model.generation_config = kept
            again = model.generate(PROMPTS, generation_config=config, **wants, **{name: None})
            assert again.scores[0].equal(out.scores[0])
            outs.append(out)
        ours, theirs = ([step.clamp(min=-1e30) for step in out.scores] for out in outs)
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-3, rtol=1e-3)
        if name == "do_sample" or not sampled:
            assert outs[0].sequences.equal(outs[1].sequences)


def test_top_k_none_is_not_transformers_default(tiny):
    for given, top_k in (({}, 50), ({"top_k": None}, 0), ({"top_k": 3}, 3)):
        options = read_options(tiny.ours.config, {}, None, {"do_sample": True, **given}, 1)
        assert options.params.top_k == top_k


def test_a_keyword_overrides_an_unsupported_setting_of_the_checkpoint(tiny):
    plain = tiny.ours.generate(PROMPTS, max_new_tokens=3)
    try:
        tiny.ours.generation_config = {"num_beams": 4}
        for own in (1, None):
            assert tiny.ours.generate(PROMPTS, max_new_tokens=3, num_beams=own).equal(plain)
    finally:
        tiny.ours.generation_config = {}


def test_a_generation_config_in_its_places(tiny):
    """By position, as transformers has it, and in the place of the model's own, where its entries are attributes."""
    plain = tiny.ours.generate(PROMPTS, do_sample=False, max_new_tokens=7)
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=7)
    assert tiny.ours.generate(PROMPTS, config).equal(plain)
    assert tiny.ours.generate(PROMPTS, {"max_new_tokens": 7}).equal(plain)
    with pytest.raises(TypeError, match="generation_config"):
        tiny.ours.generate(PROMPTS, 5)
    try:
        tiny.ours.generation_config = transformers.GenerationConfig(max_new_tokens=3, pad_token_id=40)
        assert (tiny.ours.generation_config.pad_token_id, tiny.ours.generation_config.top_k) == (40, None)
        assert plain[0, 6] == 2  # the end of text, and padding after it
        padding = (plain == 0).long()
        assert tiny.ours.generate(PROMPTS).equal((plain + 40 * padding)[:, :9])
        tiny.ours.generation_config.pad_token_id = 44
        tiny.ours.generation_config.max_new_tokens = 2
        assert tiny.ours.generate(PROMPTS).equal((plain + 44 * padding)[:, :8])
        for wants in ({"return_dict_in_generate": True, "output_scores": True}, {"return_dict_in_generate": True}):
            out = tiny.ours.generate(PROMPTS, transformers.GenerationConfig(**wants))
            assert (out.scores is not None) == ("output_scores" in wants)
    finally:
        tiny.ours.generation_config = {}


NEUTRAL: Any = {
    "num_beams": 1, "no_repeat_ngram_size": 0, "length_penalty": 1.0, "stopping_criteria": None, "use_cache": True,
    "early_stopping": False, "num_beam_groups": 1, "diversity_penalty": 0.0, "bad_words_ids": None, "penalty_alpha": 0,
    "suppress_tokens": [], "guidance_scale": 1.0, "encoder_repetition_penalty": 1, "output_attentions": False,
    "prefix_allowed_tokens_fn": None, "synced_gpus": False, "cache_implementation": None, "max_time": None,
    "renormalize_logits": False, "assistant_model": None, "bos_token_id": 1, "past_key_values": None,
    "position_ids": None, "epsilon_cutoff": 0.0, "return_dict_in_generate": False,
}  # fmt: skip


def test_neutral_values_are_accepted(tiny):
    plain = tiny.ours.generate(PROMPTS, do_sample=False, max_new_tokens=7)
    assert tiny.ours.generate(PROMPTS, do_sample=False, max_new_tokens=7, **NEUTRAL).equal(plain)
    for name, value in NEUTRAL.items():
        assert tiny.ours.generate(PROMPTS, max_new_tokens=7, **{name: value}).equal(plain), name


CHANGING = [
    {"num_beams": 4}, {"max_time": 1}, {"forced_bos_token_id": 2}, {"guidance_scale": 1.5}, {"epsilon_cutoff": 0.1},
    {"eta_cutoff": 0.1}, {"penalty_alpha": 0.6}, {"encoder_repetition_penalty": 1.1}, {"top_h": 0.5},
    {"token_healing": True}, {"num_beams": True},
]  # fmt: skip
IDLE = [{"use_cache": False}, {"early_stopping": True}, {"num_beam_groups": 2}, {"length_penalty": 2.0},
        {"cache_implementation": "static"}, {"low_memory": True}]  # fmt: skip


@pytest.mark.parametrize("setting", [*CHANGING, *IDLE], ids=str)
def test_what_is_not_supported_is_refused_by_name(tiny, setting):
    """From a keyword always; from a file or an object only where it would change the tokens."""
    [(name, value)] = setting.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not supported")):
        tiny.ours.generate(PROMPTS, **setting)
    plain = tiny.ours.generate(PROMPTS, max_new_tokens=2)
    as_object = SimpleNamespace(to_dict=lambda: setting)
    try:
        for given in (setting, as_object):
            tiny.ours.generation_config = given
            if setting in IDLE:
                assert tiny.ours.generate(PROMPTS, max_new_tokens=2).equal(plain)
                assert tiny.ours.generate(PROMPTS, given, max_new_tokens=2).equal(plain)
                continue
            with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not supported")):
                tiny.ours.generate(PROMPTS)
            tiny.ours.generation_config = {}
            with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not supported")):
                tiny.ours.generate(PROMPTS, given)
    finally:
        tiny.ours.generation_config = {}


def test_every_setting_of_transformers_is_known(tiny):
    """None of a GenerationConfig's attributes is a misspelling here, nor any argument of transformers' `generate`."""
    names = {*transformers.GenerationConfig().to_dict(), *inspect.signature(tiny.theirs.generate).parameters}
    for name in names - {"inputs", "self", "kwargs"}:
        if not name.startswith("_"):
            tiny.ours.generate(PROMPTS, **{"max_new_tokens": 1, name: None})


def test_keywords_of_forward(tiny):
    plain = tiny.ours(PROMPTS).logits
    for model in (tiny.ours, tiny.ours.model):
        neutral = {
            "output_attentions": False,
            "return_dict": True,
            "cache_position": None,
            "output_hidden_states": None,
        }
        out = model(PROMPTS, **neutral)
        assert out[0].shape[:2] == PROMPTS.shape and (model is tiny.ours.model or out.logits.equal(plain))
        with pytest.raises(ValueError, match="forward: output_attentions=True is not supported"):
            model(PROMPTS, output_attentions=True)
        with pytest.raises(TypeError, match="forward: unknown keyword 'atention_mask'; did you mean 'attention_mask'"):
            model(PROMPTS, atention_mask=torch.ones_like(PROMPTS))
    with pytest.raises(ValueError, match=r"assistant_model=\w+ForCausalLM\(.{,60} \.\.\. is not supported"):
        tiny.ours.generate(PROMPTS, assistant_model=tiny.theirs)


def test_outputs_are_read_as_transformers_are(tiny):
    for options in ({}, {"labels": PROMPTS}, {"output_hidden_states": True, "use_cache": False}):
        ours, theirs = tiny.ours(PROMPTS, **options), tiny.theirs(PROMPTS, **options)
        assert list(ours) == list(theirs.keys()) and len(ours) == len(theirs)
        for index, name in enumerate(theirs.keys()):
            assert ours[name] is ours[index] is ours.to_tuple()[index] is getattr(ours, name)
        assert torch.allclose(ours[0], theirs[0], atol=1e-4)
        assert [name for name, _ in ours.items()] == list(dict(**ours)) == list(ours) == list(ours.keys())
        for name in (*theirs.keys(), "loss", "attentions", "hidden_states", 0):
            assert (name in ours) == (name in theirs) == (ours.get(name) is not None)
            assert ours.get(name, "none") is (ours[name] if name in theirs else "none")
        assert [*ours.values()] == [*ours.to_tuple()] and ours == ours and ours.keys() & {"loss", "x"} <= {"loss"}
    with pytest.raises(KeyError, match="CausalLMOutput has logits, past_key_values, and no 'loss'"):
        tiny.ours(PROMPTS)["loss"]
    wants = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 2, "do_sample": False}
    ours, theirs = tiny.ours.generate(PROMPTS, **wants), tiny.theirs.generate(PROMPTS, **wants)
    assert ours[0].equal(theirs[0]) and torch.allclose(ours[1][0], theirs[1][0], atol=1e-4)
    assert list(ours) == ["sequences", "scores", "logprobs"]


@pytest.mark.parametrize("settings", [{"min_length": 30}, {"min_new_tokens": 12}], ids=str)
def test_a_length_that_a_short_call_cannot_meet(tiny, settings):
    """The checkpoint asks for more tokens than the call makes: transformers warns, and answers without an end."""
    both = []
    for model in (tiny.ours, tiny.theirs):
        kept = model.generation_config
        try:
            model.generation_config = transformers.GenerationConfig(eos_token_id=[2, 5], pad_token_id=0, **settings)
            with pytest.warns(UserWarning, match="min_new_tokens|min_length"):
                both.append(model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_new_tokens=7))
        finally:
            model.generation_config = kept
    assert both[0].equal(both[1])
    with pytest.warns(UserWarning, match="min_new_tokens"):  # the maximum is the default, 20
        assert tiny.ours.generate(PROMPTS, min_new_tokens=21).shape[1] == PROMPTS.shape[1] + 20


def test_a_misspelt_key_in_a_dictionary(tiny):
    message = "generation_config: unknown keyword 'max_new_token'; did you mean 'max_new_tokens'"
    with pytest.raises(TypeError, match=message):
        tiny.ours.generate(PROMPTS, {"max_new_token": 5})
    with pytest.raises(TypeError, match=message):
        tiny.ours.generation_config = {"max_new_token": 5}
    full = transformers.GenerationConfig(max_new_tokens=3).to_dict()
    assert tiny.ours.generate(PROMPTS, full).shape[1] == PROMPTS.shape[1] + 3
    own = SimpleNamespace(to_dict=lambda: {"max_new_tokens": 3, "of_another_model": 5})
    assert tiny.ours.generate(PROMPTS, own).shape[1] == PROMPTS.shape[1] + 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": PROMPTS.tolist()},
        {"input_ids": PROMPTS.numpy()},
        {"inputs_embeds": np.zeros((1, 2, 64), dtype=np.float32)},
        {"input_ids": PROMPTS, "attention_mask": np.ones(PROMPTS.shape, dtype=np.int64)},
        {"input_ids": PROMPTS, "position_ids": [*range(6)]},
        {"input_ids": PROMPTS, "past_key_values": ((PROMPTS, PROMPTS),)},
        {"input_ids": PROMPTS, "labels": PROMPTS.tolist()},
        {"input_ids": PROMPTS, "logits_to_keep": [0, 1]},
        {"input_ids": PROMPTS, "logits_to_keep": True},
    ],
    ids=lambda arguments: [*arguments][-1],
)
def test_forward_takes_tensors(tiny, arguments):
    """Anything else is a TypeError that names the argument, in both models that have it."""
    name = [*arguments][-1]
    for model in (tiny.ours, tiny.ours.model) if name not in ("labels", "logits_to_keep") else (tiny.ours,):
        with pytest.raises(TypeError, match=f"forward: {name} must be"):
            model(**arguments)
    for model, last in ((tiny.ours, "logits_to_keep"), (tiny.ours.model, "output_hidden_states")):
        with pytest.raises(TypeError, match=f"unknown keyword 'images'; known are input_ids, .*, {last}$"):
            model(PROMPTS, images=1)
    two = tiny.ours(PROMPTS, logits_to_keep=2).logits
    for number in (np.int64(2), torch.tensor(2)):
        assert tiny.ours(PROMPTS, logits_to_keep=number).logits.equal(two)


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "plain": torch.enable_grad}


def continued(model, mask, more, first, then):
    """The last logits of a prompt and what goes on after it, each in a mode of its own."""
    mask = None if mask is None else torch.cat((mask, torch.ones_like(more)), 1)
    with MODES[first]():
        out = model(PROMPTS, None if mask is None else mask[:, : PROMPTS.shape[1]])
    with MODES[then]():
        out = model(more[:, :-1], None if mask is None else mask[:, :-1], past_key_values=out.past_key_values)
    with MODES[first]():
        return model(more[:, -1:], mask, past_key_values=out.past_key_values).logits


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("then", MODES)
def test_a_cache_goes_on_in_any_mode(tiny, first, then):
    """Made in one, continued and made larger in another, with padding and without."""
    more = torch.randint(50, (len(PROMPTS), 70))  # to another page
    for mask in (None, torch.tensor([[0] * 2 + [1] * 4] + [[1] * 6] * (len(PROMPTS) - 1))):
        expected = continued(tiny.ours, mask, more, "no_grad", "no_grad")
        assert continued(tiny.ours, mask, more, first, then).equal(expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_token": 5}, TypeError, "'max_new_token'; did you mean 'max_new_tokens'"),
        ({"temprature": 5}, TypeError, "'temprature'; did you mean 'temperature'"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": -3}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": "5"}, ValueError, "max_new_tokens"),
        ({"max_length": 6}, ValueError, "max_length"),
        ({"max_length": 3}, ValueError, "max_length"),
        ({"max_length": "9"}, ValueError, "max_length"),
        ({"min_new_tokens": -1}, ValueError, "min_new_tokens|min_tokens"),
        ({"min_length": "9"}, ValueError, "min_length"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, ValueError, "min_new_tokens|min_tokens"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature"),
        ({"do_sample": True, "temperature": -1.0}, ValueError, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, ValueError, "top_p"),
        ({"do_sample": True, "top_k": -2}, ValueError, "top_k"),
        ({"do_sample": True, "min_p": 2.0}, ValueError, "min_p"),
        ({"do_sample": "yes"}, ValueError, "do_sample"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty"),
        ({"num_return_sequences": 2, "do_sample": False}, ValueError, "num_return_sequences is 2, and greedy"),
        ({"num_return_sequences": 0}, ValueError, "^num_return_sequences must be .*got 0"),
        ({"num_beams": 4}, ValueError, "num_beams"),
        ({"use_cache": False}, ValueError, "use_cache"),
        ({"logit_bias": {50: 1.0}}, ValueError, "logit_bias"),
        ({"eos_token_id": 50, "min_new_tokens": 2}, ValueError, "eos_token_id"),
        ({"eos_token_id": "</s>"}, ValueError, "eos_token_id"),
        ({"eos_token_id": [2, -7]}, ValueError, "eos_token_id"),
        ({"pad_token_id": "0"}, ValueError, "pad_token_id"),
        ({"pad_token_id": 50}, ValueError, "pad_token_id"),
        ({"input_ids": None}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(1, 3)}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "input_ids"),
        ({"input_ids": [[1, 2]]}, (TypeError, ValueError), "input_ids"),
        ({"input_ids": torch.tensor([[1, 50]])}, ValueError, "50, which is outside the vocabulary of 50"),
        ({"input_ids": torch.tensor([[1, -1]])}, ValueError, "-1, which is outside the vocabulary of 50"),
        ({"attention_mask": torch.zeros(1, 6)}, ValueError, "row 0 of input_ids is empty"),
        ({"attention_mask": torch.ones(1, 5)}, ValueError, "attention_mask"),
        ({"inputs": PROMPTS}, ValueError, "inputs"),
        *(
            ({"attention_mask": mask}, TypeError, "attention_mask must be a tensor .*generation_config")
            for mask in (PROMPTS.tolist(), PROMPTS.numpy(), [], False)
        ),
        ({"attention_mask": {}, "generation_config": {}}, TypeError, "attention_mask must be a tensor .*given once"),
        ({"generation_config": 5}, TypeError, "generation_config"),
        ({"generation_config": torch.ones(2)}, TypeError, "generation_config"),
        ({"generation_config": {3: 1}}, TypeError, "generation_config: unknown keyword '3'"),
        ({"streamer": True}, TypeError, r"streamer must be an object with put\(ids\) and end\(\); it is True"),
        ({"stopping_criteria": torch.ones(2)}, TypeError, "stopping_criteria must be a callable"),
        ({"prefix_allowed_tokens_fn": False}, TypeError, "prefix_allowed_tokens_fn must be a callable"),
        ({"logits_processor": 5}, (TypeError, ValueError), "logits_processor"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(tiny, options, error, message):
    """One error that names the argument, before anything is generated."""
    step: list = []
    with pytest.raises(error, match=message):
        tiny.ours.generate(
            **{"input_ids": PROMPTS[:1], "streamer": SimpleNamespace(put=step.append, end=print), **options}
        )
    assert not step


def test_settings_without_effect_are_warned_of(tiny):
    with pytest.warns(UserWarning, match="no effect, since decoding is greedy .*: temperature, top_p$"):
        tiny.ours.generate(PROMPTS[:1], temperature=0.5, top_p=0.9, max_new_tokens=1)
