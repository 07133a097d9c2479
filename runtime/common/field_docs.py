"""Dataclasses whose fields are documented where they are defined."""

import ast
import inspect
import textwrap
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type[Any])


def document_fields(cls: Class) -> Class:
    """Adds the strings that follow the fields of a class to its docstring, as its list of attributes.

    An editor shows such a string at the field; Python drops it. With this decorator help() shows it too. Without the
    source at hand (a frozen application) the docstring stays as it is.
    """
    try:
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except OSError:
        return cls
    assert isinstance(definition, ast.ClassDef)
    lines = []
    for field, doc in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            text = " ".join(inspect.cleandoc(str(doc.value.value)).split())
            entry = f"{ast.unparse(field.target)}: {text}"
            lines += textwrap.wrap(entry, 100, initial_indent="    ", subsequent_indent="        ")
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines])
    return cls
