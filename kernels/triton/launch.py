"""What every launcher shares: what its kernel is compiled for, the options of a launch, the checks of its arguments."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The interpreter runs kernels in numpy, on tensors of any device.
INTERPRETED = triton.knobs.runtime.interpret


def jit(aligned: str = "") -> Callable[[Callable[..., None]], Any]:
    """`triton.jit` of a kernel that is compiled for its constants, its dtypes, and which of `aligned` divide by 16.

    These are, by names with spaces between, the pointers (in bytes) and strides behind 16-byte loads and stores, which
    a model and its cache fix. By itself Triton asks that of every argument, and whether it is 1: a length, a count, or
    the place of a view would compile a kernel anew in the middle of serving.
    """

    def decorate(kernel: Callable[..., None]) -> Any:
        varying = [x.name for x in inspect.signature(kernel).parameters.values() if x.annotation is not tl.constexpr]
        return triton.jit(kernel, do_not_specialize=[name for name in varying if name not in aligned.split()])

    return decorate


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device has compute capability 9.0 or newer. False in the interpreter and for AMD's GPUs.

    These have programmatic dependent launch, and tensor cores that read both factors from shared memory.
    """
    return not INTERPRETED and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def options(device: torch.device) -> dict[str, bool]:
    """Options of every launch: `kernel[grid](..., **options(x.device))`.

    Rounding: the compiler contracts no product and sum, since that would skip a rounding which the op promises, in one
    kernel and not in the next. Where a fused operation is meant there is `tl.fma`.

    Programmatic dependent launch: a kernel starts while its predecessor drains. The kernel's part, under `if PDL:`, is
    to call `gdc_launch_dependents()` first, then load its weights, and `gdc_wait()` before it reads what a predecessor
    wrote and before any write. CUDA has it from compute capability 9.0. Before the wait only constants are read:
    weights, biases and the weights of norms. A predecessor lets a kernel start before its own writes are to be seen,
    even where it triggers nothing and merely ends. So between the launch that writes a constant and the first op that
    reads it, there must be a synchronisation, or one more launch without this option, as PyTorch's are: it begins when
    the writer is done. That holds for the loading of weights, and for what a test or a bench makes up.
    """
    rounding = {"enable_fp_fusion": False}
    return {"PDL": True, "launch_pdl": True, **rounding} if is_hopper(device) else {"PDL": False, **rounding}


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. Triton's own takes the host longer than a check."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The least one that x > 0 does not exceed."""
    return 1 << (x - 1).bit_length()


def check_activation(name: str, x: Tensor, *shape: int) -> None:
    """Raise unless x may lead a launch: as `check` says, of a dtype that kernels know, on the current accelerator."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}; kernels take {', '.join(str(dtype) for dtype in DTYPES)}")
    if not INTERPRETED and (x.device.type != "cuda" or x.device.index != torch.cuda.current_device()):
        raise ValueError(
            f"{name} is on {x.device}; kernels run on the current accelerator: move it there, "
            "or launch inside `with torch.cuda.device(...)`"
        )
    check(name, x, x.dtype, x.device, *shape)


def check(name: str, x: Tensor, dtype: torch.dtype, device: torch.device, *shape: int) -> None:
    """Raise unless x has this dtype, device and shape (-1 stands for any size) and a contiguous last dimension."""
    _check(name, x.dtype, x.device, x.shape, x.stride(), dtype, device, shape)


# What has passed is not looked at again: a step launches the same shapes 48 times.
@lru_cache(4096)
def _check(
    name: str,
    x_dtype: torch.dtype,
    x_device: torch.device,
    x_shape: torch.Size,
    x_stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...],
) -> None:
    if x_dtype != dtype:
        raise TypeError(f"{name} is {x_dtype}, must be {dtype}")
    if x_device != device:
        raise ValueError(f"{name} is on {x_device}, must be on {device}")
    if len(x_shape) != len(shape) or any(want not in (-1, size) for want, size in zip(shape, x_shape, strict=True)):
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(x_shape)}, must have [{wanted}]")
    if x_stride and x_stride[-1] != 1 and x_shape[-1] > 1:
        raise ValueError(f"{name} has strides {x_stride}; its last dimension must be contiguous")
