"""The experiment of bench/trial: kernels and settings that a GPU must decide on, next to the project's own.

Rows come in the order in which they decide most. What has not begun after SECONDS is left out, in rows that say so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import ROOT
from ..candidates.check import RINGS
from ..cases import INTERNLM3_8B, Inputs, Size
from ..record import Part, Row, first_line
from ..trial.compare import compared, values_of_interleaved
from ..trial.layers import Batch, weights
from ..trial.prompts import chunk_kernels, products_by_rows
from ..trial.reads import from_l2
from ..trial.sums import orders
from ..trial.variants import one_of_each, variants
from .bare_step import device_of

SECONDS = 330  # the limit of the part is 350
CHECK_SECONDS = 90  # for the values of the candidates
LAYERS = 12
SHAPES = ((1, 1024), (4, 1024), (16, 1024), (1, 32768))  # batch size, context length
MORE_SHAPES = ((32, 1024), (64, 1024), (4, 32768), (16, 32768))
TOY = Size(hidden=64, intermediate=64, vocabulary=320, heads=2, kv_heads=1, head_dim=32)
TOY_SHAPES = {(4, 1024): (2, 24), (1, 32768): (3, 70)}  # instead of these; one row takes the interpreter seconds

Experiments = dict[str, Callable[[], Iterator[Row]]]


def rows(small: bool) -> Iterator[Row]:
    part, begin = Part("trial"), time.monotonic()

    def late() -> bool:
        return not small and time.monotonic() - begin > SECONDS

    for name, experiment in experiments(part, small).items():
        if late():
            yield part.missing(name, f"left out: {SECONDS} s had passed")
            continue
        try:
            for row in experiment():
                yield row
                if late():
                    yield part.missing(f"{name}: the rest", f"left out: {SECONDS} s had passed")
                    break
        except Exception as error:  # the other experiments stand alone
            yield part.check(name, first_line(error))
        if not small:
            torch.cuda.empty_cache()


def experiments(part: Part, small: bool) -> Experiments:
    """By name, what yields the rows of each, the most decisive first."""
    torch.manual_seed(0)
    make = Inputs(TOY if small else INTERNLM3_8B, torch.float16 if small else torch.bfloat16, device_of(small))
    layers = weights(make, 1 if small else LAYERS)
    rounds = 1 if small else 20
    wrong: list[Row] = []  # checks of the candidates that failed

    def values() -> Iterator[Row]:
        for row in candidate_values(part, small):
            wrong.extend([row] * (row.state == "FAIL"))
            yield row

    def layers_at(batch: int, context: int) -> Iterator[Row]:
        tried = [*variants(batch, context)]
        if wrong:
            tried = [variant for variant in tried if not variant.of_candidates]
            yield part.missing(f"E3 ring, batch {batch}, context {context}", "the candidates' values are wrong")
        shape = TOY_SHAPES[batch, context] if small else (batch, context)
        yield from compared(part, Batch(make, layers, *shape), one_of_each(tried) if small else tried, rounds)

    def sums() -> Iterator[Row]:
        if wrong:
            yield part.missing("E6", "the candidates' values are wrong")
        else:
            yield from orders(part, make, (17, 40) if small else (17, 64, 128, 512, 2048))

    def at(*shapes: tuple[int, int]) -> Experiments:
        return {f"layers at batch {shape[0]}, context {shape[1]}": partial(layers_at, *shape) for shape in shapes}

    def products() -> Iterator[Row]:
        rings = {} if wrong else {256: RINGS[128]} if small else {rows: RINGS[rows] for rows in (64, 128)}
        yield from products_by_rows(part, make, counts, rounds, rings)

    counts = (256, 512, 1024) if small else (16, 32, 64, 128, 256, 512, 1024, 2048)
    return {
        "the candidates' values": values,
        "E1 values": partial(values_of_interleaved, part, make),
        **at(*(TOY_SHAPES if small else SHAPES)),
        "E5": products,
        "E6": sums,
        "E0": partial(from_l2, part, make.device, 1 if small else 24, rounds),
        **at(*(() if small else MORE_SHAPES)),
        "E4": partial(chunk_kernels, part, small, len(layers)),
    }


def candidate_values(part: Part, small: bool) -> Iterator[Row]:
    """The checks of `bench.candidates.check`; on a CPU, where they run no Gluon, also whether that compiles."""
    name = "values of the candidates"
    if small:
        _, error = output_of("bench.trial.audit", "--quick")
        yield part.check("the candidates compile for sm_90", error)
    found, error = output_of("bench.candidates.check", *["--small"] * small, seconds=None if small else CHECK_SECONDS)
    if error:
        yield part.check(name, error)
        return
    for checked, wrong in json.loads(found):
        yield part.check(f"{name}: {checked}", wrong)


def output_of(module: str, *arguments: str, seconds: float | None = None) -> tuple[str, str]:
    """What a program of this package prints, and why it failed or "".

    In a process of its own a kernel that hangs or faults ends nothing else.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "", f"exceeded {seconds:g} s"
    last = (done.stderr + done.stdout).strip().splitlines()[-1:]
    return done.stdout, f"exit code {done.returncode}: {last[0] if last else 'no output'}" if done.returncode else ""
