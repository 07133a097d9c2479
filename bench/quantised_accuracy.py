"""What quantising costs in perplexity, on the demo model with its channels permuted.

    python -m bench.quantised_accuracy TEXT [--form int8 ...] [--windows 8] [--json FILE]

The demo model's weights were in groups of 32 with 4 bits before it was converted, so any form that can express those
groups would seem to lose nothing. Permuting the channels of the residual stream, those of each MLP, and the values of
each head breaks the groups up and leaves the function as it is.

Each form goes the way of a user: `quantize` writes a checkpoint, which is loaded again, in float32. TEXT is cut into
windows of 512 tokens, of which each predicts its tokens but the first. Changes are relative to the permuted model in
the same run, with the standard error of the paired difference.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 512


class Form(NamedTuple):
    """How to quantise, and the most that perplexity may grow by: see design goals in the README of results."""

    bits: str
    group: int = 128
    symmetric: bool = False
    calibrated: bool = False
    goal: float | None = None


FORMS = {
    "int8": Form("8", goal=0.01),
    "fp8, head int8": Form("fp8", goal=0.03),
    "int4, groups of 64, rounded": Form("4", goal=0.32),
    "int4, groups of 32, rounded": Form("4", 32, goal=0.25),
    "int4, groups of 64": Form("4", calibrated=True, goal=0.22),
    "int4, groups of 32": Form("4", 32, calibrated=True, goal=0.15),
    "int4, groups of 64, symmetric": Form("4", symmetric=True, calibrated=True),
    "int4, groups of 32, symmetric": Form("4", 32, symmetric=True, calibrated=True),
}


def permuted(source: Path, target: Path) -> None:
    """Writes the checkpoint of the same function with its channels in another order."""
    from internlm3 import InternLM3ForCausalLM, InternLM3Tokenizer

    model = InternLM3ForCausalLM.from_pretrained(source, device="cpu", progress=False)
    config, weights = model.config, model.state_dict()
    generator = torch.Generator().manual_seed(0)

    def order(size: int) -> Tensor:
        return torch.randperm(size, generator=generator)

    residual = order(config.hidden_size)
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    into_residual = ("layernorm.weight", "norm.weight", "o_proj.weight", "down_proj.weight")
    for name, weight in weights.items():
        weight.copy_(weight[residual] if name.endswith(into_residual) else weight[:, residual])
    for layer in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        values = torch.stack([order(dim) for _ in range(kv_heads)])
        rows = values + torch.arange(0, kv_heads * dim, dim)[:, None]
        columns = values.repeat_interleave(heads // kv_heads, 0) + torch.arange(0, heads * dim, dim)[:, None]
        weights[f"{attention}v_proj.weight"].copy_(weights[f"{attention}v_proj.weight"][rows.flatten()])
        weights[f"{attention}o_proj.weight"].copy_(weights[f"{attention}o_proj.weight"][:, columns.flatten()])
        inner = order(config.intermediate_size)
        for name in ("gate_proj", "up_proj"):
            weights[f"{mlp}{name}.weight"].copy_(weights[f"{mlp}{name}.weight"][inner])
        weights[f"{mlp}down_proj.weight"].copy_(weights[f"{mlp}down_proj.weight"][:, inner])
    model.save_pretrained(target)
    InternLM3Tokenizer.from_pretrained(source).save_pretrained(target)
