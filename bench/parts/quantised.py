"""The time of a decode step with quantised weights: as part `decode` measures it, with random numbers of each form."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from internlm3 import InternLM3ForCausalLM
from internlm3.runtime.model.layers import Linear
from internlm3.runtime.model.quantised_linear import QuantisedLinear

from ..cases import OWN_FORMS, Inputs, Size
from ..record import Part, Row, first_line
from .bare_step import random_model
from .decode import shape_of, step_row, step_times

SHAPES = ((1, 1024), (16, 1024), (4, 1024), (1, 32768))  # batch sizes and context lengths


def rows(small: bool, name: str) -> Iterator[Row]:
    part = Part("quantised")
    for stored in OWN_FORMS:
        model = quantised_model(small, name, stored)
        for batch, context in [(1, 16), (9, 16)] if small else SHAPES:
            try:
                times = step_times(model, batch, context, small)
            except (torch.cuda.OutOfMemoryError, MemoryError) as error:
                yield part.missing(f"{shape_of(batch, context)}, {stored}", first_line(error))
                continue
            yield step_row(part, times, model, stored, batch, context)


def quantised_model(small: bool, name: str, stored: str) -> InternLM3ForCausalLM:
    """A model of random weights whose projections are of this form of `bench.cases`, and whose head is int8."""
    model = random_model(small, name)
    config = model.config
    size = Size(config.hidden_size, config.intermediate_size, config.vocab_size, config.num_attention_heads,
                config.num_key_value_heads, config.head_dim)  # fmt: skip
    make = Inputs(size, model.dtype, model.device)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Linear):
            outputs, inputs = layer.weight.shape
            weight = make.quantised(outputs, inputs, "int8" if path == "lm_head" else stored)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantisedLinear.of(layer, weight))
    return model
