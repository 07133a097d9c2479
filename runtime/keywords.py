"""One clear error for a misspelt keyword argument."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` looks like, or None."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)), None)


def reject_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for the first of `given` that is not in `known`, naming the nearest known one."""
    for name in given:
        if name not in known:
            match = nearest(name, known)
            hint = f"did you mean {match!r}?" if match else f"known are {', '.join(known)}"
            raise TypeError(f"{where}: unknown keyword {name!r}; {hint}")
