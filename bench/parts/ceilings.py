"""What this card allows now: reads, copies and products, and what lies between two kernels of a graph.

The kernels between which the gap is measured do next to nothing. "apart" are launches that wait for each other's end,
"dependent" ones that begin while their predecessor drains; "alternating" have little and much shared memory by turns,
which may make a multiprocessor divide its memory anew each time.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
import triton
import triton.language as tl
from .bare_step import device_of
from ..rows import Part, Row
from ..timing import measure_floor, replayed, rounds_of

NODES = 1000


@triton.jit
def _touch(x_ptr, PDL: tl.constexpr):
    """One word, after whatever came before it."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = x_ptr + tl.program_id(0)
    tl.store(at, tl.load(at) + 1.0)


@triton.jit
def _roomy(x_ptr, y_ptr, SIDE: tl.constexpr, PDL: tl.constexpr):
    """A product of one tile, whose operands stand in shared memory."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, tl.trans(x)).to(y_ptr.dtype.element_ty))


def rows(small: bool) -> Iterator[Row]:
    part, device = Part("ceilings"), device_of(small)
    dtype = torch.float16 if small else torch.bfloat16
    for _ in range(1 if small else 3):  # their spread is what a share of them can mean
        floor = measure_floor(device, [dtype], 5 if small else 20)
        rates = {"read": floor.read, "copy, read and written": floor.copy}
        for name, rate in rates.items():
            yield part.figure(name, [rate / 1e9], "GB/s", ceiling=name.split(",")[0])
        yield part.figure("products", [*floor.matmul.values()][:1], "FLOP/s", ceiling="matmul")

    nodes = 10 if small else NODES
    x = torch.zeros(64, device=device)
    a, y = (torch.zeros(128, 128, dtype=dtype, device=device) for _ in range(2))
    dependent = not small and torch.cuda.get_device_capability() >= (9, 0)
    for pdl in (False, True):
        kind = "dependent" if pdl else "apart"
        if pdl and not dependent:
            yield part.missing("gap, dependent", "launches are dependent from compute capability 9.0 on")
            continue
        options = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
        touch = partial(_touch[(1,)], x, **options)
        roomy = partial(_roomy[(1,)], a, y, SIDE=16 if small else 128, **options)
        for name, turn in {"little": [touch], "much": [roomy], "alternating": [touch, roomy]}.items():
            yield part.figure(f"a node, {kind}, {name} shared memory", _nodes(turn, nodes, small), "us", gap=kind)


def _nodes(turn: list[Callable[[], object]], nodes: int, small: bool) -> list[float]:
    calls = turn * (nodes // len(turn))

    def eager() -> None:
        for call in calls:
            call()

    return list(islice(rounds_of(eager if small else replayed(calls), len(calls)), 3 if small else 20))
