"""Triton kernels; one multiplies in the dtype of its inputs, one is tuned at the first call of a width."""

import torch
import triton
import triton.language as tl


@triton.jit
def _norm(x, weight, y, stride, n, eps, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    inside = i < n
    value = tl.load(x + row * stride + i, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / n + eps)
    tl.store(y + row * n + i, value * scale.to(value.dtype) * tl.load(weight + i, mask=inside), mask=inside)


def rms_norm(x, weight, eps):
    y = torch.empty_like(x)
    _norm[(x.shape[0],)](x, weight, y, x.stride(0), x.shape[1], eps, triton.next_power_of_2(x.shape[1]))
    return y


@triton.autotune([triton.Config({"BLOCK": block}) for block in (16, 32, 128)], key=["n"])
@triton.heuristics({"EVEN": lambda given: given["n"] % given["BLOCK"] == 0})
@triton.jit
def _glu(x, y, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    row, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    if EVEN:
        gate, up = (tl.load(x + row * 2 * n + half * n + i).to(tl.float32) for half in (0, 1))
    else:
        gate, up = (tl.load(x + row * 2 * n + half * n + i, mask=inside).to(tl.float32) for half in (0, 1))
    tl.store(y + row * n + i, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


def swiglu(gate_up):
    rows, both = gate_up.shape
    y = torch.empty((rows, both // 2), dtype=gate_up.dtype, device=gate_up.device)
    _glu[lambda given: (rows, triton.cdiv(both // 2, given["BLOCK"]))](gate_up, y, both // 2)
    return y
