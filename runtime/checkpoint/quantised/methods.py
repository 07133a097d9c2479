"""Which quantisation method a checkpoint uses, by its own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...common.files import has_file, read_json
from ...common.shown import shown
from . import awq, bitsandbytes, compressed_tensors, gptq, smooth_quant, torchao
from .scheme import Method, Settings

KEY = "quantization_config"
FILE = "quantize_config.json"  # where AutoGPTQ writes the settings
_METHODS: Mapping[str, Callable[[Settings], Method]] = {
    "gptq": gptq.method,
    "awq": awq.method,
    "compressed-tensors": compressed_tensors.method,
    "smooth_quant": smooth_quant.method,
    "bitsandbytes": bitsandbytes.method,
    "torchao": torchao.method,
}


def method_of(folder: Path, config: Mapping[str, Any]) -> Method | None:
    """The quantisation method of a checkpoint, None if it is not quantised.

    Args:
        folder: of the checkpoint.
        config: what its config.json has beyond the shape of the model.

    Raises:
        ValueError: a method, or settings of one, that this runtime does not read.
    """
    source, values = folder / "config.json", config.get(KEY)
    if not values and has_file(folder / FILE):
        source = folder / FILE
        values = {"quant_method": "gptq", **read_json(source)}
    if not values:
        return None
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: {KEY} is {shown(values)}; it must be an object")
    name = values.get("quant_method")
    if not isinstance(name, str) or name not in _METHODS:
        raise ValueError(
            f"{source}: the checkpoint is quantised by {shown(name)}, which this runtime does not read; it reads "
            f"{', '.join(_METHODS)}"
        )
    try:
        return _METHODS[name](Settings(values))
    except ValueError as error:
        raise ValueError(f"{source}, {KEY} ({name}): {error}") from None
