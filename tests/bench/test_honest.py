"""Honest kernels are timed: of random ones in every style of tests/bench/honest the check refuses none.

A style is a file of ops as people write them. What needs a GPU is played for a CPU: a CUDA graph by a graph of
PyTorch's operations with static inputs and a static output, Triton by its interpreter.
"""

import gc
import random
import sys
from pathlib import Path

import pytest
import torch

from bench import strict, user_kernels
from bench.cases import Size, cases
from bench.integrity import Watch
from bench.measure import Engine, measure, share_memory
from bench.timing import name_of

HONEST = Path(__file__).parent / "honest"
STYLES = sorted(path.stem for path in HONEST.glob("*.py"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = 24  # of each style
FEWER = {"compiled": 3, "triton_kernels": 5}  # of those that take long
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="graph and compiler are played for a CPU")


@pytest.fixture(autouse=True)
def few_objects():
    """The check looks at all objects several times for each kernel: not at those that were there before the test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def random_case(rng, ops):
    """An op of these at random sizes, without quantised weights."""
    width = rng.choice((16, 24, 32, 64, 200))
    size = Size(
        width, rng.choice((24, 48, 130)), rng.randrange(20, 300), 4, rng.choice((1, 2, 4)), rng.choice((16, 32))
    )
    batch, chunk, context = rng.randrange(1, 9), rng.randrange(2, 40), rng.randrange(40, 150)
    every = cases(size, [rng.choice(DTYPES)], [batch], [chunk], [context])
    return rng.choice([case for case in every if case.op in ops and case.stored == "dense"])


@pytest.mark.parametrize("style", STYLES)
def test_no_honest_kernel_is_refused(style, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    rng = random.Random(style)
    torch.manual_seed(rng.randrange(2**32))
    monkeypatch.setattr(strict, "_random", random.Random(style))
    watch = Watch()
    file = user_kernels.load(str(HONEST / f"{style}.py"))
    watching = user_kernels.watching(watch, file.files)
    engine = Engine(style, lambda op, arguments: file.ops[op].bound(**arguments), watching)
    refused = []
    for _ in range(FEWER.get(style, KERNELS)):
        case = random_case(rng, file.ops)
        row = measure(case, engine, torch.device("cpu"), rounds=5)
        if not row.rounds:
            refused.append(f"{case.op}, {case.shape}, {name_of(case.dtype)}: {row.note}")
    assert not refused, "\n".join(refused)


def test_a_static_output_is_timed_alone():
    """Where a graph has many calls, of one that returns the same memory from each only the last could be checked."""
    static = torch.zeros(3)
    shared, fresh = (
        [strict.Kept(call, {}) for _ in range(2)] for call in (lambda: (static[:2],), lambda: torch.ones(3))
    )
    nothing = [strict.Kept(lambda: None, {}) for _ in range(2)]
    for calls, expected in ((shared, True), (fresh, False), (nothing, False)):
        calls[0]()
        assert share_memory(*calls) == expected


def test_there_are_200_of_them():
    assert sum(FEWER.get(style, KERNELS) for style in STYLES) >= 200
