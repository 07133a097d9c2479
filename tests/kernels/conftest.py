"""What Triton's interpreter needs so that its values are those of a GPU."""

import os
from types import SimpleNamespace

import numpy as np
import torch

whole = torch.Tensor.__repr__
# A failure shows lengths and seeds, which are short, and of other tensors what they are.
torch.Tensor.__repr__ = lambda x: (  # type: ignore[assignment, method-assign]
    whole(x) if x.numel() <= 16 else f"<{str(x.dtype).removeprefix('torch.')} {list(x.shape)}>"
)

if not torch.cuda.is_available():
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_and_round(data, source, target, rounding_mode):
        """GPUs round float32 to the nearest bfloat16; the interpreter cuts it off, so that half the values differ."""
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = convert_and_round

    def wide_dot(self, a, b, addend, *precision):
        """In float64, rounded once: BLAS would add up float32 in another order for another row or size of a tile.

        Nor does this multiply the bits of bfloat16, which the interpreter keeps as uint16, as integers.
        """
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        product = np.matmul(a.data, b.data, dtype=np.float64)
        return interpreter.TensorHandle((product + addend.data).astype(addend.data.dtype), addend.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = wide_dot

    def splat(self, block, x):
        """In the dtype that the data has: a comparison's handle bears that of what it compared, and its data is bool.

        From Triton 3.9 on the handle's would make integers of a scalar condition, which no mask may be.
        """
        return interpreter.TensorHandle(np.broadcast_to(x.data, block.shape).copy(), x.dtype.scalar)

    interpreter.InterpreterBuilder.create_splat = splat

    # The interpreter teaches triton.language to compute anew for every call of a jitted function, those within kernels
    # included, which is half of its time. Once is enough.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    # Triton 3.6 asks numpy for the integer of an array of one element, which numpy 2.4 gives no more.
    tl.tensor.__index__ = lambda self: self.handle.data.item()

# tests/fuzz.py --kernel: somebody's own functions stand for ours, and go through the same cases.
if "INTERNLM3_KERNEL" in os.environ:
    from bench import user_kernels
    from internlm3 import kernels

    for name, op in user_kernels.load(os.environ["INTERNLM3_KERNEL"]).items():
        setattr(kernels, name, op)
