"""Computes in place, in new memory."""

import torch


def rms_norm(x, weight, eps):
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    y.copy_(x).square_()
    scale = y.mean(-1, keepdim=True).add_(eps).rsqrt_()
    y.copy_(x).mul_(scale)
    return y.to(x.dtype).mul_(weight)
