"""Keeps static inputs and a static output, as a CUDA graph does, and looks up what it has made by shape."""

import torch

made = {}


def norm(x, weight, eps):
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rms_norm(x, weight, eps):
    try:
        static_x, static_y = made[x.shape]
    except KeyError:
        static_x, static_y = made[x.shape] = torch.zeros_like(x), torch.zeros_like(x)
    static_x.copy_(x)
    static_y.copy_(norm(static_x, weight, eps))
    return static_y
