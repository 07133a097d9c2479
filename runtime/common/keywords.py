"""Clear errors for misspelt keyword arguments, and for keywords of transformers that are not supported."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most similar to `name`, or None."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)), None)


def reject_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for the first of `given` that is not in `known`, naming the nearest known one."""
    for name in given:
        if name not in known:
            match = nearest(name, known)
            known = [*known]
            listed = f"known are {', '.join(known)}" if len(known) < 40 else "there is none of that name or one like it"
            hint = f"did you mean {match!r}?" if match else listed
            raise TypeError(f"{where}: unknown keyword {name!r}; {hint}")


def without_neutral(where: str, given: Mapping[str, Any], neutral: Mapping[str, Iterable[Any]]) -> dict[str, Any]:
    """`given` without neutral keywords: those of other libraries that have no effect here.

    Args:
        where: the function, for the error message.
        given: keyword arguments.
        neutral: keyword -> the values accepted for it. None is always accepted.

    Raises ValueError for a neutral keyword with another value, which would have an effect in the other library.
    """
    for name in given.keys() & neutral.keys():
        value, allowed = given[name], list(neutral[name])
        if value is not None and not any(type(value) is type(other) and value == other for other in allowed):
            only = " or ".join(map(repr, allowed)) or "None"
            shown = " ".join(repr(value).split())  # the repr of a model fills a page
            shown = shown if len(shown) < 80 else f"{shown[:76]} ..."
            raise ValueError(f"{where}: {name}={shown} is not supported; it can only be {only} here")
    return {name: value for name, value in given.items() if name not in neutral}
