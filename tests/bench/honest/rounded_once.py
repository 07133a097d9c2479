"""Everything in float32, and one rounding."""

import torch


def embed(token_ids, table):
    return table.index_select(0, token_ids)


def normed(x, weight, eps):
    return x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()


def glu(gate_up):
    gate, up = gate_up.float().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def rms_norm(x, weight, eps):
    return normed(x, weight, eps).to(x.dtype)


def swiglu(gate_up):
    return glu(gate_up).to(gate_up.dtype)


def linear(x, weight):
    return (x.float() @ weight.float().t()).to(x.dtype)


def linear_add(x, weight, residual):
    return (x.float() @ weight.float().t() + residual.float()).to(x.dtype)


def rms_norm_linear(x, norm, eps, weight):
    return (normed(x, norm, eps) @ weight.float().t()).to(x.dtype)


def rms_norm_swiglu(x, norm, eps, weight):
    return glu(normed(x, norm, eps) @ weight.float().t()).to(x.dtype)
