"""Kernels run natively where there is a GPU, else under Triton's interpreter, chosen before Triton is imported."""

import os
import sys

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
