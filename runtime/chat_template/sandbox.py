"""The sandbox of chat templates: compiles and renders them, without access to Python's internals.

A sandbox does not limit time and memory. So only the published template runs in the caller's process; isolation.py runs
all others in a child process that has these limits.
"""

import json
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from .messages import joined_text

SECONDS = 10.0  # for one rendering, and compiling before it
MEMORY = 512 * 2**20  # bytes that the child may allocate; only Linux has this limit
SIZE = 20_000_000  # characters of template and messages together as JSON, and of the text

# Private-use characters around the text of a generation block, when its position is asked for.
GENERATION_BEGIN, GENERATION_END = "\U000f0002", "\U000f0003"

_marking: ContextVar[bool] = ContextVar("marking", default=False)


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
    """Jinja's immutable sandbox, with the names that transformers gives to a chat template."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _tojson
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


_environment = Environment()


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    try:
        return _environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: syntax error: {error.message}") from error
    except Exception as error:  # Python's compiler has limits too
        raise _failed(error) from error


def describe(template: str) -> tuple[list[str], list[str]]:
    """The variables that a template reads and does not set itself, and its literal texts, in quotes or outside blocks.

    Raises ValueError for a template that cannot be compiled.
    """
    _compile(template)
    tree = _environment.parse(template)
    literals = {node.data for node in tree.find_all(nodes.TemplateData)}
    literals |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return sorted(jinja2.meta.find_undeclared_variables(tree)), sorted(literals)


def expand(template: str, messages: list[dict[str, Any]], variables: dict[str, Any], marking: bool) -> str:
    """The text that a template makes of checked messages.

    A template that reads content in parts gets it unchanged; for any other the parts' texts are joined by newlines.

    Args:
        variables: all other variables of the template, as JSON data.
        marking: put GENERATION_BEGIN and GENERATION_END around generation blocks.

    Raises:
        ValueError: the template fails, or tries to leave its sandbox; the message names its line.
    """
    compiled = _compile(template)
    if any(isinstance(message["content"], list) for message in messages) and not _reads_parts(compiled, variables):
        messages = [{**message, "content": joined_text(message["content"])} for message in messages]
    token = _marking.set(marking)
    try:
        return compiled.render(messages=messages, **variables)
    except Exception as error:  # the template is foreign code, which can raise anything
        raise _failed(error) from error
    finally:
        _marking.reset(token)


def _reads_parts(compiled: jinja2.Template, variables: dict[str, Any]) -> bool:
    """Whether the template prints the text of a content part, rather than the part's repr or JSON."""
    probe = "a text that no template has"
    message = {"role": "user", "content": [{"type": "text", "text": probe}]}
    try:
        prompt = compiled.render(messages=[message], **{**variables, "add_generation_prompt": False})
    except Exception:  # it needs a string, or fails on any message: then rendering reports it
        return False
    return probe in prompt and f"'{probe}'" not in prompt and f'"{probe}"' not in prompt


def _failed(error: Exception) -> ValueError:
    """The error to raise for one in a template, with its line: Jinja gives a template's frames the name <template>."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    reason = str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        reason = f"it needs more than {MEMORY / 2**20:g} MB of memory"
    return ValueError(f"chat template, line {lines[-1] or '?' if lines else '?'}: {reason}")
