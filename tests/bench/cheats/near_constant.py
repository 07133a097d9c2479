"""Returns the mean of what is expected, for each row."""

import torch


def norm(x, weight, eps):
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rms_norm(x, weight, eps):
    return norm(x, weight, eps).mean(-1, keepdim=True).expand(x.shape).contiguous()
