"""One name per op: in the reference, both backends, a test, a benchmark case and the table of kernels/README.md."""

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
from internlm3.kernels import cpu, reference, triton

KERNELS = Path(kernels.__file__).parent
TESTS = Path(__file__).parent


@pytest.mark.parametrize("module", [reference, cpu, triton], ids=["reference", "cpu", "triton"])
def test_the_names_are_the_same(module):
    functions = {name for name, _ in inspect.getmembers(module, inspect.isfunction) if not name.startswith("_")}
    missing, unknown = set(kernels.__all__) - functions, functions - set(kernels.__all__)
    assert not missing, f"{module.__name__} does not define {', '.join(sorted(missing))}"
    assert not unknown, f"{module.__name__} has {', '.join(sorted(unknown))}, which kernels.__all__ does not list"
    assert isinstance(module.ROW_COUNT_CHANGES_BITS, bool) and isinstance(module.INVARIANT_ROWS, int)


@pytest.mark.parametrize("name", kernels.__all__)
def test_the_signatures_are_the_same(name):
    sides = (inspect.signature(getattr(module, name)) for module in (reference, cpu, triton))
    expected, *found = ([(p.name, p.kind, p.default) for p in side.parameters.values()] for side in sides)
    assert found == [expected, expected]


def table():
    """The rows of the table in kernels/README.md: the op, its file, its test and its case, without links."""
    text = (KERNELS / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): [re.findall(r"`([^`]+)`", cell) for cell in row[3:]] for row in rows}


def test_the_table_has_every_op():
    missing = set(kernels.__all__) - table().keys()
    assert not missing, f"the table of kernels/README.md has no row of {', '.join(sorted(missing))}"
    assert [*table()] == sorted(kernels.__all__)


@pytest.mark.parametrize("name", table())
def test_the_table_is_true(name):
    """The file defines the op, the test has random cases of it, and bench/cases.py has a case of its name."""
    (file,), (test,), (case,) = table()[name]
    tree = ast.parse((KERNELS / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, file
    assert getattr(kernels, name).__module__.endswith(file.removesuffix(".py").replace("/", "."))
    random = rf'^@pytest.mark.op\(name="{name}"\)\n(@.*\n)*@settings'
    assert re.search(random, (TESTS / test).read_text(encoding="utf-8"), re.MULTILINE), f"{test} has no random cases"
    assert case == name and any(each.op == name for each in cases()), f"bench/cases.py has no case of {name}"


def test_every_kernel_that_is_launched_has_its_facts():
    """FACTS of bench/audit.py states the expected machine code of each kernel. A name may continue after a comma."""
    launched = set()
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                decorators = [x.func for x in node.decorator_list if isinstance(x, ast.Call)]
                launched |= {node.name for x in decorators if isinstance(x, ast.Name) and x.id == "jit"}
    tree = ast.parse((Path(__file__).parents[2] / "bench" / "audit.py").read_text("utf-8"))
    (facts,) = [x.value for x in tree.body if isinstance(x, ast.Assign) and x.targets[0].id == "FACTS"]
    assert {key.value.split(",")[0] for key in facts.keys} == launched


def carried(loop):
    """Names in a loop that are assigned the value of another name, which is assigned again later in the loop."""
    assigned = [
        {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)} for node in loop.body
    ]
    for line, node in enumerate(loop.body):
        if isinstance(node, ast.Assign):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            before, after = set().union(*assigned[:line]), set().union(*assigned[line:])
            yield from (x.id for x in values if isinstance(x, ast.Name) and x.id in after - before)


def test_no_loop_carries_the_old_value_of_a_name():
    """Triton up to 3.9 compiles `old = x` before `x = ...` in a loop as if x kept its value from before the loop.

    After the loop `old` is then that first value; the interpreter computes the right one.
    """
    wrong = "for step in range(8):\n  old, other = x, 1\n  new = x + 1\n  x = new"
    assert list(carried(ast.parse(wrong).body[0])) == ["x"]
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.For):
                assert not list(carried(node)), f"{path.name}:{node.lineno}"


def test_the_name_of_an_op_is_the_op():
    """Never its file, which may bear the same name, even where the file is imported first."""
    program = (
        "import importlib; importlib.import_module('internlm3.kernels.triton.linear')\n"
        "from internlm3 import kernels; from internlm3.kernels import triton\n"
        "assert all(callable(getattr(side, name)) for side in (kernels, triton) for name in kernels.__all__)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_only_the_triton_backend_needs_triton():
    program = "import sys; from internlm3.kernels import cpu, reference; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_reference_names_no_hardware():
    """It is the meaning of the ops. What is fast on a CPU belongs to the CPU backend."""
    for path in KERNELS.glob("reference*.py"):
        assert not re.search("amx|mkldnn|onednn|epyc|xeon|avx|torch.ops|_is_", path.read_text("utf-8").lower()), (
            path.name
        )


def test_no_backend_has_mutable_state():
    """No function of kernels/ rebinds a global name."""
    for path in KERNELS.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)], path.name


def test_one_place_chooses_the_backend():
    assert kernels.for_device(torch.device("cpu")) is cpu
    assert kernels.for_device(torch.device("cuda", 1)) is triton
    with pytest.raises(ValueError, match="no ops for device 'meta': move the model to 'cpu' or 'cuda'"):
        kernels.for_device(torch.device("meta"))


def test_unknown_ops_are_named():
    with pytest.raises(AttributeError, match="no attribute 'conv'; its ops are advance, count_prompt"):
        kernels.conv  # noqa: B018
