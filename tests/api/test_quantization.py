"""LLM with quantised weights: as the checkpoint is, or quantised on load."""

import pytest
import torch
from torch import Tensor

from internlm3 import LLM
from internlm3.runtime.checkpoint.quantise.checkpoint import quantise_checkpoint
from internlm3.runtime.checkpoint.quantise.rounding import to_integers
from internlm3.runtime.model.quantised_linear import QuantisedLinear
from internlm3.tests.support.checkpoints import change
from internlm3.tests.support.llm import PROMPTS, result, same


def quantised_layers(llm):
    return {path: layer for path, layer in llm.model.named_modules() if isinstance(layer, QuantisedLinear)}


def dequantised(llm, plain):
    """`plain` with the numbers of `llm`'s weights, in the model's dtype."""
    for path, layer in quantised_layers(llm).items():
        plain.model.get_submodule(path).weight.data.copy_(layer.weight.dense())
    return plain


@pytest.mark.parametrize("form", ["int4", "int8", "fp8"])
def test_answers_are_those_of_the_dequantised_weights(demo_model, form):
    """On the demo model in float32: greedy and sampled text, log-probabilities, prompts of one row and of many."""
    options = {"dtype": "float32", "device": "cpu", "progress": False, "max_seq_len": 256}
    llm = LLM(demo_model, quantization=form, **options)
    plain = dequantised(llm, LLM(demo_model, **options))
    assert len(quantised_layers(llm)) == 4 * llm.config.num_hidden_layers + 1
    for params in ({"temperature": 0}, {"temperature": 1, "seed": 5, "top_p": 0.9}):
        outputs, expected = (each.generate(PROMPTS[:3], max_tokens=8, logprobs=1, **params) for each in (llm, plain))
        assert same(outputs, expected)


@pytest.mark.parametrize("form", ["int4", "int8", "fp8"])
def test_memory(make, form):
    """Of the projections and the head: the integers, and a scale of 32 bits for each group or output."""
    folder = make(hidden_size=256, intermediate_size=320, num_attention_heads=4, head_dim=64)
    llm, plain = (LLM(folder, quantization=wanted, progress=False) for wanted in (form, None))
    layers = quantised_layers(llm)
    assert len(layers) == 4 * 2 + 1
    for path, layer in layers.items():
        outputs, inputs = plain.model.get_submodule(path).weight.shape
        own, group = (8, inputs) if path == "lm_head" or form != "int4" else (4, 128 if inputs % 128 == 0 else 64)
        size = sum(tensor.numel() * tensor.itemsize for tensor in layer.parameters())
        assert size * 8 == outputs * inputs * own + 32 * outputs * inputs // group
    assert layers["lm_head"].weight.form.kind == "int8"


def test_numbers_are_the_nearest(make):
    """What is in memory is what `to_integers` says of the checkpoint's weights, for each projection of a stack."""
    folder = make(hidden_size=128, intermediate_size=256, num_attention_heads=4)
    llm, plain = (LLM(folder, quantization=form, progress=False) for form in ("int4", None))
    for name, weight in plain.model.state_dict().items():
        if name.endswith("q_proj.weight"):
            expected = to_integers(name, weight, torch.bfloat16, "int4", 128, False).weight()
            found = quantised_layers(llm)[name.replace("q_proj.weight", "qkv_proj")].weight.dense()
            assert torch.equal(found[: len(expected)], expected)


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_head_stays_as_it_is(make, stored):
    """Under whichever of its names a checkpoint stores it."""
    folder = make(tie_word_embeddings=True)
    change(folder / "model.safetensors", lambda x: x.update({stored: x.pop("model.embed_tokens.weight")}))
    llm, plain = (LLM(folder, quantization=form, progress=False) for form in ("int8", None))
    assert "lm_head" not in quantised_layers(llm) and len(quantised_layers(llm)) == 4 * 2
    assert llm.model.lm_head.weight is llm.model.model.embed_tokens.weight
    assert torch.equal(llm.model.lm_head.weight, plain.model.lm_head.weight)


def test_a_batch_and_one_by_one(make):
    """On a CPU a row has the same bits alone and in a batch."""
    llm = LLM(make(), quantization="int8", progress=False)
    together = llm.generate(PROMPTS, max_tokens=12, temperature=0, logprobs=1)
    alone = [llm.generate(prompt, max_tokens=12, temperature=0, logprobs=1) for prompt in PROMPTS]
    assert [result(output) for output in together] == [result(output) for output in alone]


def test_a_change_of_a_weight_is_seen(make):
    """Answers after a write into a quantised weight are not those of cached keys and values."""
    llm = LLM(make(), quantization="int4", progress=False)
    before = llm.generate(PROMPTS[0], max_tokens=8, temperature=0)
    (layer, *_) = quantised_layers(llm).values()
    layer.scales.copy_(torch.zeros_like(layer.scales))
    assert llm.generate(PROMPTS[0], max_tokens=8, temperature=0).outputs[0].token_ids != before.outputs[0].token_ids


@pytest.mark.parametrize(
    ("quantization", "error", "message"),
    [
        ("awq", ValueError, "quantization 'awq': .* is not quantised. What a checkpoint is needs no switch; 'int4'"),
        ("int5", ValueError, "quantization 'int5': .* is not quantised"),
        (4, TypeError, "quantization must be a string, not 4"),
    ],
)
def test_a_wrong_quantization_is_named(tiny_folder, quantization, error, message):
    with pytest.raises(error, match=message):
        LLM(tiny_folder, quantization=quantization, progress=False)


def test_what_a_quantised_checkpoint_is_may_be_said(make, tmp_path):
    quantise_checkpoint(make(), tmp_path / "out", "int8", progress=False)
    kept = LLM(tmp_path / "out", progress=False)
    said = LLM(tmp_path / "out", quantization="compressed-tensors", progress=False)
    assert len(quantised_layers(kept)) == len(quantised_layers(said)) == 4 * 2 + 1
    with pytest.raises(ValueError, match=r"out is quantised already \(compressed-tensors, .*leave quantization away"):
        LLM(tmp_path / "out", quantization="int4", progress=False)
    with pytest.raises(ValueError, match=r"quantization 'awq': .*out is 'compressed-tensors'. What a checkpoint is"):
        LLM(tmp_path / "out", quantization="awq", progress=False)


def test_a_layer_that_4_bits_cannot_hold(make, tmp_path):
    folder = make(hidden_size=40, head_dim=10)
    message = f"^{folder}: .*has 40 inputs, and no group of 4-bit weights that divides them: use 8 bits"
    with pytest.raises(ValueError, match=message):
        LLM(folder, quantization="int4", progress=False)
    with pytest.raises(ValueError, match=message):
        quantise_checkpoint(folder, tmp_path / "out", "int4", progress=False)


def test_a_weight_that_is_no_number(make, tmp_path):
    folder = make()
    change(
        folder / "model.safetensors", lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3].fill_(torch.inf)
    )
    message = f"^{folder / 'model.safetensors'}: 'model.layers.1.mlp.up_proj.weight' contains inf or NaN"
    with pytest.raises(ValueError, match=message):
        LLM(folder, quantization="int8", progress=False)
    for ids in (None, [1, 5, 9]):
        with pytest.raises(ValueError, match=message):
            quantise_checkpoint(folder, tmp_path / "out", "int4", calibration=ids, progress=False)


def test_integers_stay_when_the_dtype_changes(make):
    """Tensors of a quantised layer are integers, so `.to(dtype)` converts the others only."""
    llm = LLM(make(), quantization="int8", progress=False)
    before = {path: [x.clone() for x in layer.parameters()] for path, layer in quantised_layers(llm).items()}
    llm.model.to(torch.float16)
    for path, layer in quantised_layers(llm).items():
        kept: list[Tensor] = list(layer.parameters())
        assert all(torch.equal(one, other) for one, other in zip(before[path], kept, strict=True))
