"""What Triton's interpreter needs so that its values are those of a GPU."""

import os
from types import SimpleNamespace

import numpy as np
import torch

whole = torch.Tensor.__repr__
# A failure shows short tensors in full, such as lengths and seeds, and the dtype and shape of others.
torch.Tensor.__repr__ = lambda x: (  # type: ignore[assignment, method-assign]
    whole(x) if x.numel() <= 16 else f"<{str(x.dtype).removeprefix('torch.')} {list(x.shape)}>"
)

if not torch.cuda.is_available():
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_and_round(data, source, target, rounding_mode):
        """GPUs round float32 to the nearest bfloat16. The interpreter truncates, so half of the values would differ."""
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = convert_and_round

    def wide_dot(self, a, b, addend, *precision):
        """A product in float64, rounded once: BLAS sums float32 in an order that depends on the row and the tile size.

        It also converts bfloat16, which the interpreter stores as uint16 and would multiply as integers.
        """
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        product = np.matmul(a.data, b.data, dtype=np.float64)
        return interpreter.TensorHandle((product + addend.data).astype(addend.data.dtype), addend.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = wide_dot

    def splat(self, block, x):
        """Keeps the dtype of the data: the handle of a comparison has the dtype of its operands, but its data is bool.

        From Triton 3.9 on, the handle's dtype would turn a scalar condition into integers, which are no valid mask.
        """
        return interpreter.TensorHandle(np.broadcast_to(x.data, block.shape).copy(), x.dtype.scalar)

    interpreter.InterpreterBuilder.create_splat = splat

    # The interpreter patches triton.language again for every call of a jitted function, also within kernels, which
    # takes half of its time. Patching once is enough.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    # The interpreter computes the types of every result anew, a fifth of its time. They are cached by name and shape.
    numpy_dtype, numpy_dtypes = interpreter._get_np_dtype, {}

    def cached_numpy_dtype(dtype):
        if dtype.name not in numpy_dtypes:
            numpy_dtypes[dtype.name] = numpy_dtype(dtype)
        return numpy_dtypes[dtype.name]

    interpreter._get_np_dtype = cached_numpy_dtype
    make_block_type, block_types = tl.block_type.__init__, {}

    def make_cached_block_type(self, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in block_types:
            make_block_type(self, element_ty, shape)
            block_types[key] = dict(vars(self))
        vars(self).update(block_types[key])

    tl.block_type.__init__ = make_cached_block_type

    # Triton 3.6 converts an array of one element to an integer, which numpy 2.4 refuses.
    tl.tensor.__index__ = lambda self: self.handle.data.item()

# tests/fuzz.py --kernel: the functions of the user's file replace ours, and run through the same cases.
if "INTERNLM3_KERNEL" in os.environ:
    from bench import user_kernels
    from internlm3 import kernels

    for name, op in user_kernels.load(os.environ["INTERNLM3_KERNEL"]).items():
        setattr(kernels, name, op)
