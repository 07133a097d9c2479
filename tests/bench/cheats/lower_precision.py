"""Computes in bfloat16, whatever it was given."""

import torch


def rms_norm(x, weight, eps):
    y = x.bfloat16()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.bfloat16()).to(x.dtype)
