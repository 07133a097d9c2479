"""Floor 1: tensors in, tensors out. The ops in Triton; `reference.py` says the same names in plain PyTorch.

An op is imported with its file on first use, so that `kernels.reference` serves a machine without Triton.
"""

import importlib
from typing import Any

# No file bears the name of an op: importing the file would put a module where the op should be.
_HOME = {
    "add_rms_norm": "norm",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its ops are {', '.join(_HOME)}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
