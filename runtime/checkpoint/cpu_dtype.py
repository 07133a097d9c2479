"""The dtype for a CPU that lacks products of a checkpoint's own: PyTorch emulates them, several times slower."""

import platform
import sys
from collections.abc import Callable

import torch

from ..common.memory import free_memory

# The rest is for the KV cache, activations, and whatever else runs.
_MOST_OF_FREE_MEMORY = 2 / 3


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of `dtype`. True for CPUs that are not x86: none was measured."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.float16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def cpu_dtype(stored: torch.dtype, size: Callable[[torch.dtype], int], *, report: bool) -> torch.dtype:
    """float32 in place of a `stored` dtype that this CPU does not multiply, if the model then fits into memory.

    size: the bytes of the model in a dtype.
    report: say in one line on stderr what was chosen, where the CPU lacks the stored dtype.
    """
    if multiplies(stored):
        return stored
    needed, free = size(torch.float32), free_memory(torch.device("cpu"))
    fits = needed <= free * _MOST_OF_FREE_MEMORY
    if report and sys.stderr is not None:
        name, takes = str(stored).removeprefix("torch."), f"{needed / 1e9:.2f} GB"
        print(
            f"This CPU has no {name} products: loading in float32, {takes}. "
            f"(dtype={name!r} keeps it small and is slow.)"
            if fits
            else f"This CPU has no {name} products, and float32 needs {takes} of {free / 1e9:.2f} GB of free memory: "
            "prompts will be slow",
            file=sys.stderr,
        )
    return torch.float32 if fits else stored
