"""What this GPU reaches: reads, copies and matrix products, the ceilings for the shares that all other parts state; and
the gap between two kernels of a graph.

The gap is measured with kernels that do next to nothing. "independent" launches wait for the end of the one before;
"dependent" launches (programmatic dependent launch) begin while it drains. "alternating" launches use little and much
shared memory in turn, which may make a multiprocessor repartition its memory each time.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
import triton
import triton.language as tl

from .. import roofline
from ..record import Part, Row
from ..timing import replayed, rounds_of
from .bare_step import device_of

NODES = 1000


@triton.jit
def _little(x_ptr, PDL: tl.constexpr):
    """Increments one word."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = x_ptr + tl.program_id(0)
    tl.store(at, tl.load(at) + 1.0)


@triton.jit
def _much(x_ptr, y_ptr, SIDE: tl.constexpr, PDL: tl.constexpr):
    """Multiplies one tile, whose operands are in shared memory."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, tl.trans(x)).to(y_ptr.dtype.element_ty))


def rows(small: bool) -> Iterator[Row]:
    part, device = Part("ceilings"), device_of(small)
    dtypes = [torch.bfloat16, torch.float16] if small else [torch.bfloat16]  # of all parts
    yield from roofline.measure(device, dtypes, 3 if small else 20).rows()

    nodes = 10 if small else NODES
    x = torch.zeros(64, device=device)
    a, y = (torch.zeros(128, 128, dtype=dtypes[-1], device=device) for _ in range(2))
    has_pdl = not small and torch.cuda.get_device_capability() >= (9, 0)
    for pdl in (False, True):
        kind = "dependent" if pdl else "independent"
        if pdl and not has_pdl:
            yield part.missing("gap, dependent", "dependent launches need compute capability 9.0")
            continue
        options = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
        little = partial(_little[(1,)], x, **options)
        much = partial(_much[(1,)], a, y, SIDE=16 if small else 128, **options)
        for name, turn in {"little": [little], "much": [much], "alternating": [little, much]}.items():
            yield part.figure(f"a node, {kind}, {name} shared memory", _nodes(turn, nodes, small), "us", gap=kind)


def _nodes(turn: Sequence[Callable[[], object]], nodes: int, small: bool) -> list[float]:
    calls = [*turn] * (nodes // len(turn))

    def eager() -> None:
        for call in calls:
            call()

    return list(islice(rounds_of(eager if small else replayed(calls), len(calls)), 3 if small else 20))
