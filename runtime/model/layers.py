"""The parameters of a model, and their names in a checkpoint."""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Weight(nn.Parameter):
    """A parameter whose version counts uses of `.data` too, since they may write: see `WeightsState`."""

    @property
    def data(self) -> Tensor:
        if not self.is_inference():
            torch.autograd.graph.increment_version(self)
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


class Part(nn.Module):
    """A module that is not called, since fused ops take its weights: hooks of its call would never run."""

    def _not_called(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__} is not called: fused ops take its weights. "
            "forward(output_hidden_states=True) returns what every block computes, and hooks of a block run there"
        )

    forward: Callable[..., Any] = _not_called
    register_forward_hook = register_forward_pre_hook = _not_called


class Layer(Part):
    """A part whose parameters are Weights, those that replace others included."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if type(param) is nn.Parameter:
            param.__class__ = Weight
        super().register_parameter(name, param)


class Embedding(Layer):
    def __init__(self, rows: int, size: int, **factory: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size, **factory), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids of any shape [...] -> [..., C], what `forward` takes as inputs_embeds."""
        return F.embedding(input_ids, self.weight)


class RMSNorm(Layer):
    def __init__(self, size: int, eps: float, **factory: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, **factory), requires_grad=False)


class Linear(Layer):
    def __init__(self, inputs: int, outputs: int, bias: bool, **factory: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs, **factory), requires_grad=False) if bias else None


class StackedLinear(Linear):
    """Projections of one input in one matrix, so that one product streams all weights. `parts`: name -> size."""

    def __init__(self, inputs: int, parts: dict[str, int], bias: bool, **factory: Any):
        super().__init__(inputs, sum(parts.values()), bias, **factory)
        self.parts = parts


class PartNames(Part):
    """A part whose StackedLinears have a checkpoint's names in its state dict.

    `state_dict` returns every part under its own name, in the memory of the stack: writing into it writes the weights.
    `load_state_dict` takes any of the parts: those that are not given keep their weights, and are reported as missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_split)
        self.register_load_state_dict_pre_hook(_stack)


@torch.inference_mode(False)  # so that writing into a part is counted in the version of the stack
def _split(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for stack, _, parts in _stacks(module, prefix):
        if stack in state:
            weights = state.pop(stack).split(list(parts.values()))
            for weight in weights if weights[0].device.type != "meta" else ():
                # A storage of its own over the same memory: safetensors.torch.save_model, accelerate and others refuse
                # tensors that do not cover their storage.
                weight.data = torch.from_dlpack(weight.detach())
            state.update(zip(parts, weights, strict=True))


def _stack(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    for stack, own, parts in _stacks(module, prefix):
        given = {part: state.pop(part) for part in parts if part in state}
        missing += [part for part in parts if part not in given]
        if not given:
            state[stack] = own
            continue
        some = next(iter(given.values()))
        rows = dict(zip(parts, own.detach().split(list(parts.values())), strict=True))
        for part, weight in given.items():
            if weight.shape == rows[part].shape:
                rows[part] = weight
            else:
                errors.append(f"{part} has shape {list(weight.shape)}, and the model's has {list(rows[part].shape)}")
        if own.is_meta and any(weight.is_meta for weight in rows.values()):
            continue  # there are no weights to keep
        state[stack] = torch.cat([weight.to(some) for weight in rows.values()])


def _stacks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter, dict[str, int]]]:
    """The full name of each stack, its parameter, and its parts' full names with their sizes."""
    for name, child in module.named_children():
        if isinstance(child, StackedLinear):
            for kind, own in child.named_parameters():
                parts = {f"{prefix}{part}.{kind}": size for part, size in child.parts.items()}
                yield f"{prefix}{name}.{kind}", own, parts
