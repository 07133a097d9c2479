"""Honest kernels are timed: of random ones in every style of tests/bench/honest the check refuses none.

What needs a GPU is played for a CPU: a CUDA graph by a graph of PyTorch's operations with static inputs and a static
output, Triton by its interpreter. tests/honest.py takes 200 new ones.
"""

import pytest
import torch

from bench import strict
from bench.measure import share_memory
from internlm3.tests.support.honest_kernels import STYLES, refused

KERNELS = 4  # of each style
FEWER = {"compiled": 2, "triton_kernels": 3}  # of those that take long
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="graph and compiler are played for a CPU")


@pytest.mark.parametrize("style", STYLES)
def test_no_honest_kernel_is_refused(style):
    found = refused(style, FEWER.get(style, KERNELS), style)
    assert not found, "\n".join(found)


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
