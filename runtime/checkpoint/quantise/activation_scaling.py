"""Scaling weights by how large their inputs are, so that rounding errs least where it matters most.

Input j of a linear layer is divided by s_j, and column j of its weight multiplied by it: the product is the same, and
the rounding error of the column counts 1 / s_j. s_j = mean |x_j|^a, with the a from 0 to 0.8 that makes the error of
the layers' outputs on a text least (AWQ, arXiv 2306.00978).

What divides the inputs is folded into what makes them: the norm before q, k, v, gate and up; up_proj before down_proj.
s is what the norm's weight, rounded to its dtype, really divides by, so that nothing but the quantised weights is
rounded. o_proj is left alone: several heads share the v_proj that makes its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .calibration import Inputs

_EXPONENTS = [step / 10 for step in range(9)]
_ROWS = 4096  # tokens that the error is computed on, at most

Rounding = Callable[[str, Tensor], Tensor]  # the name and the weight [O, I] in float32 -> the weight as it will be read


def scale(block: dict[str, Tensor], inputs: Inputs, rounding: Rounding) -> None:
    """Scales the weights of a block in place. Linear layers' weights become float32.

    Args:
        block: parameters by their names in the block.
        inputs: of the layers on a text.
        rounding: what quantising does to a weight.
    """
    for norm, layers, x in (
        ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], inputs.attention),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"], inputs.mlp),
    ):
        before = block[f"{norm}.weight"]
        names = [f"{layer}.weight" for layer in layers]
        found = _best(block, names, x, rounding, before)
        block[f"{norm}.weight"] = (before.float() / found).to(before.dtype)
        for name in names:
            block[name] = block[name].float() * found
    found = _best(block, ["mlp.down_proj.weight"], inputs.down, rounding, None)
    block["mlp.down_proj.weight"] = block["mlp.down_proj.weight"].float() * found
    block["mlp.up_proj.weight"] = block["mlp.up_proj.weight"] / found[:, None]
    if "mlp.up_proj.bias" in block:
        bias = block["mlp.up_proj.bias"]
        block["mlp.up_proj.bias"] = (bias.float() / found).to(bias.dtype)


def _best(block: dict[str, Tensor], names: Sequence[str], x: Tensor, rounding: Rounding, norm: Tensor | None) -> Tensor:
    """s [I] float32 of the layers that multiply x [N, I] by the weights of these names."""
    size = x.abs().mean(0)
    size = size.clamp(min=max(size.max().item() * 1e-4, torch.finfo(torch.float32).tiny))
    few = x[:: -(-len(x) // _ROWS)]
    if len(few) > len(size):
        few = torch.linalg.qr(few, mode="r").R  # |R w| = |few w| for every w
    best, least = torch.ones_like(size), torch.inf
    for exponent in _EXPONENTS:
        s = size**exponent
        s = s / s.log().mean().exp()
        if norm is not None:
            s = _by_norm(norm, s)
        error = 0.0
        for name in names:
            weight = block[name].float()
            difference = rounding(name, weight * s).div_(s).sub_(weight)
            error += (few @ difference.T).square_().sum(dtype=torch.float64).item()
        if error < least:
            best, least = s, error
    return best


def _by_norm(norm: Tensor, s: Tensor) -> Tensor:
    """What the weight of a norm divides by, if it is divided by s and rounded."""
    divided = (norm.float() / s).to(norm.dtype).float()
    exact = norm.float() / divided
    return torch.where(exact.isfinite() & (exact > 0), exact, 1.0)
