"""One clear error for a misspelt keyword argument, and for one of transformers' that has no meaning here."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` looks like, or None."""
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
    """`given` without the keywords of other libraries that mean nothing here; None is neutral for each of them.

    Raises ValueError for such a keyword with a value that would mean something.
    """
    for name in given.keys() & neutral.keys():
        value, allowed = given[name], list(neutral[name])
        if value is not None and not any(type(value) is type(other) and value == other for other in allowed):
            only = " or ".join(map(repr, allowed)) or "None"
            shown = " ".join(repr(value).split())  # a model's is a page
            shown = shown if len(shown) < 80 else f"{shown[:76]} ..."
            raise ValueError(f"{where}: {name}={shown} is not supported; it can only be {only} here")
    return {name: value for name, value in given.items() if name not in neutral}
