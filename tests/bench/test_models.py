"""bench.models: the shapes of models are those that were published."""

import pytest
import torch

from bench import models
from bench.models import MODELS
from bench.parts.bare_step import config_of, random_model
from internlm3 import InternLM3ForCausalLM

# Parameters of the published checkpoints, as the hub counts them; InternLM3-8B's are counted from its config.json.
PUBLISHED = {"internlm3-8b": 8_804_241_408, "llama-3.1-8b": 8_030_261_248, "qwen3-8b": 8_190_735_360}
LEFT_OUT = {"qwen3-8b": 36 * 2 * 128}  # the weights of each layer's two norms of heads


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_as_many_parameters_as_the_published_one(name):
    model = InternLM3ForCausalLM(config_of(name), device="meta", dtype=torch.bfloat16)
    assert sum(x.numel() for x in model.parameters()) == PUBLISHED[name] - LEFT_OUT.get(name, 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_dry_run_has_a_toy_with_the_rotary_embedding_of_the_model(name):
    toy, config = random_model(True, name).config, config_of(name)
    assert (toy.rope_theta, toy.rope_scaling) == (config.rope_theta, config.rope_scaling)
    assert toy.hidden_size < 100 and toy.vocab_size < 1000


def test_a_record_without_shapes_is_of_internlm3():
    assert models.shapes_of({}) == models.shapes("internlm3-8b")
    assert models.shapes_of({"shapes": models.shapes("qwen3-8b")})["of"].startswith("Qwen3-8B without its norms")
