"""What the candidates compute, in plain PyTorch, with their order of sums and of roundings.

Letters as in kernels/reference.py. A weight of gate and up is interleaved: 8 rows of gate, the 8 rows of up that belong
to them, the next 8 rows of gate, and so on. `ring` is how a kernel is launched, and changes no value.
"""

import torch
from torch import Tensor

from internlm3.kernels import reference

APART = 8  # from a gate row to its up row


def interleaved(gate_up: Tensor) -> Tensor:
    """[2I, C] with gate rows in front -> the same rows, interleaved: one stream of memory, not two."""
    rows, columns = gate_up.shape
    return gate_up.view(2, rows // 2 // APART, APART, columns).transpose(0, 1).reshape(rows, columns)


def partial_products(x: Tensor, weight: Tensor, parts: int, ring: object = None) -> Tensor:
    """x @ weight^T in parts: part p sums columns p C / parts to (p + 1) C / parts. x [R, C] -> float32 [parts, R, O].

    Within a part the ring sums in ascending order of the tensor core's steps of 16 columns; here PyTorch chooses.
    """
    some = [each.float() for each in (x, weight)]
    xs, ws = (each.unflatten(1, (parts, -1)).transpose(0, 1) for each in some)
    return xs @ ws.mT


def linear(x: Tensor, weight: Tensor, ring: object = None) -> Tensor:
    """x @ weight^T, rounded to x's dtype."""
    return partial_products(x, weight, 1)[0].to(x.dtype)


def linear_swiglu(x: Tensor, weight: Tensor, ring: object = None) -> Tensor:
    """swiglu(linear(x)) of an interleaved weight [2I, C] -> [R, I]."""
    gate, up = linear(x, weight).unflatten(1, (-1, 2, APART)).unbind(2)
    return reference.swiglu(torch.cat([gate.flatten(1), up.flatten(1)], dim=1))


def sum_of(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """part 0 + part 1 + ... in this order, rounded once. float32 [parts, R, O] -> [R, O]."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(dtype)


def sum_and_norm(parts: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + the rounded sum of parts, and its RMSNorm. parts float32 [parts, R, C], residual [R, C], norm [C]."""
    x = residual + sum_of(parts, residual.dtype)
    return x, reference.rms_norm(x, norm, eps)
