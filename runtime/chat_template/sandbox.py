"""The sandbox of chat templates, with limits on time and size.

Templates are untrusted code. They run in Jinja's immutable sandbox without access to Python's internals. One rendering
takes at most `SECONDS`, checked in every iteration of a loop and every call of a macro, and creates no value larger
than `SIZE`, checked before an operation that could create one.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import generate_lorem_ipsum

SECONDS = 10.0
SIZE = 10_000_000  # characters, or elements of lists and objects, nested ones included

# Private-use characters around the text of a generation block, when its position is asked for.
GENERATION_BEGIN, GENERATION_END = "\U000f0002", "\U000f0003"

# Types whose length counts towards SIZE.
_SIZED = (str, bytes, list, tuple, dict)
# Filters that read only the outermost list, so that nested elements need not be counted.
_SHALLOW = frozenset(
    ("count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr", "reverse",
     "select", "selectattr")
)  # fmt: skip

_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))
_marking: ContextVar[bool] = ContextVar("marking", default=False)


@contextmanager
def limits(marking: bool) -> Iterator[None]:
    """Starts the time limit of a rendering. `marking`: put GENERATION_BEGIN and GENERATION_END around blocks."""
    tokens = _deadline.set(time.monotonic() + SECONDS), _marking.set(marking)
    try:
        yield
    finally:
        _deadline.reset(tokens[0])
        _marking.reset(tokens[1])


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks text for training masks; renders as its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares tags this way)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return GENERATION_BEGIN + caller() + GENERATION_END if _marking.get() else caller()


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox. Exceeding a limit raises SecurityError."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"],
                         finalize=_checked)  # fmt: skip
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, lipsum=_lipsum)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")

    @staticmethod
    def tick() -> bool:
        if time.monotonic() > _deadline.get():
            raise SecurityError(f"it runs for more than {SECONDS:g} seconds")
        return True

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        return "".join(_counted(parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_growth(operator, (left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes)):
            args, kwargs = _listed(args, kwargs)
            _check_growth(method.__name__, (owner, *args, *kwargs.values()))
        return super().call(context, function, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Adds a tick to every loop and macro, and replaces every `~` by the filter `join`, which is checked."""
        tree = super()._parse(source, name, filename)
        for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
            block: Any
            for block in list(tree.find_all(kind)):
                tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None, lineno=block.lineno)
                block.body.insert(0, nodes.ExprStmt(tick, lineno=block.lineno))
                if isinstance(block, nodes.For) and block.test is not None:
                    block.test = nodes.And(tick, block.test, lineno=block.lineno)
        for parent in list(tree.find_all(nodes.Node)):
            for field, value in parent.iter_fields():
                if isinstance(value, nodes.Concat):
                    setattr(parent, field, _joining(value))
                elif isinstance(value, list):
                    value[:] = [_joining(item) if isinstance(item, nodes.Concat) else item for item in value]
        tree.set_environment(self)
        return tree


def _joining(concat: nodes.Concat) -> nodes.Filter:
    return nodes.Filter(nodes.List(concat.nodes), "join", [], [], None, None, lineno=concat.lineno)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks the size of its result before it runs."""

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _listed(args, kwargs)
        if name not in _SHALLOW:
            _check_growth(name, (*args, *kwargs.values()))
        return function(*args, **kwargs)

    return bounded


def _listed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with iterators turned into lists, since an iterator has no length."""

    def listed(value: Any) -> Any:
        return list(_counted(value)) if isinstance(value, Iterator) else value

    return tuple(map(listed, args)), {name: listed(value) for name, value in kwargs.items()}


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    """Yields the values. Raises SecurityError once their total size or the time exceeds the limit."""
    size = 0
    for value in values:
        Environment.tick()
        size += len(value) if isinstance(value, _SIZED) else 1
        _check_size(size)
        yield value


def _check_size(size: int) -> None:
    if size > SIZE:
        raise SecurityError(f"it makes something of more than {SIZE} characters or elements")


def _checked(value: Any) -> Any:
    """`value`. Raises SecurityError if it is too large."""
    _size(value)
    return value


def _size(value: Any) -> int:
    """The size of a value, nested values included. An object counts each time it occurs, as it is printed each time.

    Raises SecurityError if it is too large.
    """
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        size += len(item) + 1 if isinstance(item, _SIZED) else 1
        _check_size(size)
        if isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
    return size


def _check_growth(operation: str, values: Sequence[Any]) -> None:
    """Raises SecurityError if the result of an operator, a filter or a string method may be too large."""
    total = sum(map(_size, values))
    numbers = [value for value in values if isinstance(value, int)]
    lengths = [len(value) for value in values if isinstance(value, _SIZED)]
    texts = [value for value in values if isinstance(value, str)]
    number, text = max(numbers, default=0), texts[0] if texts else ""
    if operation in ("*", "**") and len(numbers) == 2:
        bits = [value.bit_length() for value in numbers]
        size = 1000 * (bits[0] * max(numbers[1], 1) if operation == "**" else sum(bits))
    elif operation == "*":
        size = max(lengths, default=0) * number
    elif operation in ("%", "format", "format_map") and text:
        # A width is written in the format, or passed as a value.
        size = sum(lengths) + sum(int(width[:18]) for width in re.findall(r"\d+", text))
        if re.search(r"\*|:[^}]*{", text):
            size += sum(abs(n) for value in values for n in _flat(value) if isinstance(n, int))
    elif operation == "replace" and len(texts) == 3:
        size = len(text) + text.count(texts[1]) * len(texts[2])
    elif operation in ("center", "ljust", "rjust", "zfill", "expandtabs", "indent"):
        size = sum(lengths) + (text.count("\n") + text.count("\t") + 1) * (number + sum(lengths[1:]))
    elif operation in ("join", "translate"):
        size = math.prod(length + 1 for length in lengths)
    elif operation in ("wordwrap", "urlize", "pprint"):  # their time grows faster than their result
        size = total * max([100, *lengths[1:]])
    elif operation == "tojson":
        # Only an indent, a number or a text, makes the result larger than the value.
        indents = [
            value if isinstance(value, int) else len(value) for value in values[1:] if isinstance(value, int | str)
        ]
        size = total * sum(indents)
    elif operation == "sum":
        size = total * (lengths[0] if len(lengths) > 1 else 1)
    elif operation in ("batch", "slice"):
        size = number
    else:
        size = sum(lengths)
    _check_size(size)


def _flat(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    """Jinja's global of that name (random paragraphs), with a limit on its length."""
    _check_size(n * max * 20)
    return generate_lorem_ipsum(n, html, min, max)
