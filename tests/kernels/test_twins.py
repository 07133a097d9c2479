"""To find one is to find all: an op's Triton side, its twin, test, bench and audit case, and its kernels' facts."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.cases import cases
from internlm3 import kernels
from internlm3.kernels import reference


def test_the_names_are_the_same():
    functions = {name for name, _ in inspect.getmembers(reference, inspect.isfunction) if not name.startswith("_")}
    assert functions == set(kernels.__all__)


@pytest.mark.parametrize("name", kernels.__all__)
def test_the_signatures_are_the_same(name):
    triton, plain = (inspect.signature(getattr(side, name)).parameters.values() for side in (kernels, reference))
    assert [(p.name, p.kind, p.default) for p in triton] == [(p.name, p.kind, p.default) for p in plain]


@pytest.mark.parametrize("name", kernels.__all__)
def test_the_op_is_tested(name):
    """By random cases that say whose they are, so that tests/fuzz.py finds them."""
    tests = (path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    random = rf'^@pytest.mark.op\(name="{name}"\)\n(@.*\n)*@settings'
    assert any(re.search(random, text, re.MULTILINE) for text in tests), f"no file here tests {name} at random"


@pytest.mark.parametrize("name", kernels.__all__)
def test_the_op_has_a_case(name):
    """bench/cases.py is what the microbenchmarks time and what the audit compiles."""
    assert any(case.op == name for case in cases()), f"bench/cases.py has no case of {name}"


def test_every_kernel_that_is_launched_has_its_facts():
    """FACTS of bench/audit.py says of each what its machine code is meant to be; a name may go on behind a comma."""
    launched = set()
    for path in Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                decorators = [x.func for x in node.decorator_list if isinstance(x, ast.Call)]
                launched |= {node.name for x in decorators if isinstance(x, ast.Name) and x.id == "jit"}
    tree = ast.parse((Path(__file__).parents[2] / "bench" / "audit.py").read_text("utf-8"))
    (facts,) = [x.value for x in tree.body if isinstance(x, ast.Assign) and x.targets[0].id == "FACTS"]
    assert {key.value.split(",")[0] for key in facts.keys} == launched


def carried(loop):
    """Names in a loop to which a statement gives what another name had at its beginning, and has no more at its end."""
    assigned = [
        {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)} for node in loop.body
    ]
    for line, node in enumerate(loop.body):
        if isinstance(node, ast.Assign):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            before, after = set().union(*assigned[:line]), set().union(*assigned[line:])
            yield from (x.id for x in values if isinstance(x, ast.Name) and x.id in after - before)


def test_no_loop_carries_what_another_name_had():
    """Triton up to 3.9 takes `old = x` in front of `x = ...` in a loop for what both had before the loop.

    Behind it `old` is the first value, whatever the loop did; the interpreter gives the right one.
    """
    wrong = "for step in range(8):\n  old, other = x, 1\n  new = x + 1\n  x = new"
    assert list(carried(ast.parse(wrong).body[0])) == ["x"]
    for path in Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.For):
                assert not list(carried(node)), f"{path.name}:{node.lineno}"


def test_no_file_hides_an_op():
    """Importing kernels/<op>.py would bind the module where the op should be."""
    files = {path.stem for path in Path(reference.__file__).parent.glob("*.py")}
    assert not files & set(kernels.__all__)


def test_the_reference_needs_no_triton():
    program = "import sys; from internlm3.kernels import reference; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_one_place_chooses_the_backend():
    assert kernels.for_device(torch.device("cpu")) is reference
    assert kernels.for_device(torch.device("cuda", 1)) is kernels
    with pytest.raises(ValueError, match="no ops for device 'meta': move the model to 'cpu' or 'cuda'"):
        kernels.for_device(torch.device("meta"))


def test_unknown_ops_are_named():
    with pytest.raises(AttributeError, match="no attribute 'conv'; its ops are advance, embed"):
        kernels.conv  # noqa: B018
