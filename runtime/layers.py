"""The parameters of a block, each beside the op that uses them."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import reference as ops


class Embedding(nn.Module):
    def __init__(self, rows: int, size: int, **factory: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size, **factory), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return ops.embed(token_ids, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, **factory: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, **factory), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool, **factory: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs, **factory), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class StackedLinear(Linear):
    """Projections of one input as one matrix, so that one product streams all their weights.

    Outside it still looks like a checkpoint: `state_dict` shows every part under its own name, beside this module's, as
    a view of the stack (writing into it writes the weights), and `load_state_dict` takes the parts.
    """

    def __init__(self, inputs: int, parts: dict[str, int], bias: bool, **factory: Any):
        super().__init__(inputs, sum(parts.values()), bias, **factory)
        self.parts = parts
        self.register_state_dict_post_hook(_split)
        self.register_load_state_dict_pre_hook(_stack)


def _split(module: StackedLinear, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for kind in ("weight", "bias"):
        if (stack := state.pop(prefix + kind, None)) is not None:
            for name, part in zip(module.parts, stack.split(list(module.parts.values())), strict=True):
                state[f"{_parent(prefix)}{name}.{kind}"] = part


def _stack(module: StackedLinear, state: dict[str, Any], prefix: str, *_unused: Any) -> None:
    for kind in ("weight", "bias"):
        names = [f"{_parent(prefix)}{name}.{kind}" for name in module.parts]
        if all(name in state for name in names):
            state[prefix + kind] = torch.cat([state.pop(name) for name in names])


def _parent(prefix: str) -> str:
    """ "model.layers.0.mlp." of "model.layers.0.mlp.gate_up_proj."."""
    return prefix[: prefix.rstrip(".").rfind(".") + 1]
