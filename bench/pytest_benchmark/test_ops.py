"""The microbenchmarks under pytest-benchmark, which compares runs: pytest bench/test_kernels.py --benchmark-autosave

Each case is our engine's, by the very rounds that bench/kernels.py takes: pytest-benchmark is given their times, a call
each, and so has the table's median. Without an accelerator the group's name says what is timed.
"""

import sys
from pathlib import Path

import pytest
import torch

# The benches are scripts that stand beside each other, not a package; before the repository's own kernels/.
sys.path.insert(0, str(Path(__file__).parent))
from ..cases import INTERNLM3_8B, SMALL, Case, cases
from ..record import Figure
from ..timing import name_of

from ..ops import ours, prepare

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
GROUP = (
    "Triton, InternLM3-8B's shapes" if ON_GPU else "the plain PyTorch of the ops, a small model's shapes; not Triton"
)
ROUNDS = 20


class Clock:
    """Stands still but for the times that it is given."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = Clock()


CASES = list(cases(INTERNLM3_8B if ON_GPU else SMALL))


@pytest.mark.benchmark(group=GROUP, timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}, {case.shape}")
def test_kernel(benchmark, case: Case) -> None:
    engine, make = ours(DEVICE)
    prepared = prepare(case, make, DEVICE)
    benchmark.extra_info.update(
        engine=engine,
        dtype=name_of(case.dtype),
        calls=prepared.calls,
        bytes=prepared.bytes,
        operations=prepared.operations,
        cold=prepared.cold,
    )
    rounds, times = prepared.rounds(), []

    def run() -> None:
        times.append(next(rounds))
        CLOCK.seconds += times[-1] / 1e6

    benchmark.pedantic(run, rounds=ROUNDS)
    if benchmark.stats:  # --benchmark-disable has none
        figure = Figure(case.op, case.shape, name_of(case.dtype), case.rows, case.context, engine, rounds=times)
        assert benchmark.stats.stats.median * 1e6 == pytest.approx(figure.microseconds), "not what the table says"
