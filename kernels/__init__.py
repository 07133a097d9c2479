"""The ops: tensors in, tensors out. One meaning, two backends with the same names and signatures.

    reference    what each op means, in plain PyTorch
    cpu          the ops tuned for a CPU
    triton       the ops as Triton kernels for a GPU

`kernels.<op>` is the Triton op. It is imported on first use, so that a machine without Triton can use the other two.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = [
    "advance",
    "count_prompt",
    "draft",
    "embed",
    "linear",
    "linear_add",
    "paged_attention",
    "rms_norm",
    "rms_norm_linear",
    "rms_norm_qkv_rope_cache",
    "rms_norm_swiglu",
    "rope_and_cache",
    "sample",
    "store_row",
    "swiglu",
]


def for_device(device: torch.device) -> ModuleType:
    """The backend of a device: `kernels.cpu` or `kernels.triton`. This is the one place that chooses.

    Raises ValueError for a device that is neither a CPU nor a CUDA device, and for CUDA where Triton is not installed.
    """
    if device.type == "cpu":
        return importlib.import_module(".cpu", __name__)
    if device.type != "cuda":
        raise ValueError(f"there are no ops for device {str(device)!r}: move the model to 'cpu' or 'cuda'")
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"the ops of device {str(device)!r} are written in Triton, which is not installed: install it")
    return importlib.import_module(".triton", __name__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its ops are {', '.join(__all__)}")
    return getattr(importlib.import_module(".triton", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
