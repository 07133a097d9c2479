"""bench.models: the shapes of models are those that were published."""

import pytest
import torch

from bench import models
from bench.models import MODELS
from bench.parts.bare_step import Steps, config_of, on_ops, random_model
from internlm3 import InternLM3ForCausalLM, SamplingParams, kernels
from internlm3.runtime.engine.engine import Engine
from internlm3.runtime.engine.request import Request

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


@pytest.mark.parametrize("batch", [1, 8, 9])
def test_the_steps_of_the_parts_run_the_ops_of_the_engines_steps(batch):
    """The engine's on a GPU, where it speculates, at the same batch size."""
    model, ops, called = random_model(True), kernels.for_device(torch.device("cpu")), []

    class Listed:
        def __getattr__(self, name):
            op = getattr(ops, name)
            return (lambda *a, **k: (called.append(name), op(*a, **k))[1]) if name in kernels.__all__ else op

    with on_ops(Listed()):
        steps = Steps(model, batch, 70)
        steps.set_context(64)
        steps.step()
        ours = called.copy()
        engine = Engine(model, max_batch_size=batch, max_seq_len=70, speculation=True)
        engine.add([Request([5, 6, 7 + i], SamplingParams(temperature=0.9), 4) for i in range(batch)])
        while engine.busy:
            engine.step()
    assert called[-len(ours) :] == ours and ours[-1] == ("draft" if batch <= 8 else "advance")


def test_a_record_without_shapes_is_of_internlm3():
    assert models.shapes_of({}) == models.shapes("internlm3-8b")
    assert models.shapes_of({"shapes": models.shapes("qwen3-8b")})["of"].startswith("Qwen3-8B without its norms")
