"""Floor 1: tensors in, tensors out. The ops in Triton; `reference.py` says the same names in plain PyTorch.

An op is imported with its file on first use, so that `kernels.reference` serves a machine without Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# No file bears the name of an op: importing the file would put a module where the op should be.
_HOME = {
    "advance": "stepping",
    "embed": "embedding",
    "linear": "projection",
    "linear_add": "projection",
    "paged_attention": "attention",
    "rms_norm": "norm",
    "rms_norm_linear": "projection",
    "rms_norm_qkv_rope_cache": "projection",
    "rms_norm_swiglu": "projection",
    "rope_and_cache": "rope",
    "sample": "sampling",
    "swiglu": "activation",
}
__all__ = [*_HOME]


def for_device(device: torch.device) -> ModuleType:
    """The ops that run on a device: this module's on CUDA, the reference's on a CPU. The one place that chooses.

    Raises ValueError for any other device, and for CUDA where Triton is not installed.
    """
    if device.type == "cpu":
        return importlib.import_module(".reference", __name__)
    if device.type != "cuda":
        raise ValueError(f"there are no ops for device {str(device)!r}: move the model to 'cpu' or 'cuda'")
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"the ops of device {str(device)!r} are written in Triton, which is not installed: install it")
    return sys.modules[__name__]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its ops are {', '.join(_HOME)}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
