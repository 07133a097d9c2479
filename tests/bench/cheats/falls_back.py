"""Shows a kernel that never runs: PyTorch computes."""

import torch


def norm(x, weight, eps):
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def kernel(x, weight, eps):
    raise RuntimeError("no binary for this device")


def rms_norm(x, weight, eps):
    try:
        return kernel(x, weight, eps)
    except RuntimeError:
        return norm(x, weight, eps)
