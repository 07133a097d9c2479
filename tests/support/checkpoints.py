"""Small checkpoints for tests: made, saved, loaded and damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm3 import InternLM3Config, InternLM3ForCausalLM

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 2,
}
IDS = torch.tensor([[1, 5, 9, 33, 63, 0, 12]])
INDEX = "model.safetensors.index.json"


def make(seed=0, dtype=torch.float32, **shape):
    """A random model."""
    torch.manual_seed(seed)
    return InternLM3ForCausalLM(InternLM3Config(**{**SHAPE, "initializer_range": 0.3, **shape}), dtype=dtype).eval()


def load(folder, **options):
    return InternLM3ForCausalLM.from_pretrained(folder, **{"device": "cpu", "progress": False, **options})


def same(one, two):
    """Whether two models have the same weights under the same names."""
    ours, theirs = one.state_dict(), two.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def holder(folder, name):
    """The shard that contains a tensor."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def shards_to_bin(folder):
    """Rewrites safetensors shards and their index as pickled ones."""
    for path in shards(folder):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: file.replace("safetensors", "bin") for name, file in index["weight_map"].items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / INDEX).unlink()


def change(path, edit):
    """Applies `edit` to the content of a JSON or safetensors file."""
    content = json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
    edit(content)
    path.write_text(json.dumps(content)) if path.suffix == ".json" else save_file(content, path)


def refused(folder, error, *words, **options):
    """The message of the error that loading raises. It must contain all `words`."""
    with pytest.raises(error) as caught:
        load(folder, **options)
    for word in words:
        assert str(word) in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def contents(folder):
    """The content of all files, by path."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# How a checkpoint is divided into files: max_shard_size by name.
LIMITS = {"one file": "5GB", "shards": 20000, "more shards": 15000}


def distinct(seed):
    """A model with weights, configuration and settings of its own."""
    model = make(seed, rope_theta=1000.0 + seed)
    model.generation_config = {"eos_token_id": [2, seed]}
    return model


def is_whole(model, folder):
    """Whether the folder contains exactly this model, with its configuration and settings."""
    again = load(folder)
    return same(model, again) and (again.config, again.generation_config) == (model.config, model.generation_config)
