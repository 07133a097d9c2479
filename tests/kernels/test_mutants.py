"""The faults that tests/mutate.py plants."""

import ast

import pytest
import torch

from internlm3 import kernels
from internlm3.kernels.triton.launch import INTERPRETED
from internlm3.tests import mutate
from internlm3.tests.kernels.support import DEVICE, module_of

KERNEL = '''
@jit()
def _copy(x_ptr, y_ptr, C: tl.constexpr, PDL: tl.constexpr):
    """Sums are not planted in 1 + 1."""
    if PDL:
        wait(2)
    at = tl.program_id(0) + tl.arange(0, 16)
    x = tl.load(x_ptr + at, mask=at < C, other=0.0)
    tl.store(y_ptr + at, x.to(tl.float16))

def launch(x):
    return x + 1
'''


def test_a_kernel_has_these_mutants():
    load = "x = tl.load(x_ptr + at, mask=at < C, other=0.0)"
    assert [(x.line, x.after) for x in mutate.mutants("copy.py", KERNEL)] == [
        (7, "at = tl.program_id(0) - tl.arange(0, 16)"),
        (8, "x = tl.load(x_ptr + at)"),
        (8, load.replace("x_ptr +", "x_ptr -")),
        (8, load.replace("<", "<=")),
        (8, load.replace("C", "C - 1")),
        (8, load.replace("0.0", "1.0")),
        (9, "tl.store(y_ptr - at, x.to(tl.float16))"),
        (9, "tl.store(y_ptr + at, x)"),
    ]


@pytest.mark.skipif(not INTERPRETED, reason="mutants run in Triton's interpreter")
def test_a_planted_mutant_runs():
    from triton.runtime.interpreter import InterpretedFunction

    x = torch.ones(1, 16, device=DEVICE)
    expected = kernels.swiglu(x)
    (mutant,) = [x for x in mutate.of_op("swiglu") if x.after == "return x * (1.0 + tl.exp(-x))"]
    mutate.plant(mutant)
    try:
        assert not torch.equal(kernels.swiglu(x), expected)
    finally:
        del InterpretedFunction.rewritten_fn[module_of(kernels.swiglu).silu.fn]
    assert torch.equal(kernels.swiglu(x), expected)


def test_every_kernel_has_mutants():
    with_kernels = set()
    for path in mutate.KERNELS.glob("*.py"):
        functions = [x for x in ast.parse(path.read_text("utf-8")).body if isinstance(x, ast.FunctionDef)]
        if any(mutate.is_kernel(function) for function in functions):
            with_kernels.add(path.stem)
    missing = with_kernels - {file for files in mutate.FILES.values() for file in files}
    assert not missing, f"FILES of tests/mutate.py has no {', '.join(sorted(missing))}"


def test_what_is_listed_as_equivalent_is_a_mutant():
    listed = mutate.equivalent()
    files = {file: (mutate.KERNELS / file).read_text("utf-8") for file, _, _ in listed}
    there = {(x.file, x.before, x.after) for file, source in files.items() for x in mutate.mutants(file, source)}
    for entry, reason in listed.items():
        assert entry in there, f"equivalent_mutants.txt lists what is no mutant any more: {entry}"
        assert reason
