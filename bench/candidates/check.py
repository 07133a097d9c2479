"""The values of the candidates, in a process of its own: one that hangs or faults ends nothing else.

    python -m bench.candidates.check [--small]

prints a JSON list of [what was checked, what is wrong with it or ""]. On a GPU it runs the kernels in bfloat16 at the
shapes of InternLM3-8B's layers, with poisoned outputs and guards around them. With --small it runs on a CPU, at a toy
model's: the product's formula in place of the ring, and `sum_and_norm` in Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import candidates, harness
from . import reference
from .settings import Ring
from .sum_and_norm import sum_and_norm

EPS = 1e-5
# By the most rows of x: how the trial launches them.
RINGS = {16: Ring(5, 4), 32: Ring(5, 3), 64: Ring(4, 4, 128, 64, 8), 128: Ring(4, 3, 128, 64, 8)}
ROWS = (1, 4, 16, 17, 32, 64, 100)
SHAPES = {"o": (4096, 4096, 4), "down": (4096, 10240, 4), "qkv": (4608, 4096, 1)}  # outputs, inputs, parts


def ring_of(rows: int) -> Ring:
    return next(ring for most, ring in RINGS.items() if rows <= most)


def difference(name: str, found: Tensor, exact: Tensor, steps: float) -> str:
    """What is wrong with a result. steps: of its dtype, relative to the value and to the RMS of its row.

    A tensor core truncates where it adds 16 columns to a float32 sum, and 640 such steps all truncate the same way.
    """
    size = exact.abs() + exact.square().mean(-1, keepdim=True).sqrt()
    bound = steps * torch.finfo(found.dtype).eps * size
    return harness.difference(name, found, exact, bound, f"{steps:g} steps of the dtype")


def checks(small: bool) -> Iterator[tuple[str, str]]:
    """What was checked, and what is wrong with it."""
    torch.manual_seed(0)
    device = torch.device("cpu" if small else "cuda")
    dtype = torch.float16 if small else torch.bfloat16
    ops = candidates.for_device(device)
    shapes = {"o": (32, 64, 4), "qkv": (32, 64, 1)} if small else SHAPES
    gate_up = (64, 64) if small else (20480, 4096)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device) * scale

    def run(op: Callable[..., Tensor], x: Tensor, weight: Tensor, *launch: object) -> Tensor:
        return harness.call(op, harness.between_guards(x), harness.between_guards(weight), *launch)

    for rows in (3,) if small else ROWS:
        ring = ring_of(rows)
        for name, (outputs, inputs, parts) in shapes.items():
            x, weight = random(rows, inputs), random(outputs, inputs, scale=inputs**-0.5)
            if parts > 1:
                found = run(ops.partial_products, x, weight, parts, ring)
                columns = zip(x.chunk(parts, 1), weight.chunk(parts, 1), strict=True)
                exact = torch.stack([some.double() @ of.double().mT for some, of in columns])
                yield f"{name}, {rows} rows, {parts} parts", difference("a part", found, exact, 2048)
            else:
                found = run(ops.linear, x, weight, ring)
                yield f"{name}, {rows} rows", difference("y", found, x.double() @ weight.double().mT, 1)
        x, weight = random(rows, gate_up[1]), random(*gate_up, scale=gate_up[1] ** -0.5)
        found = run(ops.linear_swiglu, x, weight, ring)
        yield f"gate and up, {rows} rows", difference("y", found, reference.linear_swiglu(x, weight).double(), 4)
    for rows, parts in ((1, 4), (16, 2), (64, 1)):
        width = 96 if small else 4096
        values, residual, norm = random(parts, rows, width).float(), random(rows, width), random(width)
        expected = reference.sum_and_norm(values, residual, norm, EPS)
        found = harness.call(sum_and_norm, values, residual, norm, EPS)
        name = f"sum and norm, {rows} rows, {parts} parts"
        yield f"{name}: x", harness.difference("x", found[0], expected[0])
        yield f"{name}: y", difference("y", found[1], expected[1].double(), 2)


if __name__ == "__main__":
    print(json.dumps([*checks("--small" in sys.argv[1:])]))
