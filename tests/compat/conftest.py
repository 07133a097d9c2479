"""Models of transformers' classes beside transformers' own, and decode steps with and without capture."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from internlm3 import InternLM3Config, InternLM3ForCausalLM, InternLM3Tokenizer
from internlm3.runtime.engine.shared import SharedEngine
from internlm3.tests.support.capture import CapturedEngines


@pytest.fixture(scope="session")
def real(demo_model):
    """The demo model in float32, ours and transformers', and its tokenizer."""
    ours = InternLM3ForCausalLM.from_pretrained(demo_model, dtype="float32", device="cpu", progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    return SimpleNamespace(ours=ours, theirs=theirs, tokenizer=InternLM3Tokenizer.from_pretrained(demo_model))


@pytest.fixture(scope="session")
def tiny():
    """A random model whose greedy text varies, in both libraries; a row ends at 2 or 5.

    expected(rows, **options): what transformers generates, computed once for each set of options.
    """
    config = InternLM3Config(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, eos_token_id=[2, 5], pad_token_id=0, max_position_embeddings=64,
        rope_scaling={"rope_type": "dynamic", "factor": 4.0},
    )  # fmt: skip
    ours = InternLM3ForCausalLM(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for parameter in ours.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * parameter.shape[1] ** -0.5)
    values = {**config.to_dict(), "rope_parameters": config.rope_parameters}
    for key in ("architectures", "model_type", "torch_dtype", "rope_theta", "rope_scaling"):
        del values[key]
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.InternLM3Config(**values)).eval()
    theirs.load_state_dict(ours.state_dict())
    outputs = {}

    def expected(rows, **options):
        key = repr((rows.tolist(), options))
        if key not in outputs:
            outputs[key] = theirs.generate(rows, attention_mask=torch.ones_like(rows), **options)
        return outputs[key]

    return SimpleNamespace(ours=ours, theirs=theirs, expected=expected)


@pytest.fixture(params=["eager", "captured"])
def steps(request, monkeypatch):
    """Runs a test twice: decode steps are launched one by one, or replayed from graphs with 1 to 4 of them queued."""
    if request.param == "eager":
        yield request.param
        return
    models = [request.getfixturevalue(name).ours for name in ("tiny", "real") if name in request.fixturenames]
    CapturedEngines(monkeypatch, depth=1 + len(request.node.name) % 4)
    for model in models:
        model._shared = SharedEngine()  # its engine, which captures nothing
    yield request.param
    for model in models:
        model._shared = SharedEngine()
