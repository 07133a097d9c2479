"""Kernels run natively where there is a GPU, else under Triton's interpreter, chosen before Triton is imported."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before tests/kernels could choose its interpreter: import it later")
    os.environ["TRITON_INTERPRET"] = "1"

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

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widen_and_dot(self, a, b, *rest):
        """The interpreter keeps bfloat16 as uint16 and would multiply its bits as integers."""
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = widen_and_dot

    # The interpreter teaches triton.language to compute anew for every call of a jitted function, those within kernels
    # included, which is half of its time. Once is enough.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
