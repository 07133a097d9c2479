"""The inputs of linear layers against hooks on transformers' model; scaling against the product that it must keep."""

import pytest
import torch

from internlm3.runtime.checkpoint.quantise import calibration as module
from internlm3.runtime.checkpoint.quantise.activation_scaling import scale
from internlm3.runtime.checkpoint.quantise.calibration import Calibration, Inputs, shipped_text
from internlm3.runtime.checkpoint.quantise.rounding import to_integers
from internlm3.tests.support.checkpoints import make
from internlm3.tests.support.quantised import SHAPE

CPU = torch.device("cpu")


def blocks(model):
    """The parameters of each block by their names in it."""
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        state = model.state_dict().items()
        yield {name.removeprefix(prefix): weight.clone() for name, weight in state if name.startswith(prefix)}


def rounding(name, weight):
    return to_integers(name, weight, torch.bfloat16, "int4", 32, False).weight()


@pytest.mark.parametrize("bias", [False, True])
def test_inputs_are_those_of_transformers(tmp_path, monkeypatch, bias):
    transformers = pytest.importorskip("transformers", "5.23")
    monkeypatch.setattr(module, "WINDOW", 9)
    model = make(3, **{**SHAPE, "num_hidden_layers": 2, "qkv_bias": bias, "bias": bias})
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    recorded = {}

    def record(name):
        def hook(_module, inputs):
            recorded.setdefault(name, []).append(inputs[0][0])

        return hook

    for name, each in theirs.named_modules():
        if name.endswith(("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")):
            each.register_forward_pre_hook(record(name))
    ids = torch.randint(3, 64, (21,))
    with torch.no_grad():
        for window in ids.split(9):
            theirs(window[None])
    text = Calibration(model.config, model.state_dict()["model.embed_tokens.weight"][ids], CPU)
    for layer, block in enumerate(blocks(model)):
        found = text.run(block)
        for kind, names in (
            ("attention", ["self_attn.q_proj", "self_attn.v_proj"]),
            ("mlp", ["mlp.gate_proj", "mlp.up_proj"]),
            ("down", ["mlp.down_proj"]),
        ):
            for name in names:
                expected = torch.cat(recorded[f"model.layers.{layer}.{name}"])
                torch.testing.assert_close(getattr(found, kind), expected, rtol=1e-4, atol=1e-4)


def uneven(rows, size, seed):
    """Inputs of which some channels are much larger than others, and one is 0."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(2 * torch.randn(size, generator=generator))
    spread[3] = 0
    return torch.randn(rows, size, generator=generator) * spread


@pytest.mark.parametrize("rows", [16, 300])  # fewer and more than the channels
def test_scaling_keeps_the_products_and_makes_the_error_less(rows):
    model = make(1, **SHAPE, bias=True)
    (before,) = blocks(model)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        before[name] = torch.rand(64).add(0.5).to(torch.bfloat16)
        before[name][5] = 0
    before["mlp.up_proj.bias"] = torch.rand(96)
    inputs = Inputs(uneven(rows, 64, 1), uneven(rows, 64, 2), uneven(rows, 96, 3))
    after = {name: weight.clone() for name, weight in before.items()}
    scale(after, inputs, rounding)

    def double(state, name):
        return state[name].double()

    for norm, names, x in (
        ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], inputs.attention),
        ("post_attention_layernorm", ["mlp.gate_proj"], inputs.mlp),
    ):
        old, new = double(before, f"{norm}.weight"), double(after, f"{norm}.weight")
        assert after[f"{norm}.weight"].dtype == torch.bfloat16
        ratio = torch.where(new == 0, 1.0, old / new)
        assert ratio.max() > 2 * ratio.min()  # it has scaled
        for name in names:
            weight, scaled = double(before, f"{name}.weight"), double(after, f"{name}.weight")
            torch.testing.assert_close(scaled * new, weight * old, rtol=1e-6, atol=0)
            errors = [
                ((rounding(name, each.float()).double() / by - weight) @ x.T.double()).square().sum()
                for each, by in ((weight, 1.0), (scaled, ratio))
            ]
            assert errors[1] < 0.9 * errors[0], name
    up, scaled_up = before["mlp.up_proj.weight"].double(), after["mlp.up_proj.weight"].double()
    old, new = double(before, "post_attention_layernorm.weight"), double(after, "post_attention_layernorm.weight")
    inner = double(after, "mlp.down_proj.weight")[0] / double(before, "mlp.down_proj.weight")[0]
    torch.testing.assert_close(scaled_up * new * inner[:, None], up * old, rtol=1e-6, atol=0)
    torch.testing.assert_close(double(after, "mlp.up_proj.bias") * inner, double(before, "mlp.up_proj.bias"))
    for name in ("self_attn.o_proj.weight", "mlp.gate_proj.bias", "self_attn.q_proj.bias"):
        if name in before:
            assert torch.equal(before[name].double(), after[name].double())


def test_the_shipped_text():
    text = shipped_text()
    assert 4000 < len(text.encode()) < 20000 and "def " in text and any("\u4e00" <= each <= "\u9fff" for each in text)
