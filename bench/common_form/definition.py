"""A definition: the shapes and dtypes of an op, and its meaning as Python code."""

import ast
import inspect
import operator
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fields import Fields, parse, read_text

# Of the common form's dtypes those whose results have a bound here.
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "bool")
OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
# The reference's module. With a name below bench. a Watch notices if a solution replaces something in it.
MODULE = "bench.common_form.loaded_reference"


class Unable(Exception):
    """Why a workload is not run."""


class Spec(NamedTuple):
    """An input or an output. shape: names of axes, or sizes in digits; None for a Python number."""

    shape: tuple[str, ...] | None
    dtype: torch.dtype

    def sizes(self, axes: dict[str, int]) -> list[int]:
        return [int(axis) if axis.isdigit() else axes[axis] for axis in self.shape or ()]


class Definition(NamedTuple):
    """axes: the size of each, an expression of others as text, or None if the workload gives it."""

    file: str
    name: str
    axes: dict[str, int | str | None]
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    reference: str
    custom_inputs: str | None  # the name of the reference's function that makes the inputs

    def sizes(self, given: dict[str, int]) -> dict[str, int]:
        """All axes. given: those that a workload gives."""
        known = {**{name: x for name, x in self.axes.items() if isinstance(x, int)}, **given}
        expressions = {name: _value(x, known, f"{self.file}: axes.{name}.expression")
                       for name, x in self.axes.items() if isinstance(x, str)}  # fmt: skip
        return known | expressions


def _value(expression: str, axes: dict[str, int], place: str) -> int:
    """An arithmetic expression of axes. Raises ValueError if it is anything else or no size."""

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name) and node.id in axes:
            return axes[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        raise ValueError(f"{place}: {expression!r} must be arithmetic of constant and variable axes")

    try:
        size = value(ast.parse(expression, mode="eval"))
    except (SyntaxError, ArithmeticError) as error:
        raise ValueError(f"{place}: {expression!r} can't be computed: {error}") from None
    if size != int(size) or size < 0:
        raise ValueError(f"{place}: {expression!r} is {size}, and must be a size")
    return int(size)


def _axis(axis: Fields) -> int | str | None:
    kind = axis.get("type", str)
    if kind == "const":
        value = axis.get("value", int)
        if value < 0:
            raise axis.error("value", f"is {value}, and must be a size")
        return value
    if kind == "expr":
        return axis.get("expression", str)
    if kind != "var":
        raise axis.error("type", f"is {kind!r}: there are const, var and expr")
    return None


def _spec(spec: Fields, axes: dict[str, Any]) -> Spec:
    dtype = spec.get("dtype", str)
    if dtype not in DTYPES:
        raise spec.error("dtype", f"{dtype} is not checked here: there are {', '.join(DTYPES)}")
    if "shape" not in spec.content:
        raise spec.error("shape", "is missing: it is an array of axes, or null for a Python number")
    shape = spec.find("shape", list)
    for axis in shape or ():
        if not isinstance(axis, str) or not (axis in axes or axis.isdigit()):
            raise spec.error("shape", f"there is no axis {axis!r}: axes has {', '.join(axes) or 'none'}")
    return Spec(None if shape is None else tuple(shape), getattr(torch, dtype))


def read(path: str) -> Definition:
    """Reads a definition; runs nothing of it. Raises ValueError, which names the file and the field."""
    whole = parse(read_text(path), path)
    if whole.find("op_type", str) == "sampling":
        raise whole.error("op_type", "is sampling, whose outputs are random: here they are compared one by one")
    axes_field, groups = whole.inner("axes"), [whole.inner("inputs"), whole.inner("outputs")]
    axes = {name: _axis(axes_field.inner(name)) for name in axes_field.content}
    inputs, outputs = ({name: _spec(group.inner(name), axes) for name in group.content} for group in groups)
    if not outputs:
        raise whole.error("outputs", "is empty")
    for name in outputs:
        if name in inputs:
            raise groups[1].error(name, "is the name of an input too")
    return Definition(
        path,
        whole.get("name", str),
        axes,
        inputs,
        outputs,
        whole.get("reference", str),
        whole.find("custom_inputs_entrypoint", str),
    )


def results_of(returned: Any, definition: Definition, device: torch.device) -> tuple[Any, ...]:
    """What `run` returned as a tuple, in the order of the outputs; Python numbers as tensors."""
    if isinstance(returned, dict):  # by the names of the outputs
        results = tuple(returned[name] for name in definition.outputs if name in returned)
    else:
        results = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
    for spec in definition.outputs.values():
        if spec.shape is None and len(results) == len(definition.outputs):
            results = tuple(
                torch.tensor(x, dtype=spec.dtype, device=device) if isinstance(x, (bool, int, float)) else x
                for x in results
            )
    return results


class Reference:
    """The code of a definition's reference, which is run here, when this is made."""

    def __init__(self, definition: Definition):
        self.definition = definition
        module = types.ModuleType(MODULE)
        sys.modules[MODULE] = module
        place = f"{definition.file}: reference"
        try:
            exec(compile(definition.reference, f"<{place}>", "exec"), vars(module))
        except Exception as error:
            raise ValueError(f"{place}: {type(error).__name__}: {error}") from None
        self.run = self._function("run", "reference")
        inputs = [*definition.inputs]
        if not takes(self.run, len(inputs)):
            raise ValueError(f"{place}: run{inspect.signature(self.run)} does not take the inputs {', '.join(inputs)}")
        self.custom_inputs: Callable[..., Any] | None = None
        if definition.custom_inputs:
            self.custom_inputs = self._function(definition.custom_inputs, "custom_inputs_entrypoint")

    def _function(self, name: str, field: str) -> Callable[..., Any]:
        function = vars(sys.modules[MODULE]).get(name)
        if not callable(function):
            raise ValueError(f"{self.definition.file}: {field}: the reference has no function {name!r}")
        return function

    def __call__(self, **arguments: Any) -> tuple[Tensor, ...]:
        """The outputs for these inputs: in the definition's dtypes; unrounded if the inputs were widened to float32.

        Raises Unable if the code fails or returns other shapes. Code that takes no widened inputs gets them rounded.
        """
        specs = self.definition.inputs
        widened = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.dtype != specs[name].dtype}
        device = next((x.device for x in arguments.values() if isinstance(x, Tensor)), torch.device("cpu"))
        try:
            try:
                returned = self.run(*arguments.values())
            except Exception:
                if not widened:
                    raise
                rounded = {name: x.to(specs[name].dtype) for name, x in widened.items()}
                returned = self.run(*(arguments | rounded).values())
        except Exception as error:
            raise Unable(f"{self.definition.file}: reference: {type(error).__name__}: {error}") from None
        results = results_of(returned, self.definition, device)
        if len(results) != len(self.definition.outputs) or not all(isinstance(x, Tensor) for x in results):
            raise Unable(f"{self.definition.file}: reference: run does not return {', '.join(self.definition.outputs)}")
        if widened:
            return results
        return tuple(x.to(spec.dtype) for x, spec in zip(results, self.definition.outputs.values(), strict=True))


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with `count` arguments by position."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # native code that does not say
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
