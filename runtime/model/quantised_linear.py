"""Linear layers whose weights are quantised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.quantised import Layout, QuantisedWeight
from .layers import Layer, Linear, StackedLinear


class QuantisedLinear(Layer):
    """Takes the place of a Linear or StackedLinear: `weight` is what the ops take.

    Its tensors are integers, so that a conversion of the model to another dtype leaves them as they are.
    """

    minimum: Tensor | None
    order: Tensor | None

    def __init__(self, linear: Linear, layout: Layout):
        super().__init__()
        form, outputs, device = layout.form, linear.weight.shape[0], linear.weight.device
        self.form = form
        self.words = _parameter(torch.empty(outputs, form.words, dtype=torch.int16, device=device))
        self.scales = _parameter(torch.empty(form.groups, outputs, dtype=torch.int32, device=device))  # float32's bits
        self.minimum = None  # float32's bits
        if form.minimum:
            self.minimum = _parameter(torch.empty(form.groups, outputs, dtype=torch.int32, device=device))
        self.order = None if layout.order is None else _parameter(torch.empty_like(layout.order, device=device))
        self.bias = linear.bias

    @classmethod
    def of(cls, linear: Linear, weight: QuantisedWeight) -> QuantisedLinear:
        """A layer with this weight, in the place of `linear`."""
        made = cls(linear, Layout(weight.form, weight.order))
        Rows(made, 0, weight.shape[0]).copy_(weight)
        return made

    @property
    def weight(self) -> QuantisedWeight:
        minimum = None if self.minimum is None else self.minimum.view(torch.float32)
        return QuantisedWeight(self.form, self.words, self.scales.view(torch.float32), minimum, self.order)


class Rows(NamedTuple):
    """Where a projection is: rows first to end - 1 of a layer."""

    layer: QuantisedLinear
    first: int
    end: int

    def copy_(self, weight: QuantisedWeight) -> None:
        """Writes the projection's weight into the layer."""
        own = self.layer.weight.rows(self.first, self.end)
        own.words.copy_(weight.words)
        own.scales.copy_(weight.scales)
        if own.minimum is not None and weight.minimum is not None:
            own.minimum.copy_(weight.minimum)
        if own.order is not None and weight.order is not None:
            own.order.copy_(weight.order)


def quantise_layers(module: nn.Module, layouts: Mapping[str, Layout]) -> dict[str, Rows]:
    """Replaces linear layers of a module by QuantisedLinears.

    Args:
        module: on the meta device.
        layouts: of weights, by their names in the state dict. A stack of projections is replaced if all have one, and
            these are equal.

    Returns:
        Where the replaced weights are now, by their names.
    """
    places: dict[str, Rows] = {}
    for path, layer in list(module.named_modules()):
        if not isinstance(layer, Linear):
            continue
        parent, _, name = path.rpartition(".")
        rows = {f"{parent}.{part}.weight".removeprefix("."): size for part, size in _projections(layer, name)}
        found = [layouts[each] for each in rows if each in layouts]
        if len(found) == len(rows) and all(each.equals(found[0]) for each in found):
            quantised, first = QuantisedLinear(layer, found[0]), 0
            setattr(module.get_submodule(parent), name, quantised)
            for each, size in rows.items():
                places[each] = Rows(quantised, first, first + size)
                first += size
    return places


def linear_weights(module: nn.Module) -> list[str]:
    """The weights that `quantise_layers` can replace, by their names in the state dict."""
    names = []
    for path, layer in module.named_modules():
        if isinstance(layer, Linear):
            parent, _, name = path.rpartition(".")
            names += [f"{parent}.{part}.weight".removeprefix(".") for part, _ in _projections(layer, name)]
    return names


def biases(places: Mapping[str, Rows]) -> Iterator[tuple[str, Tensor]]:
    """The biases of the replaced layers, each projection's by its name in the state dict."""
    for name, (layer, first, end) in places.items():
        if layer.bias is not None:
            yield f"{name.removesuffix('weight')}bias", layer.bias[first:end]


def _projections(layer: Linear, name: str) -> list[tuple[str, int]]:
    """The names of a layer's projections and their numbers of rows."""
    return [*layer.parts.items()] if isinstance(layer, StackedLinear) else [(name, layer.weight.shape[0])]


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
