"""The microbenchmarks under pytest-benchmark, which stores and compares runs:

    pytest bench/pytest_benchmark --benchmark-autosave

Each case is our engine's, timed by the same rounds as in `python -m bench.ops`: pytest-benchmark gets their times, one
call each, so its median is that of the table. Without a GPU the name of the group says what is timed.
"""

import statistics

import pytest
import torch

from bench.cases import INTERNLM3_8B, SMALL, Case, cases
from bench.measure import ours, prepare
from bench.timing import name_of

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
GROUP = "Triton, InternLM3-8B's shapes" if ON_GPU else "the ops' PyTorch backend, a small model's shapes; not Triton"
ROUNDS = 20


class Clock:
    """A timer for pytest-benchmark that advances only when a round's time is added to it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = Clock()


@pytest.mark.benchmark(group=GROUP, timer=CLOCK)
@pytest.mark.parametrize("case", [*cases(INTERNLM3_8B if ON_GPU else SMALL)], ids=lambda x: f"{x.op}, {x.shape}")
def test_op(benchmark, case: Case) -> None:
    engine, make = ours(DEVICE)
    prepared = prepare(case, make, DEVICE)
    benchmark.extra_info.update(
        engine=engine,
        dtype=name_of(case.dtype),
        calls=prepared.calls,
        bytes=prepared.bytes,
        flops=prepared.flops,
        cold=prepared.cold,
    )
    rounds, times = prepared.rounds(), []

    def run() -> None:
        times.append(next(rounds))
        CLOCK.seconds += times[-1] / 1e6

    benchmark.pedantic(run, rounds=ROUNDS)
    if benchmark.stats:  # absent under --benchmark-disable
        assert benchmark.stats.stats.median * 1e6 == pytest.approx(statistics.median(times)), "not the table's median"
