"""Random honest kernels, in the styles of tests/bench/honest: files of ops as people write them."""

import gc
import random
import sys
from collections.abc import Collection
from pathlib import Path
from unittest import mock

import torch

from bench import strict, user_kernels
from bench.cases import Case, Size, cases
from bench.integrity import Watch
from bench.measure import Engine, measure
from bench.timing import name_of

HONEST = Path(__file__).parents[1] / "bench" / "honest"
STYLES = sorted(path.stem for path in HONEST.glob("*.py"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random_case(rng: random.Random, ops: Collection[str]) -> Case:
    """One of these ops at random sizes, without quantised weights."""
    width = rng.choice((16, 24, 32, 64, 200))
    size = Size(
        width, rng.choice((24, 48, 130)), rng.randrange(20, 300), 4, rng.choice((1, 2, 4)), rng.choice((16, 32))
    )
    batch, chunk, context = rng.randrange(1, 9), rng.randrange(2, 40), rng.randrange(40, 150)
    every = cases(size, [rng.choice(DTYPES)], [batch], [chunk], [context])
    return rng.choice([case for case in every if case.op in ops and case.stored == "dense"])


def refused(style: str, kernels: int, seed: str) -> list[str]:
    """The refusals of so many random kernels of a style by the check of `bench.ops --kernel`, each with its reason."""
    rng = random.Random(seed)
    torch.manual_seed(rng.randrange(2**32))
    # The check looks at all objects several times for each kernel: not at those that were there before.
    gc.collect()
    gc.freeze()
    found = []
    try:
        with mock.patch.object(sys, "path", [*sys.path]), mock.patch.object(strict, "_random", random.Random(seed)):
            watch = Watch()
            file = user_kernels.load(str(HONEST / f"{style}.py"))
            watching = user_kernels.watching(watch, file.files)
            engine = Engine(style, lambda op, arguments: file.ops[op].bound(**arguments), watching)
            for _ in range(kernels):
                case = random_case(rng, file.ops)
                row = measure(case, engine, torch.device("cpu"), rounds=5)
                if not row.rounds:
                    found.append(f"{style}: {case.op}, {case.shape}, {name_of(case.dtype)}: {row.note}")
    finally:
        gc.unfreeze()
    return found
