"""Results that are views: transposed, sliced out of a padded buffer, expanded to the shape of the op."""

import eager
import torch


def linear(x, weight):
    return (weight @ x.t()).t()


def rms_norm(x, weight, eps):
    padded = torch.full((x.shape[0], x.shape[1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    y = padded[:, : x.shape[1]]
    return y.copy_(eager.rms_norm(x, weight, eps))


def swiglu(gate_up):
    return eager.swiglu(gate_up).unsqueeze(1)[:, 0]


def linear_add(x, weight, residual):
    return torch.stack([residual, linear(x, weight)]).sum(0)
