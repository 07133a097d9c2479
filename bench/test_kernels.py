"""The microbenchmarks under pytest-benchmark, which compares runs: pytest bench/test_kernels.py --benchmark-autosave"""

import sys
from pathlib import Path

import pytest
import torch

# The benches are scripts that stand beside each other, not a package.
sys.path.insert(0, str(Path(__file__).parent))
from cases import INTERNLM3_8B, Case, cases

from kernels import SMALL, prepare

ON_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("case", cases(INTERNLM3_8B if ON_GPU else SMALL), ids=lambda case: f"{case.op}, {case.shape}")
def test_kernel(benchmark, case: Case) -> None:
    ours = next(prepare(case, torch.device("cuda", 0) if ON_GPU else torch.device("cpu")))
    benchmark.extra_info.update(engine=ours.engine, calls=ours.calls, bytes=ours.bytes, cold=ours.cold)

    def run() -> None:
        ours.call()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark(run)
