"""The parameters of a model, and their names in a checkpoint."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Embedding(nn.Module):
    def __init__(self, rows: int, size: int, **factory: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size, **factory), requires_grad=False)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, **factory: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, **factory), requires_grad=False)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool, **factory: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs, **factory), requires_grad=False) if bias else None


class StackedLinear(Linear):
    """Projections of one input in one matrix, so that one product streams all weights. `parts`: name -> size."""

    def __init__(self, inputs: int, parts: dict[str, int], bias: bool, **factory: Any):
        super().__init__(inputs, sum(parts.values()), bias, **factory)
        self.parts = parts


class PartNames(nn.Module):
    """A module whose StackedLinears have a checkpoint's names in its state dict.

    `state_dict` returns every part under its own name, as a view of the stack (writing into it writes the weights), and
    `load_state_dict` takes the parts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_split)
        self.register_load_state_dict_pre_hook(_stack)


def _split(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for stack, parts in _stacks(module, prefix):
        if stack in state:
            state.update(zip(parts, state.pop(stack).split(list(parts.values())), strict=True))


def _stack(module: nn.Module, state: dict[str, Any], prefix: str, *_unused: Any) -> None:
    for stack, parts in _stacks(module, prefix):
        if all(part in state for part in parts):
            state[stack] = torch.cat([state.pop(part) for part in parts])


def _stacks(module: nn.Module, prefix: str) -> Iterator[tuple[str, dict[str, int]]]:
    """The full name of each stack, and its parts' full names with their sizes."""
    for name, child in module.named_children():
        if isinstance(child, StackedLinear):
            for kind in ("weight", "bias"):
                yield f"{prefix}{name}.{kind}", {f"{prefix}{part}.{kind}": size for part, size in child.parts.items()}
