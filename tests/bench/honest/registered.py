"""Registered with PyTorch: custom ops, and an autograd function's apply."""

import eager
import torch


@torch.library.custom_op("honest::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return eager.rms_norm(x, weight, eps)


@torch.library.custom_op("honest::linear_into", mutates_args=("y",))
def linear_into(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
    torch.mm(x, weight.t(), out=y)


def linear(x, weight):
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    linear_into(x, weight, y)
    return y


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return eager.swiglu(gate_up)


swiglu = SwiGLU.apply
