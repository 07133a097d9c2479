"""What Triton's interpreter needs so that its values are those of a GPU, for the tests of kernels/ and users' kernels.

The interpreter computes with numpy, which has no bfloat16: it keeps the bits of those values as integers, and would add
and multiply these. `mend` lets it compute in float32 instead and round each result to the nearest bfloat16. And it lets
`triton.autotune` choose a configuration without timing any, for which Triton asks a GPU's driver.
"""

import functools
import os
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

# Methods of the interpreter's builder that compute with floating-point numbers.
ARITHMETIC = (
    "fadd", "fsub", "fmul", "fdiv", "frem", "precise_divf", "fma", "clampf", "minimumf", "minnumf", "maximumf",
    "maxnumf", "cos", "sin", "exp", "exp2", "log", "log2", "sqrt", "precise_sqrt", "rsqrt", "erf", "floor", "ceil",
    *(f"fcmp{ordered}{than}" for ordered in "OU" for than in ("LT", "GT", "LE", "GE", "EQ", "NE")),
)  # fmt: skip


def chosen() -> bool:
    """Whether kernels run in the interpreter. Triton reads this when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def values(bits: Any) -> Any:
    """float32 values of bfloat16 numbers, whose bits are an array of uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def nearest(x: Any) -> Any:
    """The bits of the bfloat16 numbers that are nearest to an array of float32, ties to even, as GPUs round."""
    rounded = torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(x.shape)


def mend_if_chosen() -> None:
    if chosen():
        mend()


@functools.cache
def mend() -> None:
    """Mends the interpreter of this process, for as long as it lasts. Needs Triton, and `chosen`."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def widened(x: Any) -> Any:
        if isinstance(x, handle) and x.dtype.scalar == tl.bfloat16:
            return handle(values(x.data), tl.float32)
        return x

    def narrowed(x: Any) -> Any:
        """Numbers in bfloat16; the result of a comparison as it is."""
        return handle(nearest(x.data), tl.bfloat16) if x.data.dtype == np.float32 else x

    def in_float32(compute: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute)
        def call(self: Any, *given: Any) -> Any:
            wide = [widened(x) for x in given]
            result = compute(self, *wide)
            return narrowed(result) if any(x is not y for x, y in zip(given, wide, strict=True)) else result

        return call

    for name in ARITHMETIC:
        setattr(builder, f"create_{name}", in_float32(getattr(builder, f"create_{name}")))
    builder.get_bf16 = lambda self, value: narrowed(self.get_fp32(value))

    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def cast_and_round(self: Any, x: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return cast(self, widened(x), target)
        return x if x.dtype.scalar == tl.bfloat16 else narrowed(cast(self, x, tl.float32))

    def convert_and_round(self: Any, x: Any, target: Any, rounding: Any) -> Any:
        if (x.dtype.scalar, target.scalar) == (
            tl.float32,
            tl.bfloat16,
        ) and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return narrowed(x)
        return convert(self, x, target, rounding)

    builder.cast_impl, builder.create_fp_to_fp = cast_and_round, convert_and_round

    def factor(x: Any) -> Any:
        """The values of an operand of a product of matrices."""
        if x.dtype.scalar.is_fp8():
            return interpreter._convert_float(x.data, x.dtype.scalar, tl.float16, None).view(np.float16)
        return widened(x).data

    def wide_dot(self: Any, a: Any, b: Any, addend: Any, *precision: Any) -> Any:
        """A product in float64, rounded once: BLAS sums float32 in an order that depends on the row and tile size."""
        product = np.matmul(factor(a), factor(b), dtype=np.float64)
        return handle((product + addend.data).astype(addend.data.dtype), addend.dtype.scalar)

    builder.create_dot = wide_dot

    def splat(self: Any, block: Any, x: Any) -> Any:
        """Keeps the dtype of the data: the handle of a comparison has the dtype of its operands, but its data is bool.

        From Triton 3.9 on, the handle's dtype would turn a scalar condition into integers, which are no valid mask.
        """
        return handle(np.broadcast_to(x.data, block.shape).copy(), x.dtype.scalar)

    builder.create_splat = splat

    total = interpreter.ReduceOps.sum

    def rounded_sum(self: Any, x: Any) -> Any:
        """Each sum of two numbers in bfloat16 is rounded, in the order of a tree, as the threads of a GPU add."""
        if x.dtype != tl.bfloat16:
            return total(self, x)
        numbers = values(x.handle.data)
        axis = 0 if self.axis is None else self.axis
        shape = numbers.shape
        numbers = numbers.reshape(-1) if self.axis is None else numbers
        while numbers.shape[axis] > 1:  # a power of two
            one, other = np.split(numbers, 2, axis)
            numbers = values(nearest(one + other))
        if not self.keep_dims:
            numbers = numbers.squeeze(axis)
        elif self.axis is None:
            numbers = numbers.reshape([1] * len(shape))
        return self.to_tensor(nearest(numbers), x.dtype)

    interpreter.ReduceOps.sum = rounded_sum

    _choose_untimed()
    _hasten(tl, interpreter)
    # Triton 3.6 converts an array of one element to an integer, which numpy 2.4 refuses.
    tl.tensor.__index__ = lambda self: self.handle.data.item()


def _choose_untimed() -> None:
    """Lets each key of a `triton.autotune` have one of its configurations, so that many keys test them all.

    It is the same one in every run. As on a GPU, the kernel runs with it once more than it was called.
    """
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def one_config(self: Any, given: dict[str, Any]) -> Any:
        configs, values = prune(self, given), {**self.nargs, **given}
        dtypes = [str(x.dtype) for x in values.values() if hasattr(x, "dtype")]
        key = repr([*(values.get(name) for name in self.keys), *dtypes])
        return [configs[zlib.crc32(key.encode()) % len(configs)]]

    def call_once(call: Callable[[], None], **_: Any) -> list[float]:
        call()
        return [0.0]

    Autotuner.prune_configs, Autotuner.do_bench = one_config, property(lambda self: call_once)


def _hasten(tl: Any, interpreter: Any) -> None:
    """Computes once what the interpreter computes for every call of a function, or for every result."""
    # It patches triton.language for every call of a jitted function, also within kernels: half of its time.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    # It computes the types of every result: a fifth of its time. They are cached by name and shape.
    numpy_dtype, numpy_dtypes = interpreter._get_np_dtype, {}

    def cached_numpy_dtype(dtype: Any) -> Any:
        if dtype.name not in numpy_dtypes:
            numpy_dtypes[dtype.name] = numpy_dtype(dtype)
        return numpy_dtypes[dtype.name]

    interpreter._get_np_dtype = cached_numpy_dtype
    make_block_type, block_types = tl.block_type.__init__, {}

    def make_cached_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in block_types:
            make_block_type(self, element_ty, shape)
            block_types[key] = dict(vars(self))
        vars(self).update(block_types[key])

    tl.block_type.__init__ = make_cached_block_type
