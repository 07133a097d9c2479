"""Shared by all launchers: what a kernel is compiled for, the options of a launch, the checks of its arguments."""

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
    """`triton.jit` of a kernel that is specialised for its constants, its dtypes, and the alignment of `aligned`.

    `aligned` names, separated by spaces, the pointers and strides that 16-byte loads and stores use: whether they are
    multiples of 16 is fixed by the model and its cache. By default Triton specialises every argument, also for the
    value 1, so a length, a count or the offset of a view would recompile a kernel while serving.
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

    Rounding: the compiler must not contract a product and a sum, which would skip a rounding that the op promises, in
    one kernel and not in the next. Where a fused operation is intended, the kernel calls `tl.fma`.

    Programmatic dependent launch (CUDA, from compute capability 9.0): a kernel starts while its predecessor drains.
    Under `if PDL:` a kernel calls `gdc_launch_dependents()` first, then loads its weights, and calls `gdc_wait()`
    before it reads anything that a predecessor wrote and before any write. Before the wait it reads only constants:
    weights, biases and the weights of norms. In a decode step attention also reads what is older than the step: the
    lengths, the block table and the cached tokens but the newest. `_embed`, with which a step begins, therefore waits
    before it triggers.

    A kernel may start before its predecessor's writes are visible, even if the predecessor triggers nothing and just
    ends. So between the launch that writes a constant and the first op that reads it there must be a synchronisation,
    or a launch without this option, such as any of PyTorch's, which starts when the writer is done. This matters when
    weights are loaded, and for inputs that a test or a benchmark creates.
    """
    rounding = {"enable_fp_fusion": False}
    return {"PDL": True, "launch_pdl": True, **rounding} if is_hopper(device) else {"PDL": False, **rounding}


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. Triton's cdiv is slow on the host."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The smallest power of two >= x, for x > 0."""
    return 1 << (x - 1).bit_length()


def check_activation(name: str, x: Tensor, *shape: int) -> None:
    """Raise unless x is a valid first argument: a supported dtype, on the current GPU, and valid for `check`."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}; kernels take {', '.join(str(dtype) for dtype in DTYPES)}")
    check_first(name, x, x.dtype, *shape)


def check_first(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Raise unless x is on the current GPU and valid for `check`."""
    if not INTERPRETED and (x.device.type != "cuda" or x.device.index != torch.cuda.current_device()):
        raise ValueError(
            f"{name} is on {x.device}; kernels run on the current accelerator: move it there, "
            "or launch inside `with torch.cuda.device(...)`"
        )
    check(name, x, dtype, x.device, *shape)


def check(name: str, x: Tensor, dtype: torch.dtype, device: torch.device, *shape: int) -> None:
    """Raise unless x has this dtype, device and shape (-1 is any size) and a contiguous last dimension."""
    _check(name, x.dtype, x.device, x.shape, x.stride(), dtype, device, shape)


# Cached, since a step launches the same shapes in all 48 layers.
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
