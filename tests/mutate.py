"""Plants one fault at a time in a Triton kernel, and runs the tests of its op: python -m tests.mutate --op rope_and_cache

A fault (a mutant) changes a comparison, a mask, a cast, a bound, a sign or a number. One that no test finds survives
and is printed with its line. `equivalent_mutants.txt` lists those that change no result, with the reason, and they are
not run. Nothing is written to the checkout.

The tests are collected once. Each mutant runs in a fork of that process, in Triton's interpreter, until a test fails.
The tests that found the most in the least time run first. A kernel that does not return is stopped, and counts as
found.
"""

import argparse
import ast
import copy
import importlib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest

from bench import ROOT
from bench.options import one_of, positive
from internlm3 import kernels

FOLDER = ROOT / "kernels" / "triton"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
# What to mutate for `tests/kernels/test_NAME.py`: the file of that name, or these.
FILES = {
    "linear": ["linear_few_rows", "linear_fused"],
    "linear_quantised": ["linear_quantised", "dequantise"],
    "sample": ["sample", "sample_weights", "sample_search"],
}
NAMES = sorted({*(path.stem.removeprefix("test_") for path in (ROOT / "tests/kernels").glob("test_*.py"))} & (
    {path.stem for path in FOLDER.glob("*.py")} | {*FILES}
))  # fmt: skip


class Mutant(NamedTuple):
    """A statement of a kernel, and what it becomes."""

    file: str
    line: int
    function: str
    before: str
    after: str
    # The function's definition after the change.
    tree: ast.FunctionDef

    def __str__(self) -> str:
        return f"kernels/triton/{self.file}:{self.line}\n- {self.before}\n+ {self.after}"


# Loosened or tightened by one step, and by one step in the other direction: the operator, what is added to the right.
SHIFTED: dict[type[ast.cmpop], list[tuple[ast.cmpop, int]]] = {
    ast.Lt: [(ast.LtE(), 0), (ast.Lt(), -1)],
    ast.LtE: [(ast.Lt(), 0), (ast.LtE(), 1)],
    ast.Gt: [(ast.GtE(), 0), (ast.Gt(), 1)],
    ast.GtE: [(ast.Gt(), 0), (ast.GtE(), -1)],
    ast.Eq: [(ast.NotEq(), 0)],
    ast.NotEq: [(ast.Eq(), 0)],
}
SWAPPED: dict[type[ast.operator], ast.operator] = {ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Div: ast.Mult()}
LEFT_ALONE = (ast.Mult, ast.FloorDiv, ast.Mod, ast.LShift, ast.RShift)
# Numbers in these are shapes, axes and options of compilation: other ones do not run.
SHAPES = {
    "arange", "program_id", "num_programs", "zeros", "full", "sum", "max", "min", "argmax", "argmin", "cumsum",
    "permute", "reshape", "expand_dims", "static_range", "device_assert", "reduce",
}  # fmt: skip


def name_of(node: ast.AST) -> str:
    """The last name of what is called: "load" of tl.load(...)."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", getattr(node.func, "id", ""))
    return ""


def plus(node: ast.expr, number: int) -> ast.expr:
    if number == 0:
        return node
    return ast.BinOp(node, ast.Add() if number > 0 else ast.Sub(), ast.Constant(abs(number)))


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What one expression or augmented assignment of a kernel may become."""
    name = name_of(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for operator, number in SHIFTED.get(type(node.ops[0]), []):
            yield ast.Compare(node.left, [operator], [plus(node.comparators[0], number)])
    elif isinstance(node, ast.BinOp):
        if isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            yield from (node.left, node.right)
        elif isinstance(node.op, LEFT_ALONE):
            yield node.left
        elif type(node.op) in SWAPPED:
            yield ast.BinOp(node.left, SWAPPED[type(node.op)], node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert)):
        yield node.operand
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPPED:
        yield ast.AugAssign(node.target, SWAPPED[type(node.op)], node.value)
    elif isinstance(node, ast.AugAssign):
        yield ast.Assign([ast.Name(ast.unparse(node.target), ast.Store())], node.value)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Constant) and type(node.value) is float:
        yield ast.Constant(2 * node.value or 1.0)
    elif isinstance(node, ast.Call):
        if name == "where":
            yield from node.args[1:]
        elif name in ("minimum", "maximum"):
            yield from node.args[:2]
        elif name == "cdiv":
            yield ast.BinOp(node.args[0], ast.FloorDiv(), node.args[1])
        elif name == "range" and len(node.args) > 1:
            yield ast.Call(node.func, [node.args[0], plus(node.args[1], -1), *node.args[2:]], node.keywords)
        elif name == "to" and isinstance(node.func, ast.Attribute):
            yield node.func.value
        if any(keyword.arg == "mask" for keyword in node.keywords):
            kept = [keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")]
            yield ast.Call(node.func, node.args, kept)


def compiled_away(node: ast.AST) -> bool:
    """Whether this is an `if` for what the interpreter has not: dependent launches, and PTX."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("PDL", "len(PTX) > 0")


def places(node: ast.AST, statement: ast.stmt) -> Iterator[tuple[ast.AST, ast.stmt]]:
    """The expressions below a node that may be changed, each with its statement."""
    for field, value in ast.iter_fields(node):
        if compiled_away(node) and field in ("test", "body"):
            continue
        if field in ("decorator_list", "args" if isinstance(node, ast.FunctionDef) else "", "annotation", "slice"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            inner = child if isinstance(child, ast.stmt) else statement
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            shape = name_of(node) in SHAPES and isinstance(child, (ast.Constant, ast.UnaryOp, ast.Tuple))
            option = isinstance(child, ast.keyword) and child.arg not in ("mask", "other")
            if docstring or shape or option or name_of(child) == "device_assert":
                continue
            yield child, inner
            yield from places(child, inner)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


def header(statement: ast.stmt) -> str:
    """A statement in one line, without the body of a loop or a branch."""
    return ast.unparse(statement).splitlines()[0]


def is_kernel(node: ast.AST) -> bool:
    """Whether this defines a function that is decorated by `jit(...)` or `triton.jit`."""
    return isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in node.decorator_list)


def mutants(file: str, source: str) -> list[Mutant]:
    """All mutants of a file's kernels, by line."""
    found = []
    for function in ast.parse(source).body:
        if not is_kernel(function):
            continue
        for number, (place, statement) in enumerate(places(function, function)):
            before = header(statement)
            for choice in range(len([*replacements(place)])):
                whole = copy.deepcopy(function)
                old, around = [*places(whole, whole)][number]
                new = ast.fix_missing_locations(ast.copy_location([*replacements(old)][choice], old))
                changed = _Replace(old, new).visit(whole)
                after = header(new if around is old else around)
                if after != before:
                    found.append(Mutant(file, place.lineno, function.name, before, after, changed))
    return sorted(found, key=lambda mutant: mutant.line)


def equivalent() -> dict[tuple[str, str, str], str]:
    """The reasons of equivalent_mutants.txt, by file, statement, and what it becomes."""
    text = EQUIVALENT.read_text("utf-8")
    reasons, file, before, why = {}, "", "", ""
    for line in text.splitlines():
        if line.endswith(".py"):
            file = line
        elif line.startswith("- "):
            before = line[2:]
        elif line.startswith("+ "):
            reasons[file, before, line[2:]] = why
        elif line and not line.startswith("#"):
            why = line
    return reasons


def plant(mutant: Mutant) -> None:
    """Makes this process run the mutant."""
    from triton.runtime.interpreter import InterpretedFunction

    module = sys.modules[f"internlm3.kernels.triton.{mutant.file.removesuffix('.py')}"]
    kernel = getattr(module, mutant.function)
    kernel.rewrite()  # fills the module's globals with what rewritten code needs
    mutant.tree.decorator_list = []
    tree = kernel.rewriter.ast_transformer.visit(ast.Module([mutant.tree], []))
    InterpretedFunction.rewritten_fn[kernel.fn] = kernel.rewriter._compile_and_exec(ast.fix_missing_locations(tree))


class Tests:
    """The collected tests, and what each has found: a plugin of pytest that runs them once for each mutant."""

    def __init__(self, name: str, chosen: list[Mutant], minutes: float):
        self.name, self.mutants, self.end = name, chosen, time.monotonic() + 60 * minutes
        self.seconds: dict[str, float] = {}
        self.found: dict[str, int] = {}
        self.survivors: list[Mutant] = []
        self.pipe = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        table = (ROOT / "kernels" / "README.md").read_text("utf-8")
        ops = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `") and self.file in line]
        items[:] = [item for item in items if item.path.name == self.file or _parameter(item, "op") in ops]

    @property
    def file(self) -> str:
        return f"test_{self.name}.py"

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        importlib.import_module("internlm3.kernels.triton")
        failed = self.run(session.items, None)
        if failed:
            print(f"{failed} fails without a fault: no mutant can be judged")
            session.testsfailed = 1
            return True
        print(
            f"{len(self.mutants)} mutants of {self.name}; its tests take {sum(self.seconds.values()):.0f} s", flush=True
        )
        for done, mutant in enumerate(self.mutants):
            if time.monotonic() > self.end:
                print(f"{len(self.mutants) - done} mutants were not run: go on from --first {done}")
                break
            failed = self.run(session.items, mutant)
            if not failed:
                self.survivors.append(mutant)
                print(mutant, flush=True)
            if os.environ.get("VERBOSE"):
                print(done, failed, mutant, flush=True)
        else:
            done += 1
        print(f"{self.name}: {done} mutants, {done - len(self.survivors)} found, {len(self.survivors)} survive")
        session.testsfailed = len(self.survivors)
        return True

    def run(self, items: list[pytest.Item], mutant: Mutant | None) -> str:
        """The test that fails in a fork of this process, with the mutant planted; "" if none does."""
        order = sorted(items, key=lambda x: (self.seconds.get(x.nodeid, 0) + 0.01) / (1 + self.found.get(x.nodeid, 0)))
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            self.in_child(order, mutant, writer)
        os.close(writer)
        last, text = "its import", ""
        with open(reader, encoding="utf-8") as lines:
            for line in lines:
                word, text = line.rstrip("\n").split(" ", 1)
                if word == "begins":
                    last = text
                elif word == "broken":
                    raise RuntimeError(f"{mutant}\n{ast.literal_eval(text)}")
                elif mutant is None:
                    self.seconds[last] = float(text)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return ""
        self.found[last] = self.found.get(last, 0) + 1
        return last

    def in_child(self, items: list[pytest.Item], mutant: Mutant | None, pipe: int) -> None:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        self.pipe = pipe
        try:
            if mutant is not None:
                plant(mutant)
            for item in items:
                self.report(f"begins {item.nodeid}")
                began = time.monotonic()
                if mutant is not None:  # SIGALRM ends this process
                    signal.setitimer(signal.ITIMER_REAL, 20 * self.seconds.get(item.nodeid, 60) + 20)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                self.report(f"ends {time.monotonic() - began}")
            os._exit(0)
        except BaseException:
            self.report(f"broken {traceback.format_exc()!r}")
            os._exit(2)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os._exit(1)

    def report(self, line: str) -> None:
        os.write(self.pipe, f"{line}\n".encode())


def _parameter(item: pytest.Item, name: str) -> Any:
    return item.callspec.params.get(name) if hasattr(item, "callspec") else None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", required=True, type=one_of("op", NAMES), help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--first", type=int, default=0, help="the number of the first mutant to run; default: 0")
    parser.add_argument("--minutes", type=float, default=20, help="start no mutant after this long; default: 20")
    parser.add_argument("--list", action="store_true", help="print the mutants, and run none")
    options = parser.parse_args()
    chosen = [
        mutant
        for file in FILES.get(options.op, [options.op])
        for mutant in mutants(f"{file}.py", (FOLDER / f"{file}.py").read_text("utf-8"))
    ]
    known = equivalent()
    chosen = [x for x in chosen if (x.file, x.before, x.after) not in known][options.first :]
    if options.list:
        print(*chosen, f"{len(chosen)} mutants", sep="\n")
        return 0
    # A failure is not made smaller, which takes long in the interpreter.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile(
        "mutate",
        derandomize=True,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
    )
    folder = ROOT / "tests" / "kernels"
    paths = [str(folder / f"test_{options.op}.py"), str(folder / "test_far_strides.py")]
    settings = [
        "-q",
        "--no-header",
        "--tb=no",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        "-p",
        "no:warnings",
    ]
    plugin = Tests(options.op, chosen, options.minutes)
    return int(
        pytest.main(
            [
                *paths,
                *settings,
                "-s",
                "--rootdir",
                str(ROOT),
                "-c",
                str(ROOT / "pyproject.toml"),
                "--hypothesis-profile",
                "mutate",
            ],
            [plugin],
        )
    )


if __name__ == "__main__":
    sys.exit(main())
