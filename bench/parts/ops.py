"""The microbenchmark table of bench/kernels.py, as rows."""

from collections.abc import Iterator

from .. import peers
import torch
from ..cases import INTERNLM3_8B, SMALL, cases
from .bare_step import device_of
from ..rows import Part, Row
from ..timing import measure_floor

from .. import ops as table


def rows(small: bool) -> Iterator[Row]:
    """Every op beside its peers, the time for which is boxed by who runs this: the longest come last."""
    part, device = Part("kernels"), device_of(small)
    dtype = torch.bfloat16
    floor = measure_floor(device, [dtype], 5 if small else 20)
    shapes = [([1], [], [1024]), ([1, 16], [], [32768]), ([4, 16], [], [1024]), ([], [512], [1024, 8192])]
    chosen = [
        case
        for rows, chunks, contexts in ([([1], [], [64])] if small else shapes)
        for case in cases(SMALL if small else INTERNLM3_8B, [dtype], rows, chunks, contexts)
    ]
    peers.SECONDS = 30
    for figure in table.figures(chosen, device, 3 if small else 20, (), {}):
        name = f"{figure.op}, {figure.shape}, {figure.engine}"
        about = {"op": figure.op, "shape": figure.shape, "engine": figure.engine}
        mine = figure.engine in ("triton", "reference")
        if not figure.rounds:
            yield part.check(name, figure.note, **about) if mine else part.missing(name, figure.note, **about)
            continue
        bound = figure.share(floor)
        about |= {"share": bound[1], "bound": bound[0]} if bound else {}
        note = f"{bound[1]:.1%} of the {bound[0]} floor" if bound else "from caches"
        yield part.figure(name, figure.rounds, "us", note, **about)
