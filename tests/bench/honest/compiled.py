"""torch.compile, also of a function that makes its own output."""

import eager
import torch


@torch.compile(dynamic=False)
def rms_norm(x, weight, eps):
    y = torch.empty_like(x)
    y.copy_(eager.rms_norm(x, weight, eps))
    return y


swiglu = torch.compile(eager.swiglu, dynamic=False)
