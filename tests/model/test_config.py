"""InternLM3Config: keys, defaults, both spellings of rotary settings, and what is refused."""

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
import transformers

from internlm3 import InternLM3Config

PUBLISHED = {
    "architectures": ["InternLM3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm3.InternLM3Config",
        "AutoModel": "modeling_internlm3.InternLM3Model",
        "AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM",
    },
    "model_type": "internlm3",
    "vocab_size": 128512,
    "hidden_size": 4096,
    "intermediate_size": 10240,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000000,
    "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
    "max_position_embeddings": 32768,
    "qkv_bias": False,
    "bias": False,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.1",
}
REWRITTEN = ("architectures", "auto_map", "transformers_version")  # not settings of the model


def read(tmp_path, content, **overrides):
    (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return InternLM3Config.from_pretrained(tmp_path, **overrides)


def test_defaults_are_those_of_the_published_class():
    config = InternLM3Config()
    expected = {
        "vocab_size": 128512, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "qkv_bias": False, "attention_dropout": 0.0,
        "bias": False, "head_dim": 128, "tie_word_embeddings": False, "use_cache": True, "initializer_range": 0.02,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    assert InternLM3Config(num_key_value_heads=None, num_attention_heads=16).num_key_value_heads == 16
    assert InternLM3Config(hidden_size=512, num_attention_heads=8, num_key_value_heads=8).head_dim == 64


def test_the_published_config(tmp_path):
    config = read(tmp_path, PUBLISHED)
    for key in PUBLISHED.keys() - {*REWRITTEN, "torch_dtype"}:
        assert getattr(config, key) == PUBLISHED[key], key
    assert config.dtype == "bfloat16"
    assert config.rope_parameters == {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 50000000}
    written = config.to_dict()
    assert {key: written[key] for key in PUBLISHED if key not in REWRITTEN} == {
        key: value for key, value in PUBLISHED.items() if key not in REWRITTEN
    }


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"eos_token_id": [2, 128131]},
        {"torch_dtype": None, "pad_token_id": None},
        {"something_new": {"nested": [1, None, "书"]}},
    ],
    ids=str,
)
def test_round_trip(tmp_path, change):
    config = read(tmp_path, {**PUBLISHED, **change})
    config.save_pretrained(tmp_path / "deep" / "again")
    again = InternLM3Config.from_pretrained(tmp_path / "deep" / "again")
    assert again == config and again.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "deep" / "again" / "config.json").read_text())["model_type"] == "internlm3"
    for twin in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        InternLM3Config.from_dict(config.to_dict()),
    ):
        assert twin == config
    for key in change.keys() - {"torch_dtype", "rope_scaling"}:
        assert getattr(again, key) == change[key]


@pytest.mark.parametrize(
    ("given", "scaling", "theta"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("dynamic", 2.0), 10000.0),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}, "rope_theta": 7.0}, ("dynamic", 2), 7.0),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 9.0}}, ("dynamic", 3.0), 9.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, None, 9.0),
        ({"rope_parameters": {"rope_theta": 9.0}}, None, 9.0),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}, "rope_theta": 8.0}, ("dynamic", 3.0), 8.0),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 8.0}, None, 8.0),
        ({"rope_scaling": None}, None, 10000.0),
    ],
    ids=str,
)
def test_rotary_settings_old_and_new(given, scaling, theta):
    parameters = InternLM3Config(**given).rope_parameters
    assert parameters["rope_theta"] == theta
    assert (parameters["rope_type"], parameters.get("factor")) == (scaling or ("default", None))


@pytest.mark.parametrize(
    "given",
    [
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
         "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 9.0}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 9.0}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 7.0, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 9.0}},
        {"attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "bias": True, "attention_bias": True, "mlp_bias": True},
    ],
    ids=str,
)  # fmt: skip
def test_newer_names_mean_what_they_mean_to_transformers(given):
    config: Any = InternLM3Config(**given)
    expected: Any = transformers.InternLM3Config(**given)
    assert (config.qkv_bias, config.bias) == (expected.qkv_bias, expected.bias)
    if "rope_scaling" in given and "rope_parameters" in given:
        expected.rope_parameters["rope_theta"] = 9.0  # transformers drops this one with the whole of rope_parameters
    shared = config.rope_parameters.keys() & expected.rope_parameters.keys()
    assert shared >= {"rope_type", "rope_theta"}
    assert {key: config.rope_parameters[key] for key in shared} == {k: expected.rope_parameters[k] for k in shared}


def test_a_pad_of_minus_one_is_none(tmp_path):
    assert read(tmp_path, {**PUBLISHED, "pad_token_id": -1}).pad_token_id is None


@pytest.mark.parametrize("change", [{}, {"rope_scaling": None}, {"tie_word_embeddings": True}], ids=str)
def test_transformers_reads_what_is_saved_and_the_reverse(tmp_path, change):
    config = InternLM3Config.from_dict({**PUBLISHED, **change})
    config.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(theirs) is transformers.InternLM3Config
    theirs.save_pretrained(tmp_path / "theirs")
    again = InternLM3Config.from_pretrained(tmp_path / "theirs")
    for key in PUBLISHED.keys() - {*REWRITTEN, "torch_dtype", "rope_theta", "rope_scaling"}:
        assert getattr(theirs, key) == getattr(again, key) == getattr(config, key), key
    shared = again.rope_parameters.keys() & config.rope_parameters.keys()
    assert shared >= {"rope_type", "rope_theta"}
    assert {key: again.rope_parameters[key] for key in shared} == config.rope_parameters
    assert again.dtype == config.dtype == "bfloat16"


def test_dtype_forms():
    for given in ("bfloat16", torch.bfloat16, "torch.bfloat16"):
        assert InternLM3Config(dtype=given).dtype == InternLM3Config(torch_dtype=given).dtype == "bfloat16"
    assert InternLM3Config().dtype is None


def test_eos_token_ids():
    assert InternLM3Config().eos_token_ids == [2]
    assert InternLM3Config(eos_token_id=[2, 5]).eos_token_ids == [2, 5]
    assert InternLM3Config(eos_token_id=None).eos_token_ids == []


def test_overrides(tmp_path):
    assert read(tmp_path, PUBLISHED, rope_theta=7.0).rope_theta == 7.0
    assert read(tmp_path, PUBLISHED, trust_remote_code=True) == read(tmp_path, PUBLISHED)
    newer = {key: value for key, value in PUBLISHED.items() if key not in ("rope_scaling", "rope_theta", "qkv_bias")}
    newer |= {"rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 5e7}, "attention_bias": False}
    for source in (PUBLISHED, newer):
        theta = read(tmp_path, source, rope_theta=7.0)
        assert theta.rope_parameters == {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 7.0}
        assert read(tmp_path, source, rope_scaling=None).rope_scaling is None
        assert read(tmp_path, source, rope_parameters={"rope_type": "default", "rope_theta": 3.0}).rope_theta == 3.0
        assert read(tmp_path, source, qkv_bias=True).qkv_bias and read(tmp_path, source, attention_bias=True).qkv_bias
    with pytest.raises(TypeError, match="'rope_teta'; did you mean 'rope_theta'"):
        read(tmp_path, PUBLISHED, rope_teta=7.0)
    with pytest.raises(ValueError, match=r"config\.json: rope_theta"):
        read(tmp_path, PUBLISHED, rope_theta=-7.0)


def test_unknown_keys_are_kept_and_misspelt_ones_missed(tmp_path):
    config = read(tmp_path, {**PUBLISHED, "note": "kept"})
    assert config.note == "kept"
    with pytest.raises(AttributeError, match="hidden_sise"):
        config.hidden_sise  # noqa: B018 - reading it is the test


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(
            ({key: bad}, [key, repr(bad)])
            for key in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position_embeddings",
            )
            for bad in (0, -1, 1.5, "4096", [1])
        ),
        *(({key: bad}, [key]) for key in ("rms_norm_eps", "rope_theta") for bad in (0, -1, "x", None, math.inf)),
        *(({key: bad}, [key]) for key in ("qkv_bias", "bias", "tie_word_embeddings") for bad in ("false", 1, None)),
        *(({"attention_bias": bad}, ["qkv_bias"]) for bad in ("false", 1)),
        ({"qkv_bias": False, "attention_bias": True}, ["qkv_bias is False", "attention_bias", "True"]),
        ({"bias": True, "mlp_bias": False}, ["bias is True", "mlp_bias", "False"]),
        *(
            ({"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}, "rope_parameters": other},
             ["rope_scaling ({'rope_type': 'dynamic'", f"rope_parameters ({other!r})", "disagree"])
            for other in ({"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "default", "rope_theta": 9.0}, {},
                          {"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0})
        ),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "yarn"}}, ["disagree"]),
        ({"rope_scaling": None, "rope_parameters": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear"]),
        *(
            ({key: bad}, [key, "128512"])
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            for bad in (-2, 128512, "2", 1.0, True, [2, -5])
        ),
        ({"eos_token_id": -1}, ["eos_token_id", "-1"]),
        *(({key: bad}, [key, str(bad)]) for key in ("vocab_size", "num_hidden_layers") for bad in (2**63, 10**30)),
        ({"num_attention_heads": 2**20, "num_key_value_heads": 2, "head_dim": 2**20}, ["head_dim", str(2**20)]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"hidden_size": 4100, "head_dim": None}, ["hidden_size", "4100", "num_attention_heads", "32"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "num_attention_heads"]),
        ({"num_key_value_heads": 64}, ["num_key_value_heads", "64"]),
        *(({"head_dim": bad}, ["head_dim", repr(bad)]) for bad in (0, -2, 127, 2, 64.0, "64")),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_scaling", "yarn", "dynamic"]),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ["rope_scaling", "linear"]),
        ({"rope_scaling": {"factor": 4.0}}, ["rope_scaling", "rope_type"]),
        ({"rope_scaling": {"rope_type": ["dynamic"], "factor": 2.0}}, ["rope_scaling"]),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["llama3"]),
        *(
            ({"rope_scaling": {"rope_type": "dynamic", "factor": bad}}, ["rope_scaling", "factor"])
            for bad in (None, 0.5, -6, "6", math.nan, math.inf)
        ),
        ({"rope_scaling": {"rope_type": "dynamic"}}, ["factor"]),
        *(({"rope_scaling": bad}, ["rope_scaling"]) for bad in ("dynamic", [1], 6.0, True)),
        ({"rope_parameters": "dynamic"}, ["rope_parameters"]),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ["model_type", "llama", "LlamaForCausalLM"]),
        ({"model_type": None}, ["model_type"]),
        ({"sliding_window": 4096}, ["sliding_window"]),
        *(
            ({"rope_scaling": None, **change}, ["partial_rotary_factor", "0.5", "does not implement"])
            for change in (
                {"partial_rotary_factor": 0.5},
                {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5}},
                {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_refused(tmp_path, change, words):
    """One ValueError that names the file, the key and the value."""
    with pytest.raises(ValueError) as caught:
        read(tmp_path, {**PUBLISHED, **change})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    for word in words:  # the folder is named after the test, and so after the key: it does not count
        assert word in message.replace(str(tmp_path), "")


DEEP = ["[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"]


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "null", "\x00", '{"a": 1,}', *DEEP], ids=lambda c: c[:9])
def test_malformed_file(tmp_path, content):
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_file_that_is_no_utf8(tmp_path):
    (tmp_path / "config.json").write_bytes('{"a": "书"}'.encode("gbk"))
    with pytest.raises(ValueError, match=r"config\.json is not UTF-8 text"):
        InternLM3Config.from_pretrained(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        InternLM3Config.from_pretrained(tmp_path)


def test_switches_that_are_off_are_harmless(tmp_path):
    read(tmp_path, {**PUBLISHED, "sliding_window": None, "quantization_config": None})
