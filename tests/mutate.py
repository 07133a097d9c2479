"""Plants one fault at a time in a Triton kernel and runs the tests of its op: python -m tests.mutate --op rms_norm

A fault (a mutant) changes a comparison, a mask, a cast, a bound, a sign or a number of a kernel. A mutant that no test
finds is printed, with its line. equivalent_mutants.txt lists those that change no result, with the reason: they are not
run. What only a GPU runs (PTX, programmatic dependent launch) and the launchers are not changed.

The tests are collected once. Each mutant runs in a fork of that process, in Triton's interpreter, until a test fails:
of the tests that call its function, and those first that found many in a short time. A test that takes twenty times as
long as without a fault counts as failed. Nothing is written to the checkout.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest

from bench import ROOT
from bench.options import one_of
from internlm3 import kernels

KERNELS = ROOT / "kernels" / "triton"
# The files whose kernels `tests/kernels/test_NAME.py` tests.
FILES = {
    **{op: (op,) for op in kernels.__all__ if (KERNELS / f"{op}.py").is_file()},
    "linear": ("linear_few_rows", "linear_fused"),
    "linear_quantised": ("linear_quantised", "dequantise", "fields"),
    "sample": ("sample", "sample_weights", "sample_search"),
}


class Place(NamedTuple):
    """An expression or a statement in a tree: parent.field, or parent.field[at]."""

    parent: ast.AST
    field: str
    at: int | None
    node: Any
    # The statement that it is part of.
    statement: ast.stmt

    def put(self, node: ast.AST) -> None:
        if self.at is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.at] = node


class Mutant(NamedTuple):
    file: str
    line: int
    # The statement, or the first line of a loop or branch, as it is and as it becomes.
    before: str
    after: str
    function: ast.FunctionDef
    place: Place
    node: ast.AST

    def __str__(self) -> str:
        return f"kernels/triton/{self.file}:{self.line}\n- {self.before}\n+ {self.after}"


# A bound moves by one in both directions: the new operator, and what is added to its right side.
BOUNDS: dict[type[ast.cmpop], list[tuple[ast.cmpop, int]]] = {
    ast.Lt: [(ast.LtE(), 0), (ast.Lt(), -1)],
    ast.LtE: [(ast.Lt(), 0), (ast.LtE(), 1)],
    ast.Gt: [(ast.GtE(), 0), (ast.Gt(), 1)],
    ast.GtE: [(ast.Gt(), 0), (ast.GtE(), -1)],
}
OPERATORS: dict[type[ast.operator], ast.operator] = {ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Div: ast.Mult()}
# Numbers in calls of these are shapes and axes: with others a kernel does not run.
SHAPES = {
    "arange", "argmax", "argmin", "cumsum", "full", "max", "min", "num_programs", "permute", "program_id", "reduce",
    "reshape", "static_range", "sum", "zeros",
}  # fmt: skip


def called(node: ast.AST) -> str:
    """The last name of what is called: "load" of tl.load(...); "" for what is no call."""
    return getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""


def plus(node: ast.expr, number: int) -> ast.expr:
    if not number:
        return node
    return ast.BinOp(node, ast.Add() if number > 0 else ast.Sub(), ast.Constant(abs(number)))


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What an expression or a statement may become."""
    match node:
        case ast.Compare(left, [operator], [right]):
            if isinstance(operator, (ast.Eq, ast.NotEq)):
                yield ast.Compare(left, [ast.NotEq() if isinstance(operator, ast.Eq) else ast.Eq()], [right])
            for other, number in BOUNDS.get(type(operator), []):
                yield ast.Compare(left, [other], [plus(right, number)])
        case ast.BinOp(left, ast.BitAnd() | ast.BitOr(), right):
            yield from (left, right)
        case ast.BinOp(left, ast.Mult() | ast.FloorDiv() | ast.Mod() | ast.LShift() | ast.RShift()):
            yield left
        case ast.BinOp(left, operator, right) if type(operator) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(operator)], right)
        case ast.UnaryOp(ast.USub() | ast.Invert(), operand):
            yield operand
        case ast.AugAssign(target, operator, value) if type(operator) in OPERATORS:
            yield ast.AugAssign(target, OPERATORS[type(operator)], value)
        case ast.AugAssign(ast.Name(name), _, value):
            yield ast.Assign([ast.Name(name, ast.Store())], value)
        case ast.Constant(int() as number) if not isinstance(number, bool):
            yield ast.Constant(number + 1)
        case ast.Constant(float() as number):
            yield ast.Constant(2 * number or 1.0)
        case ast.Call(function, arguments, keywords):
            match called(node), arguments:
                case "where", [_, *values]:
                    yield from values
                case "minimum" | "maximum", values:
                    yield from values
                case "cdiv", [dividend, divisor]:
                    yield ast.BinOp(dividend, ast.FloorDiv(), divisor)
                case "range", [start, end, *step]:
                    yield ast.Call(function, [start, plus(end, -1), *step], keywords)
                case "to", _ if isinstance(function, ast.Attribute):
                    yield function.value
            if any(keyword.arg == "mask" for keyword in keywords):
                yield ast.Call(function, arguments, [x for x in keywords if x.arg not in ("mask", "other")])


def fields(node: ast.AST) -> tuple[str, ...]:
    """The parts of a node in which something may be changed."""
    match node:
        case ast.FunctionDef():
            return ("body",)
        case ast.If(test) if ast.unparse(test).startswith(("PDL", "len(PTX)")):  # only on a GPU
            return ("orelse",)
        case ast.Subscript() | ast.AnnAssign():
            return ("value",)
        case _:
            return node._fields


def places(parent: ast.AST, statement: ast.stmt) -> Iterator[Place]:
    """What may be changed below a node."""
    for field in fields(parent):
        value = getattr(parent, field)
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            match node:
                case ast.Expr(ast.Constant()):  # a docstring
                    continue
                case ast.Constant() | ast.UnaryOp() | ast.Tuple() if called(parent) in SHAPES:
                    continue
                case ast.Constant() if isinstance(parent, ast.Compare) and type(parent.ops[0]) in BOUNDS:
                    continue  # it moves with its comparison
                case ast.keyword(name) if name not in ("mask", "other"):
                    continue
                case ast.AST() if called(node) != "device_assert":
                    inner = node if isinstance(node, ast.stmt) else statement
                    yield Place(parent, field, index, node, inner)
                    yield from places(node, inner)


def header(node: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(node)).splitlines()[0]


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether a function runs on a GPU: it is decorated by `jit(...)` or `triton.jit`."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def mutants(file: str, source: str) -> list[Mutant]:
    """All mutants of a file's kernels, by line. Of equal statements, the second and further ones have their number."""
    found = []
    equal: dict[str, list[ast.stmt]] = {}
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or not is_kernel(function):
            continue
        for place in [*places(function, function)]:
            before, whole = header(place.statement), place.node is place.statement
            same = equal.setdefault(before, [])
            if place.statement not in same:
                same.append(place.statement)
            number = f"  # {same.index(place.statement) + 1}" if place.statement is not same[0] else ""
            for node in changes(place.node):
                place.put(node)
                after = header(node if whole else place.statement)
                place.put(place.node)
                if after != before:
                    found.append(
                        Mutant(file, place.node.lineno, before + number, after + number, function, place, node)
                    )
    return sorted(found, key=lambda mutant: mutant.line)


def of_op(name: str) -> list[Mutant]:
    """The mutants of the files that an op's tests test."""
    return [x for file in FILES[name] for x in mutants(f"{file}.py", (KERNELS / f"{file}.py").read_text("utf-8"))]


def equivalent() -> dict[tuple[str, str, str], str]:
    """The reasons of equivalent_mutants.txt, by file, statement, and what it becomes."""
    reasons, file, before, reason = {}, "", "", ""
    for line in Path(__file__).with_name("equivalent_mutants.txt").read_text("utf-8").splitlines():
        if line.endswith(".py"):
            file = line
        elif line.startswith("- "):
            before = line[2:]
        elif line.startswith("+ "):
            reasons[file, before, line[2:]] = reason
        elif not line.startswith("#"):
            reason = line
    return reasons


def kernel_of(mutant: Mutant) -> Any:
    """The function that it changes, as Triton's interpreter runs it."""
    module = sys.modules[f"internlm3.kernels.triton.{mutant.file.removesuffix('.py')}"]
    return getattr(module, mutant.function.name)


@contextlib.contextmanager
def recorded_calls() -> Iterator[set[Any]]:
    """The kernels, and functions of kernels, that Triton's interpreter runs."""
    from triton.runtime.interpreter import InterpretedFunction

    called, rewrite = set(), InterpretedFunction.rewrite

    def recorded(kernel: Any) -> Any:
        called.add(kernel)
        return rewrite(kernel)

    InterpretedFunction.rewrite = recorded
    try:
        yield called
    finally:
        InterpretedFunction.rewrite = rewrite


def plant(mutant: Mutant) -> None:
    """Makes this process run the mutant, in Triton's interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    kernel = kernel_of(mutant)
    kernel.rewrite()
    mutant.place.put(mutant.node)
    mutant.function.decorator_list = []
    tree = kernel.rewriter.ast_transformer.visit(ast.Module([mutant.function], []))
    InterpretedFunction.rewritten_fn[kernel.fn] = kernel.rewriter._compile_and_exec(ast.fix_missing_locations(tree))


def ends_the_process(test: Callable[..., None]) -> Callable[..., None]:
    """The test of one case. Its failure ends the process, since Hypothesis would run it again and shrink the case."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            test(*args, **kwargs)
        except hypothesis.errors.UnsatisfiedAssumption:
            raise
        except Exception:
            os._exit(1)

    return run


class Run:
    """A plugin of pytest that runs the collected tests for each mutant."""

    def __init__(self, name: str, first: int, every: int):
        self.name, self.first, self.every = name, first, every
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, set[Any]] = {}
        self.found: dict[str, int] = {}
        self.failed = self.in_a_fork = False

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keeps the tests of the op's file, and the tests of `test_far_strides.py` with its ops or the same name."""
        file, table = f"test_{self.name}.py", (ROOT / "kernels" / "README.md").read_text("utf-8")
        ops = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `") and file in line]
        parameters = [getattr(item, "callspec", None) for item in items]
        given = [callspec.params.get("op") if callspec else None for callspec in parameters]
        items[:] = [
            item for item, op in zip(items, given, strict=True) if item.path.name == file or op in (*ops, self.name)
        ]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        importlib.import_module("internlm3.kernels.triton")
        for item in session.items:  # in this process, so that no fork imports and caches the same things again
            began = time.monotonic()
            with recorded_calls() as self.calls[item.nodeid]:
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            self.seconds[item.nodeid] = time.monotonic() - began
        if self.failed:
            raise pytest.UsageError("the tests fail without a fault")
        chosen, known, listed, survivors = of_op(self.name), equivalent(), 0, 0
        print(f"\n{len(chosen)} mutants, and {sum(self.seconds.values()):.0f} s of tests", flush=True)
        numbers = range(self.first, len(chosen), self.every)
        for number in numbers:
            mutant = chosen[number]
            if (mutant.file, mutant.before, mutant.after) in known:
                listed += 1
            elif not self.finds(session.items, mutant):
                survivors += 1
                print(f"survives: {number}, {mutant}", flush=True)
        run = len(numbers) - listed
        print(f"{self.name}: {run} run, {run - survivors} found, {survivors} survive; {listed} are equivalent")
        session.testsfailed = survivors
        return True

    def finds(self, items: list[pytest.Item], mutant: Mutant) -> bool:
        """Whether a test fails in a fork of this process, in which the mutant is planted."""
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            callers = [item for item in items if kernel_of(mutant) in self.calls[item.nodeid]]
            self.in_fork(sorted(callers, key=self.cost), mutant, writer)
        os.close(writer)
        test = ""
        with open(reader, encoding="utf-8") as lines:
            for line in lines:
                word, text = line.rstrip("\n").split(" ", 1)
                if word == "broken":
                    raise RuntimeError(f"{mutant}\n{ast.literal_eval(text)}")
                test = text
        if os.waitpid(child, 0)[1] == 0:
            return False
        self.found[test] = self.found.get(test, 0) + 1
        return True

    def cost(self, item: pytest.Item) -> float:
        """Seconds for each mutant that a test found."""
        return (self.seconds[item.nodeid] + 0.01) / (self.found.get(item.nodeid, 0) + 1)

    def in_fork(self, items: list[pytest.Item], mutant: Mutant, pipe: int) -> None:
        self.in_a_fork = True
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            plant(mutant)
            for item in items:
                if random := getattr(item.obj, "hypothesis", None):  # type: ignore[attr-defined]
                    random.inner_test = ends_the_process(random.inner_test)
                os.write(pipe, f"test {item.nodeid}\n".encode())
                signal.setitimer(signal.ITIMER_REAL, 20 * self.seconds[item.nodeid] + 20)  # SIGALRM ends the process
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            os._exit(0)
        except BaseException:
            os.write(pipe, f"broken {traceback.format_exc()!r}\n".encode())
            os._exit(2)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.in_a_fork:
            os._exit(1)
        self.failed |= report.failed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", required=True, type=one_of("op", FILES), help=f"one of {', '.join(FILES)}")
    parser.add_argument("--first", type=int, default=0, help="go on from this mutant; they are numbered from 0")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run only every N-th mutant from there on")
    options = parser.parse_args()
    if options.first < 0 or options.every < 1:
        parser.error("--first must be 0 or more, and --every 1 or more")
    tests = [f"tests/kernels/test_{name}.py" for name in (options.op, "far_strides")]
    plugins = [word for name in ("xdist", "cacheprovider", "faulthandler", "warnings") for word in ("-p", f"no:{name}")]
    os.chdir(ROOT)
    arguments = ["-q", "-s", "--no-header", "--tb=no", *plugins, *tests]
    return int(pytest.main(arguments, [Run(options.op, options.first, options.every)]))


if __name__ == "__main__":
    sys.exit(main())
